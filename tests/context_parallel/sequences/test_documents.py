"""Plans and code of docs/context_parallel.md and docs/from_finetrainers.md, over ranks: what one process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diffusers_attn
from diffusers_attn import AttentionProviderError, ProviderUnavailableError, apply_context_parallel, attention_provider
from diffusers_attn.scope import ProviderChoice
from tests.documents import plan_in, snippets
from tests.zoo import CASES

PAGE = "docs/from_finetrainers.md"
PLANS = {
    "any module": ("docs/context_parallel.md", "Any module"),
    "from finetrainers": (PAGE, "Plans"),
    "its own": None,
}


@torch.no_grad()
def test_plans_of_wan(pool) -> None:
    case = CASES["wan"]
    expected = case.build()(**case.inputs()).sample
    for found in pool.run(2, by_plans):
        assert found.keys() == PLANS.keys()
        for name, sample in found.items():
            assert torch.allclose(sample, expected, atol=1e-5), name


@torch.no_grad()
def by_plans(meshes: Any) -> dict[str, torch.Tensor]:
    case, found = CASES["wan"], {}
    for name, place in PLANS.items():
        model = case.build()
        diffusers_attn.set_attention_provider(model, "native")
        apply_context_parallel(model, meshes.lines[2], place and plan_in(*place))
        with attention_provider("native", mesh=meshes.lines[2], rotate_method="alltoall"):
            found[name] = model(**case.inputs()).sample
    return found


@torch.no_grad()
def test_the_page_for_those_who_come_from_finetrainers(pool) -> None:
    case = CASES["wan"]
    expected = case.build()(**case.inputs()).sample
    for alone, shared in pool.run(4, the_page):
        assert torch.allclose(alone, expected, atol=1e-5)
        assert torch.allclose(shared, expected, atol=1e-5)


@torch.no_grad()
def the_page(meshes: Any) -> list[torch.Tensor]:
    """Its code from top to bottom, but for the options of a kernel that no CPU has."""
    case, found = CASES["wan"], []

    class Pipe:
        transformer = case.build()

    def model(**inputs: Any) -> None:
        found.append(Pipe.transformer(**inputs).sample)

    names = {"model": model, "pipe": Pipe, "inputs": case.inputs(), "device": "cpu", "world_size": 4}
    before = F.scaled_dot_product_attention
    try:
        for code in [*snippets(PAGE, "Imports"), *snippets(PAGE, "Plans")]:
            exec(code, names)
    finally:
        F.scaled_dot_product_attention = before
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about what a CPU refuses")
def test_its_options_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = snippets(PAGE, "Options of a kernel")
    with pytest.raises(ProviderUnavailableError, match="'flash' cannot be used here"):
        exec(code, {"attention_provider": attention_provider})
    monkeypatch.setattr(ProviderChoice, "check_usable", lambda self: None)
    query = torch.randn(1, 2, 3, 8)
    names = {"attention_provider": attention_provider, "attention_dispatch": diffusers_attn.attention_dispatch}
    names |= {"model": lambda: None, "inputs": {}, "query": query, "key": query, "value": query}
    with pytest.raises(ProviderUnavailableError, match="'flash' cannot be used here"):  # its options are accepted
        exec(code, names)
    with pytest.raises(AttentionProviderError, match="'flash' has no option 'window'"):
        exec(code.replace("window_size", "window"), names)
