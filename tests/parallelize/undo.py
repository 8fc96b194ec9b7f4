"""What users do to a pipeline, one after the other, on all ranks of a pool: `live` does one of these things to a
pipeline and to a plain one, which this library never touches, and compares their outputs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_attn import (
    AttentionProviderError,
    DispatchProcessor,
    apply_compile,
    apply_cuda_graphs,
    attention_provider,
    disable_context_parallel,
    enable_context_parallel,
    remove_cuda_graphs,
    set_attention_provider,
)

from .test_enable import build, inputs, output

CPU = torch.device("cpu")
SCOPED = "scope"
"""The step that calls the model within a scope; all others change something that lasts."""


def _pipeline() -> Any:
    rest = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=build("flux"), **rest)


def _adapter(seed: int) -> dict[str, torch.Tensor]:
    donor = build("flux")
    torch.manual_seed(seed)
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False))
    return {f"transformer.{name}": value.clone() for name, value in get_peft_model_state_dict(donor).items()}


def _reload(pipe: Any) -> None:
    if getattr(pipe.transformer, "peft_config", None):
        raise ValueError("diffusers saves adapters by themselves, and a model with them under other names")
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        dtype = pipe.transformer.dtype
        pipe.transformer = type(pipe.transformer).from_pretrained(folder, torch_dtype=dtype)


def _offload_groups(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


Step = Callable[[Any, Any], Any]
"""Called with the pipeline and the meshes of the pool."""

CHANGES: dict[str, Callable[[Any], Any]] = {
    "load an adapter": lambda pipe: pipe.load_lora_weights(_adapter(1), adapter_name="one"),
    "load another": lambda pipe: pipe.load_lora_weights(_adapter(2), adapter_name="two"),
    "set both": lambda pipe: pipe.set_adapters(["one", "two"], [0.5, -1.0]),
    "set one": lambda pipe: pipe.set_adapters(["one"], [1.5]),
    "fuse": lambda pipe: pipe.fuse_lora(),
    "unfuse": lambda pipe: pipe.unfuse_lora(),
    "switch adapters off": lambda pipe: pipe.disable_lora(),
    "switch adapters on": lambda pipe: pipe.enable_lora(),
    "delete one": lambda pipe: pipe.delete_adapters("one"),
    "unload": lambda pipe: pipe.unload_lora_weights(),
    "to float32": lambda pipe: pipe.to(torch.float32),
    "to float64": lambda pipe: pipe.to(torch.float64),
    "save and reload": _reload,
    "fuse projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "unfuse projections": lambda pipe: pipe.transformer.unfuse_qkv_projections(),
    # An adapter is then an error without a GPU: diffusers loads it and offloads again, to a device of its own choice.
    "offload the model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "offload groups": _offload_groups,
    "remove hooks": lambda pipe: pipe.remove_all_hooks(),
}
"""Both pipelines get these."""

OURS: dict[str, Step] = {
    "enable Ulysses": lambda pipe, meshes: enable_context_parallel(pipe, mesh=meshes.heads[2], verbose=False),
    "enable a ring": lambda pipe, meshes: enable_context_parallel(
        pipe, mesh=meshes.lines[2], rotate_method="alltoall", inputs="check", verbose=False
    ),
    "enable a gather": lambda pipe, meshes: enable_context_parallel(
        pipe, mesh=meshes.lines[2], rotate_method="allgather", provider="_native_math", inputs="trust", verbose=False
    ),
    "disable": lambda pipe, _: disable_context_parallel(pipe),
    "provider native": lambda pipe, _: set_attention_provider(pipe, "native"),
    "provider math": lambda pipe, _: set_attention_provider(pipe, "_native_math"),
    "no provider": lambda pipe, _: set_attention_provider(pipe, None),
    "processor": lambda pipe, _: pipe.transformer.set_attn_processor(DispatchProcessor("native")),
    "diffusers' processor": lambda pipe, _: pipe.transformer.set_attn_processor(FluxAttnProcessor()),
    "compile blocks": lambda pipe, _: apply_compile(pipe.transformer, backend="eager", fullgraph=False),
    "compile repeated blocks": lambda pipe, _: pipe.transformer.compile_repeated_blocks(backend="eager"),
    "CUDA graphs": lambda pipe, _: apply_cuda_graphs(pipe.transformer),
    "no CUDA graphs": lambda pipe, _: remove_cuda_graphs(pipe.transformer),
}
"""One pipeline gets these, which do not change what it computes."""

_pipes: list[Any] = []


def begin(meshes: Any) -> None:
    """Two new pipelines on this rank."""
    diffusers.utils.logging.set_verbosity_error()
    end(meshes)
    torch._dynamo.reset()
    _pipes[:] = [_pipeline(), _pipeline()]


def end(meshes: Any) -> None:
    if _pipes:
        disable_context_parallel(_pipes[0])
    _pipes.clear()


@torch.no_grad()
def live(meshes: Any, step: str) -> tuple[str, float]:
    """Does a step, and what the error of a call advises. Returns "done", or the refusal; and how far the pipelines'
    outputs are apart."""
    ours, plain = _pipes
    outcome = "done"
    try:
        if step in CHANGES:
            CHANGES[step](ours)
        elif step in OURS:
            OURS[step](ours, meshes)
    except AttentionProviderError as error:
        outcome = f"refused: {error}"
    except Exception as error:  # diffusers or PEFT: the plain pipeline must refuse it, too
        outcome = f"{type(error).__name__}"
    if step in CHANGES and not outcome.startswith("refused"):
        try:
            CHANGES[step](plain)
        except Exception as error:
            assert outcome == type(error).__name__, (step, outcome, error)
        else:
            assert outcome == "done", (step, outcome)
    given = {
        name: each.to(plain.transformer.dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for name, each in inputs("flux").items()
    }
    with attention_provider("_native_math") if step == SCOPED else contextlib.nullcontext():
        try:
            found = output(ours.transformer, given)
        except AttentionProviderError as error:  # diffusers' processor in a model that is split
            outcome = f"refused: {error}"
            assert "set_attn_processor(DispatchProcessor())" in outcome
            ours.transformer.set_attn_processor(DispatchProcessor())
            found = output(ours.transformer, given)
    wanted = output(plain.transformer, given)
    return outcome, ((found - wanted).norm() / wanted.norm()).item()
