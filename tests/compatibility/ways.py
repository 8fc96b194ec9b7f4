"""The ways in which this library is put on a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusers_attn import (
    apply_compile,
    cuda_graphs_status,
    enable_context_parallel,
    set_attention_provider,
    split_vae,
)
from diffusers_attn.context_parallel.hooks.apply import applied_tracker
from diffusers_attn.processors import attention_modules
from diffusers_attn.runtime.cuda_graphs.apply import apply_automatically

from ..gpu.several import SIZE
from .feature import ORDERS

Effect = Callable[[Any, int], bool]
"""Whether a pipeline ran as the way says. Called after its calls, with the number of samples that the transformer
computes in one process."""


Put = Callable[[Any, Any], Effect]
"""Puts this library on a pipeline: called with it and the meshes of the pool, None for one process."""


class Way(NamedTuple):
    """A column of the matrix."""

    title: str
    """As the page has it."""
    ranks: int
    put: Put
    orders: tuple[str, ...] = ORDERS
    """When features may be put on, before or after this library."""
    remedies: Mapping[str, Put] = {}
    """Other ways of putting it on, by the words with which a refusal advises them. They are tried after the refusal."""
    device: str = "cpu"
    """Where pipelines are."""


def _provider(pipe: Any, meshes: Any) -> Effect:
    set_attention_provider(pipe, "native")
    bound = _with_provider(pipe)
    return lambda pipe, _: bound <= _with_provider(pipe)


def transformer_of(pipe: Any) -> Any:
    """The pipeline's transformer, without the wrapper of torch.compile."""
    return getattr(pipe.transformer, "_orig_mod", pipe.transformer)


def _with_provider(pipe: Any) -> set[str]:
    """Names of the attention modules that have the provider."""
    return {each.name for each in attention_modules(transformer_of(pipe)) if each.provider == "native"}


class Counting:
    """A backend of torch.compile that counts the calls of compiled graphs."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


def _blocks(pipe: Any, meshes: Any, **options: Any) -> Effect:
    torch._dynamo.reset()
    set_attention_provider(pipe, "native")
    backend = Counting()
    apply_compile(pipe.transformer, backend=backend, **options)
    return lambda *_: backend.calls > 0


def _whole(pipe: Any, meshes: Any) -> Effect:
    torch._dynamo.reset()
    set_attention_provider(pipe, "native")
    backend = Counting()
    pipe.transformer.compile(backend=backend)
    return lambda *_: backend.calls > 0


def _tokens(mesh: Callable[[Any], Any], **options: Any) -> Put:
    def put(pipe: Any, meshes: Any) -> Effect:
        enable_context_parallel(pipe, mesh=mesh(meshes), split_vae=False, verbose=False, **options)
        return lambda pipe, _: applied_tracker(transformer_of(pipe)) is not None

    return put


def _blocks_over_ranks(pipe: Any, meshes: Any, **options: Any) -> Effect:
    compiled, split = _blocks(pipe, meshes, **options), _ulysses(pipe, meshes)
    return lambda *args: compiled(*args) and split(*args)


class Samples:
    """A hook that counts the samples of a module's inputs. It can be pickled, since features copy models."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_exporting():
            self._add(args, kwargs)

    @torch.compiler.disable  # or a model would be compiled anew for every number
    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.number += next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)).shape[0]


def count_samples(model: nn.Module) -> Samples:
    """Counts the samples of all forwards of a model that this rank computes."""
    samples = Samples()
    parts = (each for each in model.children() if not isinstance(each, (nn.ModuleDict, nn.ModuleList)))
    first = next(each for each in parts if next(each.parameters(), None) is not None)
    first.register_forward_pre_hook(samples, with_kwargs=True)
    return samples


def _guidance(pipe: Any, meshes: Any) -> Effect:
    enable_context_parallel(pipe, guidance_degree=2, split_vae=False, verbose=False)
    samples = count_samples(transformer_of(pipe))
    return lambda _, of_one_process: 0 < samples.number < of_one_process


def _weights(pipe: Any, meshes: Any) -> Effect:
    enable_context_parallel(pipe, mesh=meshes.heads[2], split_vae=False, shard_weights=True, verbose=False)
    return lambda pipe, _: any(isinstance(each, DTensor) for each in transformer_of(pipe).parameters())


def _vae(pipe: Any, meshes: Any) -> Effect:
    split_vae(pipe.vae, meshes.heads[2])
    return lambda pipe, _: "forward" in vars(pipe.vae.decoder)


def _graphs(pipe: Any, meshes: Any) -> Effect:
    set_attention_provider(pipe, "native")
    apply_automatically(pipe.transformer)
    return _replays


def _graphs_over_ranks(pipe: Any, meshes: Any) -> Effect:
    enable_context_parallel(pipe, guidance_degree=1, split_vae=False, verbose=False)
    return _replays


def _replays(pipe: Any, _: int) -> bool:
    status = cuda_graphs_status(transformer_of(pipe))
    return status is not None and status.replays > 0


def _in_parts(put: Callable[..., Effect]) -> Mapping[str, Put]:
    return {"fullgraph=False": partial(put, fullgraph=False)}


_ulysses = _tokens(lambda meshes: meshes.heads[2])

WAYS = {
    "provider": Way("a provider", 1, _provider),
    "blocks": Way("compiled blocks", 1, _blocks, remedies=_in_parts(_blocks)),
    "whole": Way("`torch.compile`", 1, _whole, ORDERS[:1]),
    "ulysses": Way("Ulysses", 2, _ulysses),
    "ring": Way("ring", 2, _tokens(lambda meshes: meshes.lines[2], rotate_method="alltoall")),
    "gather": Way("gather", 2, _tokens(lambda meshes: meshes.lines[2], rotate_method="allgather")),
    "both": Way("Ulysses and gather", 4, _tokens(lambda meshes: meshes.square, rotate_method="allgather")),
    "blocks over ranks": Way(
        "compiled blocks, Ulysses", 2, _blocks_over_ranks, ORDERS[:1], _in_parts(_blocks_over_ranks)
    ),
    "guidance": Way("guidance", 4, _guidance),
    "weights": Way("sharded weights", 2, _weights),
    "vae": Way("VAE", 2, _vae),
}
"""On CPUs, for every feature."""

GPU_WAYS = {
    "graphs": Way("CUDA graphs", 1, _graphs, device="cuda"),
    "graphs over ranks": Way("CUDA graphs, several GPUs", max(SIZE, 2), _graphs_over_ranks, device="cuda"),
    "guidance on GPUs": Way("guidance, several GPUs", max(SIZE, 2), _guidance, device="cuda"),
}
"""On GPUs, for the features in `on_gpus.py`."""
