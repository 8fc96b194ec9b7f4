"""Cells over several ranks: tokens are split, attended to and gathered by a tracker, as hooks do it in a model.

Runs on every rank, in a job of `tests/context_parallel/pool.py`. On CPUs over gloo with two ranks, and four for Ulysses
with a gather; on GPUs over NCCL with all of them.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives
from torch.distributed.device_mesh import init_device_mesh

from diffusers_attn import attention_dispatch, attention_provider
from diffusers_attn.context_parallel.mesh import ContextParallelMesh
from diffusers_attn.context_parallel.sequences.roles import Role
from diffusers_attn.context_parallel.sequences.tracker import SequenceTracker

from ..context_parallel.pool import TIMEOUT, serve
from .cell import FAULT, Call, Outcome, compare, differentiated, named
from .features import FEATURES, MASKS
from .forms import FORMS
from .statements import refusals


class Strategy(NamedTuple):
    """Degrees on CPUs and on `n` GPUs, and the method of a ring."""

    cpu: tuple[int, int]
    """Ranks of the ring and of Ulysses."""
    gpus: Callable[[int], tuple[int, int]]
    rotate_method: str


STRATEGIES = {
    "ulysses": Strategy((1, 2), lambda n: (1, n), "allgather"),
    "ring": Strategy((2, 1), lambda n: (n, 1), "alltoall"),
    "gather": Strategy((2, 1), lambda n: (n, 1), "allgather"),
    "unified": Strategy((2, 2), lambda n: (2, n // 2), "allgather"),
}
"""By name: attention over heads, keys that travel, keys that are gathered, and heads and keys."""


class Gpus:
    """The meshes of a pool on GPUs, made by all of its processes."""

    def __init__(self) -> None:
        size = dist.get_world_size()
        self._meshes = {
            degrees: init_device_mesh("cuda", degrees, mesh_dim_names=("ring", "ulysses"))
            for degrees in sorted({strategy.gpus(size) for strategy in STRATEGIES.values() if min(strategy.gpus(size))})
        }

    def __call__(self, ring: int, ulysses: int, **config: Any) -> ContextParallelMesh:
        return ContextParallelMesh.from_mesh(self._meshes[ring, ulysses], **config)


def work_on_gpu(rank: int, store: str, jobs: Any, results: Any) -> None:
    """A process of the pool on GPUs."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=min(torch.cuda.device_count(), 4),
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
        device_id=torch.device("cuda", rank),
    )
    serve(rank, Gpus(), jobs, results)


def degrees_of(strategy: str, gpus: int) -> tuple[int, int]:
    """Ranks of the ring and of Ulysses; `gpus` is 0 on CPUs."""
    return STRATEGIES[strategy].gpus(gpus) if gpus else STRATEGIES[strategy].cpu


def outcomes(meshes: Any, provider: str, strategy: str, cells: list[tuple[str, str]], gpus: int) -> list[Outcome]:
    """The outcomes of cells, given by feature and pass, on this rank."""
    ring, ulysses = degrees_of(strategy, gpus)
    mesh = meshes(ring, ulysses, rotate_method=STRATEGIES[strategy].rotate_method)
    device = torch.device("cuda", mesh.rank) if gpus else torch.device("cpu")
    return [_outcome(mesh, provider, strategy, feature, name, device) for feature, name in cells]


def together(found: list[list[Outcome]]) -> list[Outcome]:
    """The outcomes of all ranks: the largest errors, one refusal, or a fault where they differ."""
    merged: list[Outcome] = []
    for ranks in zip(*found):
        if all(isinstance(each, dict) for each in ranks):
            merged.append({name: max(each[name] for each in ranks) for name in ranks[0]})
        elif len({_without_sizes(each) for each in ranks}) == 1:
            merged.append(ranks[0])
        else:
            merged.append(f"{FAULT}ranks differ: {ranks}")
    return merged


def _without_sizes(outcome: Outcome) -> str:
    """A message without the numbers that ranks have of their own."""
    return "".join(each for each in str(outcome) if not each.isdigit())


def _outcome(
    mesh: ContextParallelMesh, provider: str, strategy: str, feature: str, name: str, device: torch.device
) -> Outcome:
    call = FEATURES[feature]
    served = not refusals(provider, strategy, call, name, device.type, needs_grad=True)
    needs_grad = name == "backward" or (name == "compiled" and served and "backward" in FORMS[call.form].passes)
    return named(
        lambda: _errors(mesh, Call.of(provider, call, device, needs_grad), name),
        refusals(provider, strategy, call, name, device.type, needs_grad),
    )


def _errors(mesh: ContextParallelMesh, call: Call, name: str) -> tuple[dict[str, float], dict[str, float]]:
    feature, tracker = call.feature, SequenceTracker(mesh)
    keys = "tokens" if feature.query_len == feature.key_len else "keys"
    tracker.named = {"tokens", keys}
    tracker.begin_forward()
    tracker.role = Role(("tokens",), (keys,), outer_mask=feature.mask == "outer")
    attend = attention_dispatch
    if name == "compiled":
        torch._dynamo.reset()
        backend = "inductor" if call.inputs[0].is_cuda else "aot_eager"
        attend = torch.compile(_attend, backend=backend, fullgraph=True)

    def compute(*inputs: Tensor) -> Tensor:
        query = tracker.split("tokens", inputs[0], -2)
        key, value = (tracker.split(keys, each, -2) for each in inputs[1:3])
        mask = inputs[3] if len(inputs) == 4 else call.given_mask()
        if isinstance(mask, Tensor) and type(mask) is Tensor:
            if MASKS[feature.mask].rows:
                mask = tracker.split("tokens", mask, -2)
            if tracker.role is not None and (not MASKS[feature.mask].rows or tracker.role.outer_mask):
                mask = tracker.split(keys, mask, -1)
        given = (query, key, value, mask) if len(inputs) == 4 else (query, key, value)
        return tracker.gather("tokens", call.compute(*given, mask=mask, attend=attend), -2)

    try:
        with attention_provider(call.provider, **dict(feature.options)):
            out, grad_out, grads = differentiated(compute, call.inputs)
    finally:
        tracker.end_forward()
    grads = tuple(_mean(each, mesh) for each in grads)
    return compare(call, out, grad_out, grads)


def _mean(gradient: Tensor, mesh: ContextParallelMesh) -> Tensor:
    """Over the ranks, as data parallelism takes it: the gradient of one process."""
    for group in (mesh.ring, mesh.ulysses):
        if group.size > 1:
            gradient = _functional_collectives.all_reduce(gradient.contiguous(), "sum", group.name) / group.size
    return gradient


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    return attention_dispatch(*args, **kwargs)
