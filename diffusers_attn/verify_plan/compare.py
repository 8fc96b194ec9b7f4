"""Compares every module call of a model on a rank with the same call in one process, and finds the first difference.

The shape of a rank's tensor decides its counterpart: the full tensor, or this rank's shard of one sequence or of
several joined sequences. Inputs are compared when a module begins, outputs when it ends. So the first difference is
either in a module with right inputs and a wrong output, or in the code of the module that called it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..context_parallel.sequences.sharding import Shards, take
from ..context_parallel.sequences.tracker import SequenceTracker
from ..nested import all_tensors_in
from .hints import hint_of
from .module_calls import ModuleCall, ModuleWatch
from .report import Argument, Difference


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in the Euclidean norm; infinity for NaN."""
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def compare(
    model: nn.Module,
    run: Callable[[], Any],
    alone: Mapping[tuple[str, int], ModuleCall],
    tracker: SequenceTracker,
    attention: frozenset[str],
    tolerance: float,
) -> tuple[Any, tuple[int, Difference] | None, Exception | None]:
    """Runs the model under a plan and compares it with one process.

    Args:
        model: the model, with the plan applied.
        run: calls the model.
        alone: the calls in one process, from `record`.
        tracker: tracks the sequences of the applied plan.
        attention: names of the attention modules.
        tolerance: largest relative error at which tensors count as equal.

    Returns:
        The result of `run`; the first difference, with the number of module calls that ended before it; and the error
        that `run` raised. Each is None if there is none.
    """
    found: list[tuple[int, Difference]] = []
    rank, ended_count, last, attention_calls = tracker.mesh.rank, 0, "", [0]
    upstream = tracker.attention

    def counting(query_len: int, key_len: int) -> Any:
        attention_calls[0] += 1
        return upstream(query_len, key_len)

    def difference(
        name: str, number: int, inputs: dict[str, Tensor], problem: str, raised: Exception | None = None
    ) -> Difference:
        before = {
            each: tuple(tensor.shape) for each, tensor in alone.get((name, number), ModuleCall({}, [])).inputs.items()
        }
        arguments = tuple(Argument(each, before.get(each), tuple(tensor.shape)) for each, tensor in inputs.items())
        cls = type(model.get_submodule(name))
        routed = attention_calls[0] > 0 if name in attention else None
        hint = hint_of(name, cls.__name__, arguments, last if name == "" else "", tracker, routed, raised)
        return Difference(name, cls.__name__, number, rank, problem, arguments, last, hint)

    def began(name: str, number: int, inputs: dict[str, Tensor]) -> None:
        """Compares the inputs of a module, which the calling module computed."""
        if found or not watch.entered or (name, number) not in alone:
            return
        for each, tensor in inputs.items():
            full = alone[name, number].inputs.get(each)
            error = 0.0 if full is None else _error(tensor, full, tracker)
            if error > tolerance:
                around = watch.entered[-1]
                problem = f"the input {each} that it gives '{name}' differs by {error:.1e} (relative)"
                found.append((ended_count, difference(*around, problem)))
                return

    def ended(name: str, number: int, inputs: dict[str, Tensor], output: Any) -> None:
        nonlocal ended_count, last
        problem = _describe(name, all_tensors_in(output), alone.get((name, number)), tracker, tolerance)
        if problem and not found:
            found.append((ended_count, difference(name, number, inputs, problem)))
        ended_count += 1
        last = name
        if name in attention:
            attention_calls[0] = 0

    tracker.attention = counting  # type: ignore[method-assign]
    watch = ModuleWatch(model, ended, began)
    try:
        with watch:
            return run(), found[0] if found else None, None
    except Exception as error:
        if not found and watch.entered:
            name, number, inputs = watch.entered[-1]
            problem = f"{type(error).__name__}: {error}"
            found.append((ended_count, difference(name, number, inputs, problem, error)))
        return None, found[0] if found else None, error
    finally:
        del tracker.attention


def _describe(
    name: str, found: list[Tensor], alone: ModuleCall | None, tracker: SequenceTracker, tolerance: float
) -> str:
    """Describes a difference of outputs; "" if there is none, or if no part of the full tensor has this shape."""
    if alone is None:
        return "it ran more often than in one process"
    if len(found) != len(alone.outputs):
        return f"it returned {len(found)} tensors, but {len(alone.outputs)} in one process"
    for index, (local, full) in enumerate(zip(found, alone.outputs)):
        what = "its output" if len(found) == 1 else f"its output {index}"
        shapes = f"{list(local.shape)}" + (
            "" if local.shape == full.shape else f", of {list(full.shape)} in one process"
        )
        if name == "" and local.shape != full.shape:
            return f"{what} is {shapes}: not gathered"
        error = _error(local, full, tracker)
        if error > tolerance:
            return f"{what} {shapes}, differs by {error:.1e} (relative)"
    return ""


def _error(local: Tensor, full: Tensor, tracker: SequenceTracker) -> float:
    """Relative error of this rank's tensor; 0.0 if no part of the full tensor has its shape."""
    return min((relative_error(local, part) for part in _parts(local, full, tracker)), default=0.0)


def _parts(local: Tensor, full: Tensor, tracker: SequenceTracker) -> Iterator[Tensor]:
    """Candidates for this rank's tensor: the full tensor, or a shard along the one dimension that is shorter."""
    if local.shape == full.shape:
        yield full
        return
    dims = [dim for dim in range(local.ndim) if local.ndim == full.ndim and local.shape[dim] != full.shape[dim]]
    if len(dims) != 1:
        return
    (dim,) = dims
    size, rank = tracker.mesh.size, tracker.mesh.rank
    total = full.shape[dim]
    for length in tracker.lengths.values():
        if length and total > length and total % length == 0:  # each entry is several tokens
            start, count = Shards.contiguous(total, size, total // length).spans[rank][0]
            if count == local.shape[dim]:
                yield full.narrow(dim, start, count)
    balanced = {tracker.lengths[name] for name in tracker.balanced & tracker.lengths.keys()}

    def shards_of(length: int) -> Shards:
        return Shards.zigzag(length, size) if length in balanced else Shards.contiguous(length, size)

    for lengths in _joins(total, sorted(set(tracker.lengths.values()))):
        for split in itertools.product((True, False), repeat=len(lengths)):
            spans: list[tuple[int, int]] = []
            offset = 0
            for length, is_split in zip(lengths, split):
                mine = shards_of(length).spans[rank] if is_split else ((0, length),)
                spans += [(offset + start, count) for start, count in mine]
                offset += length
            if sum(count for _, count in spans) == local.shape[dim]:
                yield take(full, tuple(spans), dim)


def _joins(total: int, known: list[int]) -> Iterator[tuple[int, ...]]:
    """Combinations of sequences, in every order, whose lengths add up to `total`; and one sequence of that length."""
    yield (total,)
    for count in (2, 3):
        yield from (each for each in itertools.product(known, repeat=count) if sum(each) == total)
