"""Fixtures that count attention calls: those that reach a provider, and those that diffusers makes by itself."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from diffusers_attn.processors import entry_points
from diffusers_attn.processors.binding import attention_modules_of
from diffusers_attn.scope import active_choice


@pytest.fixture
def routed(monkeypatch) -> list[str]:
    """The provider of every call that processors made through us, in order."""
    providers: list[str] = []
    attend = entry_points.attend

    def recording(*args, bound=None, scoped=True, **kwargs):
        choice = active_choice(bound) if scoped else bound
        providers.append(choice.provider)
        return attend(*args, bound=bound, scoped=scoped, **kwargs)

    monkeypatch.setattr(entry_points, "attend", recording)
    return providers


@pytest.fixture
def own_calls(monkeypatch) -> Callable[[torch.nn.Module], contextlib.AbstractContextManager[list[str]]]:
    """A scope that lists the attention modules in which diffusers called a softmax attention itself, once per call.

    All its processors that call one end in F.scaled_dot_product_attention or flex_attention on a CPU. The providers
    call neither by that name.
    """

    @contextlib.contextmanager
    def counting(model: torch.nn.Module) -> Iterator[list[str]]:
        calls: list[str] = []
        active: list[str] = []
        hooks = []

        def counted(function):
            def call(*args, **kwargs):
                calls.extend(active[-1:])
                return function(*args, **kwargs)

            return call

        for name, module in attention_modules_of(model):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: active.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: active.clear()))
        flex = vars(attention_dispatch.flex_attention)
        counted_flex = types.SimpleNamespace(**flex | {"flex_attention": counted(flex["flex_attention"])})
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", counted(F.scaled_dot_product_attention))
            patch.setattr(attention_dispatch, "flex_attention", counted_flex)
            yield calls
        for hook in hooks:
            hook.remove()

    return counting
