"""Outputs that a plan splits: they are found by index and by name, in all forms that modules return."""

import pytest
from torch import nn

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.cp_plans.plan import CPInput, ParamId

from .test_apply import MESH, tokens


class Output(nn.Module):
    """Returns what it is given."""

    def forward(self, output):
        return output


def split(output, param):
    """What a rank gets of a module's output, of which the plan splits a part."""
    module = Output()
    apply_context_parallel(module, MESH, {"": {param: CPInput(1, split_output=True)}})
    return module(output)


@pytest.mark.parametrize("param", [ParamId(index=0), ParamId(index=-1), ParamId("sample")], ids=str)
def test_a_tensor_is_the_first_and_the_last_output_and_has_any_name(param):
    assert split(tokens(8), param).shape == (1, 3)


@pytest.mark.parametrize(
    ("param", "expected"),
    [(ParamId(index=0), "a"), (ParamId(index=1), "b"), (ParamId(index=-1), "b"), (ParamId("b"), "b")],
    ids=str,
)
def test_an_output_of_a_dict_and_of_a_tuple(param, expected):
    found = split({"a": tokens(8), "b": tokens(8)}, param)
    lengths = {name: each.shape[1] for name, each in found.items()}
    assert lengths == {"a": 8, "b": 8} | {expected: 3}
    assert [each.shape[1] for each in split((tokens(8),), ParamId(index=-1))] == [3]
    if param.index is not None:
        assert [each.shape[1] for each in split((tokens(8), tokens(8)), param)] == list(lengths.values())


@pytest.mark.parametrize(
    ("output", "param", "what"),
    [
        (tokens(8), ParamId(index=1), "a tensor"),
        ((tokens(8),), ParamId(index=1), "a tuple"),
        ([tokens(8)], ParamId(index=-2), "a list"),
        ((tokens(8),), ParamId("sample"), "a name in a tuple"),
        (None, ParamId(index=0), "nothing"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_output_that_is_not_there_is_refused(output, param, what):
    with pytest.raises(AttentionProviderError, match="'' has no output .*: it returned"):
        split(output, param)
