"""Compares every module call of a model on a rank with the same call in one process, and finds the first difference.

The shape of a rank's tensor decides its counterpart: the full tensor, or this rank's shard of one sequence or of
several joined sequences. Inputs are compared when a module begins, outputs when it ends. So the first difference is
either in a module with right inputs and a wrong output, or in the code of the module that called it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..context_parallel.sequences.sharding import Shards, take
from ..context_parallel.sequences.tracker import SequenceTracker
from ..errors import AttentionProviderError
from ..nested import all_tensors_in
from .report import Argument, Difference

MIXES = ("GroupNorm", "InstanceNorm", "BatchNorm", "Conv", "Pool")
"""Parts of the names of classes that compute across tokens, such as norms and convolutions."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in the Euclidean norm; infinity for NaN."""
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


class ModuleCall(NamedTuple):
    """A call of a module in one process."""

    inputs: dict[str, Tensor]
    """Input tensors by name."""
    outputs: list[Tensor]


class ModuleWatch:
    """Context manager that sets hooks on all modules of a model.

    Args:
        model: the model.
        ended: called with (name, number of the call, inputs by name, output) when a module ends.
        began: called with (name, number of the call, inputs by name) when a module begins.
    """

    def __init__(
        self,
        model: nn.Module,
        ended: Callable[[str, int, dict[str, Tensor], Any], None],
        began: Callable[[str, int, dict[str, Tensor]], None] | None = None,
    ) -> None:
        self._model = model
        self._ended = ended
        self._began = began
        self.entered: list[tuple[str, int, dict[str, Tensor]]] = []
        """The running modules, innermost last. A module that raises stays in the list."""

    def __enter__(self) -> ModuleWatch:
        self._calls: dict[str, int] = {}
        self._handles = []
        for name, module in self._model.named_modules():
            begin, end = self._hooks(name, module)
            self._handles += [
                module.register_forward_pre_hook(begin, with_kwargs=True),
                module.register_forward_hook(end),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        names = [each for each in inspect.signature(module.forward).parameters if each not in ("args", "kwargs")]

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = self._calls[name] = self._calls.get(name, -1) + 1
            placed = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(args)}
            inputs = _named({**placed, **kwargs})
            if self._began is not None:
                self._began(name, number, inputs)
            self.entered.append((name, number, inputs))

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._ended(*self.entered.pop(), output)

        return begin, end


def _named(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        tensors = all_tensors_in(value)
        found |= {name if len(tensors) == 1 else f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)}
    return found


def record(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[tuple[str, int], ModuleCall], Any]:
    """The inputs and outputs of every module call in one process, and the result of `run`."""
    calls: dict[tuple[str, int], ModuleCall] = {}

    def ended(name: str, number: int, inputs: dict[str, Tensor], output: Any) -> None:
        calls[name, number].outputs.extend(tensor.detach().clone() for tensor in all_tensors_in(output))

    def began(name: str, number: int, inputs: dict[str, Tensor]) -> None:
        # Copies, as models write into tensors.
        calls[name, number] = ModuleCall({each: tensor.detach().clone() for each, tensor in inputs.items()}, [])

    with ModuleWatch(model, ended, began):
        return calls, run()


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
        hint = _hint(name, cls.__name__, arguments, last if name == "" else "", tracker, routed, raised)
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


def _hint(
    name: str,
    cls: str,
    inputs: tuple[Argument, ...],
    before: str,
    tracker: SequenceTracker,
    routed: bool | None,
    raised: Exception | None,
) -> str:
    """A guess at the cause from the shapes, as advice what to check first.

    "" if the error is one of this library, which has advice already, and no replicated input explains it.
    """
    shards = [each for each in inputs if each.full is not None and each.full != each.local]
    lengths = set(tracker.lengths.values())
    lengths |= {full for each in shards for full, local in zip(each.full or (), each.local) if full != local}
    replicated = [
        each
        for each in inputs
        if each.full == each.local and (lengths & set(each.local) or any(_like(each, shard) for shard in shards))
    ]
    names = ", ".join(each.name for each in replicated)
    wrong = [each for each in shards if not any(part in lengths for part in _cut_lengths(each))]
    if isinstance(raised, AttentionProviderError) and not (replicated and shards):
        return ""
    if not name and not before:
        return (
            "hint: the model's own code combines its inputs before any module ends. Are they split alike (sequence, "
            "balanced), and does the code treat each token by itself? If not, split after that code."
        )
    if not name:
        return (
            f"hint: after '{before}', the last module before, the model's own code needs all tokens: gather there, "
            f'"{before}": CPOutput(...)'
            + (", or split what its output is combined with." if raised is not None else ".")
        )
    if routed is False and raised is None and shards:
        return (
            "hint: none of its attention went through a provider, so it attended only to this rank's tokens. Set its "
            "processor (set_attention_provider), or make it call attention_dispatch."
        )
    if replicated and shards and any("mask" in each.name for each in replicated):
        return f"hint: {names} {_is(replicated)} replicated, but other inputs are split. Split the mask as its tokens."
    if replicated and shards:
        return (
            f"hint: {names} {_is(replicated)} replicated, but {', '.join(each.name for each in shards)} "
            f"{_is(shards)} split. Split {_it(replicated)} too, with a CPInput for the argument or for the output of "
            f"the module that makes {_it(replicated)}."
        )
    if wrong or (raised is not None and shards and not replicated):
        given = ", ".join(each.name for each in wrong or shards)
        return (
            f"hint: is {given} split along the dimension of its tokens? See split_dim and expected_dims of its CPInput."
        )
    if any(part in cls for part in MIXES):
        return (
            "hint: it computes something over all tokens (a statistic, a convolution, a pooling), but this rank has "
            "only its shard. Split after it, or gather before it."
        )
    if routed:
        return (
            "hint: its attention was computed over all ranks. Check the plan's CPAttention: the sequences of queries "
            "and keys, their order, and its masks."
        )
    return (
        "hint: it mixes tokens, but this rank has only its shard: attention that calls no provider, a statistic, or "
        "positions that it counts itself. Split after it, gather before it, or give it the length with "
        "advanced.CPLength."
    )


def _like(argument: Argument, shard: Argument) -> bool:
    """Whether a replicated tensor has the full shape of a split one, except in the split dimension."""
    full = shard.full or ()
    return len(argument.local) == len(full) and all(
        one == other for one, other, local in zip(argument.local, full, shard.local) if other == local
    )


def _cut_lengths(argument: Argument) -> list[int]:
    return [full for full, local in zip(argument.full or (), argument.local) if full != local]


def _is(arguments: list[Argument]) -> str:
    return "is" if len(arguments) == 1 else "are"


def _it(arguments: list[Argument]) -> str:
    return "it" if len(arguments) == 1 else "them"
