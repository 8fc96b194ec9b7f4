"""`torch.export` of models over ranks: an error that says what to do, and equal results once that is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffusers_attn import (
    AttentionProviderError,
    DispatchProcessor,
    attention_provider,
    disable_context_parallel,
    enable_context_parallel,
    set_attention_provider,
)
from diffusers_attn.runtime.cuda_graphs.graphed import GraphedForward

from ..guidance import families
from ..vae.cases import CASES as VAES
from ..zoo import CASES


def exported_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], strict: bool = False) -> float:
    """The largest difference between a model and its exported program."""
    with torch.no_grad():
        found = torch.export.export(model, args, kwargs, strict=strict).module()(*args, **kwargs)
        wanted = model(*args, **kwargs)
    return max((one - other).abs().max().item() for one, other in zip(found, wanted, strict=True))


def refusal(*args: Any, **options: Any) -> str:
    try:
        exported_error(*args, **options)
    except AttentionProviderError as error:
        return str(error)
    return "exported"


def flux() -> tuple[Any, dict[str, Any]]:
    case = CASES["flux"]
    return case.build(), {**case.inputs(), "return_dict": False}


class Decode(nn.Module):
    """A VAE's decoder and the layers before it, as programs for decoding have them."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> Any:
        return self.vae.decode(latents, return_dict=False)


def refuse_and_follow_the_advice(meshes: Any, **options: Any) -> dict[str, Any]:
    transformer, kwargs = flux()
    vae = VAES["kl"].make()
    latents = torch.randn(VAES["kl"].latents)
    pipe = families.build("flux")
    pipe.register_modules(transformer=transformer, vae=vae)
    enable_context_parallel(pipe, mesh=meshes.heads[2], verbose=False, split_vae=True, **options)
    refused = [refusal(transformer, (), kwargs, strict=strict) for strict in (False, True)]
    refused += [refusal(Decode(vae), (latents,), {}, strict=strict) for strict in (False, True)]
    disable_context_parallel(pipe)
    return {
        "refused": refused,
        "errors": [exported_error(transformer, (), kwargs), exported_error(Decode(vae), (latents,), {})],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "divided"), [({}, "sequences are split"), ({"shard_weights": True}, "weights are sharded")]
)
def test_it_is_refused_over_ranks_and_works_after_the_advice(pool, options, divided):
    for found in pool.run(2, refuse_and_follow_the_advice, **options):
        of_transformer, of_vae = found["refused"][:2], found["refused"][2:]
        assert {each.partition(" between ranks")[0] for each in of_transformer} == {
            f"torch.export of this FluxTransformer2DModel is not possible while its {divided}"
        }
        assert {each.partition(" between ranks")[0] for each in of_vae} == {
            "torch.export of the decoder of vae (AutoencoderKL) is not possible while its rows are split"
        }
        assert max(found["errors"]) == 0


def bound(model: Any) -> None:
    set_attention_provider(model, "native")


def with_processors(model: Any) -> None:
    model.set_attn_processor(DispatchProcessor("_native_math"))


def with_graphs(model: Any) -> None:
    """As on a GPU, where `enable_context_parallel` and `apply_cuda_graphs` set it."""
    model.forward = GraphedForward(model)


@pytest.mark.parametrize("put", [bound, with_processors, with_graphs])
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_computes_what_the_model_computes(put, strict):
    model, kwargs = flux()
    put(model)
    assert exported_error(model, (), kwargs, strict) == 0


def test_a_scope_holds_for_a_program_that_is_exported_in_it():
    model, kwargs = flux()
    set_attention_provider(model, "native")
    with torch.no_grad():
        with attention_provider("_native_math"):
            program = torch.export.export(model, (), kwargs)
            wanted = model(**kwargs)[0]
        found = program.module()(**kwargs)[0]
    assert "scaled_dot_product_attention_math" in program.graph_module.code
    assert torch.equal(found, wanted)
