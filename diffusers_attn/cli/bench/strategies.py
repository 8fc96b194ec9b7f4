"""Measures strategies of context parallelism at one shape, on all ranks of the job."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...context_parallel.attention.parallel_attention import parallel_attention
from ...context_parallel.comm.everyone import everyone
from ...context_parallel.comm.transport import choose_transport
from ...context_parallel.mesh import ContextParallelMesh
from ...context_parallel.sequences.sharded_masks import KeyMask, RowMask, ShardedMask
from ...context_parallel.sequences.sharding import Shards, gather, split
from ...errors import AttentionProviderError
from ...parallelize.cost import Strategy
from ...parallelize.degrees import Topology, predictions
from .measure import Result, Setting, call_of, compare, is_exact, make
from .reference import Reference, reference
from .timing import ROUNDS, Call, batch_seconds, synchronize

ONE_RANK = "one rank"
"""Name of the full call, which every rank computes by itself."""
_FORM = re.compile(r"(?:ulysses(\d*))?(?:(?:(?<=.)-)?(gather|ring)(\d*))?")
_MOST_CALLS = 1000


@dataclasses.dataclass
class StrategyResult(Result):
    """One strategy with one provider."""

    strategy: str = ""
    """As on the command line, with its degrees; or "one rank"."""
    transport: str = ""
    """How keys and values travel: "symmetric" or "collective"."""


def strategy_of(text: str, ranks: int) -> Strategy:
    """The strategy of a text such as "gather", "ulysses", or "ulysses2-ring4".

    Args:
        ranks: number of ranks. A degree without a number is what the number of ranks leaves for it.

    Raises:
        AttentionProviderError: the text has another form, or the degrees do not multiply to the number of ranks.
    """
    found = _FORM.fullmatch(text)
    problem = f"--strategies {text}: accepted are gather, ring, ulysses, and with degrees ulysses2-gather4"
    if not text or found is None:
        raise AttentionProviderError(f"{problem}.")
    has_ulysses, kind = text.startswith("ulysses"), found[2]
    ulysses, ring = int(found[1] or 0), int(found[3] or 0)
    ulysses = ulysses or (ranks // max(1, ring or 1) if has_ulysses and (ring or kind is None) else 0)
    ulysses = ulysses if has_ulysses else 1
    ring = (ring or (ranks // ulysses if ulysses else 0)) if kind else 1
    if ulysses * ring != ranks:
        raise AttentionProviderError(f"{problem}, whose degrees multiply to the number of ranks, here {ranks}.")
    method = {"gather": "allgather", "ring": "alltoall"}.get(kind) if ring > 1 else None
    return Strategy(ulysses, ring, method)


def name_of(strategy: Strategy) -> str:
    """The text of a strategy, with its degrees: "ulysses2-gather4"."""
    ring = f"{'gather' if strategy.rotate_method == 'allgather' else 'ring'}{strategy.ring_degree}"
    parts = [f"ulysses{strategy.ulysses_degree}"] * (strategy.ulysses_degree > 1) + [ring] * (strategy.ring_degree > 1)
    return "-".join(parts)


def all_strategies(ranks: int, device_type: str, heads: int, per_node: int | None) -> list[Strategy]:
    """The strategies between which `enable_context_parallel` chooses for these ranks."""
    job = Topology(ranks, device_type, (heads,), per_node)
    return [strategy for strategy, _ in predictions(job)]


def measure_strategies(
    strategies: Sequence[Strategy],
    providers: Sequence[str],
    setting: Setting,
    progress: Callable[[str], None] = lambda text: None,
) -> list[StrategyResult]:
    """Errors and times, by provider: of the full call on one rank, then of each strategy. All ranks must call this.

    The milliseconds are those of the slowest rank. Errors are those of the outputs of all ranks together.
    """
    progress("exact attention")
    causal = setting.mask == "causal"
    inputs, mask = make(setting)
    exact = reference(inputs[0], inputs[1], inputs[2], mask, causal, setting.backward)
    results: list[StrategyResult] = []
    calls: dict[str, Call] = {}
    kept: list[Any] = []  # memory of transports
    for name in providers:
        call = call_of(name, inputs, mask, causal, exact if setting.backward else None)
        first = StrategyResult(name, is_exact(name), strategy=ONE_RANK)
        _try(call, call, exact, first, setting)
        results.append(first)
        calls[f"{name} {ONE_RANK}"] = call
        for strategy in strategies:
            progress(f"{name}, {name_of(strategy)}")
            mesh = ContextParallelMesh.from_degrees(
                strategy.ring_degree,
                strategy.ulysses_degree,
                device_type=setting.device.type,
                rotate_method=strategy.rotate_method or "allgather",
            )
            transport, memory = choose_transport(mesh.ring, setting.device.type)
            kept += [mesh, memory]
            local, gathered = _calls(name, inputs, mask, setting, exact, mesh, transport.kind)
            found = StrategyResult(name, is_exact(name), strategy=name_of(strategy), transport=transport.kind)
            results.append(found)
            _try(local, gathered, exact, found, setting)
            calls[f"{name} {found.strategy}"] = local
    measured = {f"{each.provider} {each.strategy}" for each in results if not each.problem}
    times = _milliseconds({name: calls[name] for name in calls if name in measured}, setting, progress)
    for each in results:
        each.ms = times.get(f"{each.provider} {each.strategy}")
    return results


def _try(local: Call, gathered: Call, exact: Reference, result: StrategyResult, setting: Setting) -> None:
    """Fills in the errors of a call. A refusal is equal on all ranks, and raised before anything is sent."""
    try:
        compare(gathered, exact, result, setting)
        local()
    except AttentionProviderError as error:
        result.problem, result.refused = str(error), True


def _calls(
    provider: str,
    inputs: Sequence[Tensor],
    mask: Tensor | None,
    setting: Setting,
    exact: Reference,
    mesh: ContextParallelMesh,
    transport: str,
) -> tuple[Call, Call]:
    """This rank's call; and the same with its results gathered from all ranks, in the layout of `Reference`."""
    causal, length = setting.mask == "causal", setting.shape.length
    shards = (Shards.zigzag if causal else Shards.contiguous)(length, mesh.size)

    def own(tensor: Tensor) -> Tensor:
        return split(tensor.transpose(1, 2), shards, 1, mesh.rank).contiguous()

    def gathered(tensor: Tensor) -> Tensor:
        return gather(tensor.contiguous(), shards, 1, mesh).transpose(1, 2)

    query, key, value = map(own, inputs)
    grad_out = own(exact.grad_out)
    local_mask: ShardedMask | None = None
    if mask is not None and setting.mask == "key":
        local_mask = KeyMask(split(mask[:, 0, 0], shards, 1, mesh.rank).contiguous())
    elif mask is not None:
        local_mask = RowMask(split(mask, shards, 2, mesh.rank).contiguous())

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return parallel_attention(
            query, key, value, local_mask, mesh=mesh, query_shards=shards, key_shards=shards, provider=provider,
            is_causal=causal, transport=transport,
        )  # fmt: skip

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(query, key, value)

    def both() -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [each.detach().requires_grad_() for each in (query, key, value)]
        out = attention(leaves[0], leaves[1], leaves[2])
        return out.detach(), torch.autograd.grad(out, leaves, grad_out)

    def gathered_forward() -> Tensor:
        return gathered(forward())

    def gathered_both() -> tuple[Tensor, tuple[Tensor, ...]]:
        out, grads = both()
        with torch.no_grad():
            return gathered(out), tuple(gathered(each) for each in grads)

    return (both, gathered_both) if setting.backward else (forward, gathered_forward)


def _milliseconds(calls: Mapping[str, Call], setting: Setting, progress: Callable[[str], None]) -> dict[str, float]:
    """Median milliseconds of each call at the slowest rank. All ranks make equally many calls, in the same order."""

    def slowest(call: Call, repeats: int) -> float:
        synchronize(setting.device)
        everyone(None, [None])  # all ranks begin together
        return max(everyone(batch_seconds(call, repeats, setting.device) / repeats, [None]))

    took = {name: slowest(call, 1) for name, call in calls.items()}
    each_turn = setting.seconds / ROUNDS
    repeats = {name: max(1, min(_MOST_CALLS, int(each_turn / max(took[name], 1e-6)))) for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            if turn == 0 or took[name] <= setting.seconds:
                progress(name)
                times[name].append(slowest(calls[name], repeats[name]))
    return {name: statistics.median(found) * 1e3 for name, found in times.items()}
