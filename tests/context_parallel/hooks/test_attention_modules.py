"""Modules that compute attention are recognised by their code, wherever it names the kernel."""

from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from diffusers_attn.context_parallel.hooks.attention_modules import is_attention


def _weigh(query):
    return F.softmax(query @ query.mT, dim=-1) @ query


library: Any = ModuleType("library")
library.weigh, library.double = _weigh, lambda query: query * 2


class Core:
    """An object that attends in a method, and has no `__call__`."""

    def compute(self, query):
        return scaled_dot_product_attention(query, query, query)

    def scale(self, query):
        return query * 2


class Callable(Core):
    def __call__(self, query):
        return self.compute(query)


def test_a_method_of_an_object_that_the_module_has():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = Core()

        def forward(self, query):
            return self.core.compute(query)

    class Scales(Attends):
        def forward(self, query):
            return self.core.scale(query)

    assert is_attention(Attends()) and not is_attention(Scales())


def test_an_object_that_the_module_calls():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = Callable()

        def forward(self, query):
            return self.core(query)

    assert is_attention(Calls())


def test_a_function_in_the_closure_of_forward():
    def around(function):
        class Around(nn.Module):
            def forward(self, query):
                return function(query)

        return Around()

    assert is_attention(around(_weigh)) and is_attention(around(scaled_dot_product_attention))
    assert not is_attention(around(torch.relu))


def test_a_function_of_another_module():
    class Weighs(nn.Module):
        def forward(self, query):
            return library.weigh(query)

    class Doubles(nn.Module):
        def forward(self, query):
            return library.double(query)

    assert is_attention(Weighs()) and not is_attention(Doubles())
