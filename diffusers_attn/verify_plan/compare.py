"""Compares a model's modules, call by call, on one of several ranks and in one process, and finds the first difference.

The shape of a tensor on a rank tells what it is compared with: the full tensor, or this rank's shard of one sequence
or of several joined ones. Inputs are compared when a module begins, outputs when it ends. So the first difference is
either in a module with right inputs and a wrong output, or in the code of the module that called it.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..context_parallel.sequences.sharding import Shards, take
from ..context_parallel.sequences.tracker import SequenceTracker
from ..errors import AttentionProviderError
from .report import Argument, Parting

MIXES = ("GroupNorm", "InstanceNorm", "BatchNorm", "Conv", "Pool")
"""Parts of the names of classes that compute across tokens."""


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a module's inputs or outputs, in order, from any nesting of containers and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors_in(each)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            tensor for field in dataclasses.fields(value) for tensor in tensors_in(getattr(value, field.name, None))
        ]
    return []


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in the Euclidean norm; infinite if it is NaN."""
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


class Watch:
    """Context manager that has hooks on all modules of a model while it is entered.

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
        self.running: list[tuple[str, int, dict[str, Tensor]]] = []
        """The running modules, innermost last. A module that raises stays in the list."""

    def __enter__(self) -> Watch:
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
            self.running.append((name, number, inputs))

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._ended(*self.running.pop(), output)

        return begin, end


def _named(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        tensors = tensors_in(value)
        found |= {name if len(tensors) == 1 else f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)}
    return found


def record(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[tuple[str, int], ModuleCall], Any]:
    """The inputs and outputs of every module call in one process, and the result of `run`."""
    calls: dict[tuple[str, int], ModuleCall] = {}

    def ended(name: str, number: int, inputs: dict[str, Tensor], output: Any) -> None:
        calls[name, number].outputs.extend(tensor.detach().clone() for tensor in tensors_in(output))

    def began(name: str, number: int, inputs: dict[str, Tensor]) -> None:
        # Copies, as models write into tensors.
        calls[name, number] = ModuleCall({each: tensor.detach().clone() for each, tensor in inputs.items()}, [])

    with Watch(model, ended, began):
        return calls, run()


def compare(
    model: nn.Module,
    run: Callable[[], Any],
    alone: Mapping[tuple[str, int], ModuleCall],
    tracker: SequenceTracker,
    attention: frozenset[str],
    tolerance: float,
) -> tuple[Any, tuple[int, Parting] | None, Exception | None]:
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
    found: list[tuple[int, Parting]] = []
    rank, ended_count, last, reached = tracker.mesh.rank, 0, "", [0]
    of_call = tracker.attention

    def counting(query_len: int, key_len: int) -> Any:
        reached[0] += 1
        return of_call(query_len, key_len)

    def parting(
        name: str, number: int, inputs: dict[str, Tensor], problem: str, raised: Exception | None = None
    ) -> Parting:
        before = {
            each: tuple(tensor.shape) for each, tensor in alone.get((name, number), ModuleCall({}, [])).inputs.items()
        }
        arguments = tuple(Argument(each, before.get(each), tuple(tensor.shape)) for each, tensor in inputs.items())
        cls = type(model.get_submodule(name))
        routed = reached[0] > 0 if name in attention else None
        hint = _hint(name, cls.__name__, arguments, last if name == "" else "", tracker, routed, raised)
        return Parting(name, cls.__name__, number, rank, problem, arguments, last, hint)

    def began(name: str, number: int, inputs: dict[str, Tensor]) -> None:
        """Compares the inputs of a module, which were computed by the module that calls it."""
        if found or not watch.running or (name, number) not in alone:
            return
        for each, tensor in inputs.items():
            whole = alone[name, number].inputs.get(each)
            error = 0.0 if whole is None else _error(tensor, whole, tracker)
            if error > tolerance:
                around = watch.running[-1]
                problem = f"what it gives '{name}' as {each} differs by {error:.1e} (relative)"
                found.append((ended_count, parting(*around, problem)))
                return

    def ended(name: str, number: int, inputs: dict[str, Tensor], output: Any) -> None:
        nonlocal ended_count, last
        problem = _difference(name, tensors_in(output), alone.get((name, number)), tracker, tolerance)
        if problem and not found:
            found.append((ended_count, parting(name, number, inputs, problem)))
        ended_count += 1
        last = name
        if name in attention:
            reached[0] = 0

    tracker.attention = counting  # type: ignore[method-assign]
    watch = Watch(model, ended, began)
    try:
        with watch:
            return run(), found[0] if found else None, None
    except Exception as error:
        if not found and watch.running:
            name, number, inputs = watch.running[-1]
            problem = f"{type(error).__name__}: {error}"
            found.append((ended_count, parting(name, number, inputs, problem, error)))
        return None, found[0] if found else None, error
    finally:
        del tracker.attention


def _difference(
    name: str, found: list[Tensor], alone: ModuleCall | None, tracker: SequenceTracker, tolerance: float
) -> str:
    """Describes the difference; "" if there is none, or if shapes do not tell which part of the full tensor it is."""
    if alone is None:
        return "it ran more often than in one process"
    if len(found) != len(alone.outputs):
        return f"it gave {len(found)} tensors, and {len(alone.outputs)} in one process"
    for index, (here, whole) in enumerate(zip(found, alone.outputs)):
        what = "its output" if len(found) == 1 else f"its output {index}"
        shapes = f"{list(here.shape)}" + (
            "" if here.shape == whole.shape else f", of {list(whole.shape)} in one process"
        )
        if name == "" and here.shape != whole.shape:
            return f"{what} is {shapes}: not whole"
        error = _error(here, whole, tracker)
        if error > tolerance:
            return f"{what} {shapes}, differs by {error:.1e} (relative)"
    return ""


def _error(here: Tensor, whole: Tensor, tracker: SequenceTracker) -> float:
    """Relative error of this rank's tensor; 0.0 if its shape does not tell which part of the full tensor it is."""
    return min((relative_error(here, part) for part in _parts(here, whole, tracker)), default=0.0)


def _parts(here: Tensor, whole: Tensor, tracker: SequenceTracker) -> Iterator[Tensor]:
    """Candidates for this rank's tensor: the full tensor, or a shard along the one dimension that is shorter."""
    if here.shape == whole.shape:
        yield whole
        return
    dims = [dim for dim in range(here.ndim) if here.ndim == whole.ndim and here.shape[dim] != whole.shape[dim]]
    if len(dims) != 1:
        return
    (dim,) = dims
    size, rank = tracker.mesh.size, tracker.mesh.rank
    total = whole.shape[dim]
    for length in tracker.lengths.values():
        if length and total > length and total % length == 0:  # each of its entries is several tokens
            own, held = Shards.contiguous(total, size, total // length).spans[rank][0]
            if held == here.shape[dim]:
                yield whole.narrow(dim, own, held)
    balanced = {tracker.lengths[name] for name in tracker.balanced & tracker.lengths.keys()}

    def shards_of(length: int) -> Shards:
        return Shards.zigzag(length, size) if length in balanced else Shards.contiguous(length, size)

    for lengths in _joins(total, sorted(set(tracker.lengths.values()))):
        for split in itertools.product((True, False), repeat=len(lengths)):
            runs: list[tuple[int, int]] = []
            start = 0
            for length, shared in zip(lengths, split):
                mine = shards_of(length).spans[rank] if shared else ((0, length),)
                runs += [(start + own, count) for own, count in mine]
                start += length
            if sum(held for _, held in runs) == here.shape[dim]:
                yield take(whole, tuple(runs), dim)


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
    """A guess at the cause from the shapes alone: what to check first. "" if an error of this library already says what
    to do and no replicated input explains it."""
    shards = [each for each in inputs if each.whole is not None and each.whole != each.here]
    lengths = set(tracker.lengths.values())
    lengths |= {whole for each in shards for whole, here in zip(each.whole or (), each.here) if whole != here}
    rest = [
        each
        for each in inputs
        if each.whole == each.here and (lengths & set(each.here) or any(_like(each, shard) for shard in shards))
    ]
    names = ", ".join(each.name for each in rest)
    wrong = [each for each in shards if not any(part in lengths for part in _cut_lengths(each))]
    if isinstance(raised, AttentionProviderError) and not (rest and shards):
        return ""
    if not name and not before:
        return (
            "hint: the model's own code combines its inputs before any module ends. Are they split alike (sequence, "
            "balanced), and does it look at single tokens only? If not, split behind that code."
        )
    if not name:
        return (
            f"hint: '{before}' is the last module before, and what the model makes of its output needs all tokens: "
            f'gather there, "{before}": CPOutput(...)'
            + (", or split what its output is combined with." if raised is not None else ".")
        )
    if routed is False and raised is None and shards:
        return (
            "hint: none of its attention went through a provider, so that it saw this rank's tokens and took them for "
            "all. Set its processor (set_attention_provider), or have it call attention_dispatch."
        )
    if rest and shards and any("mask" in each.name for each in rest):
        return f"hint: {names} {_is(rest)} whole beside inputs that are split. Split the mask with the tokens it is of."
    if rest and shards:
        return (
            f"hint: {names} {_is(rest)} whole beside {', '.join(each.name for each in shards)}, of which this rank has "
            f"its part. Split {_it(rest)} as well, where given or behind the module that makes {_it(rest)}: CPInput."
        )
    if wrong or (raised is not None and shards and not rest):
        given = ", ".join(each.name for each in wrong or shards)
        return (
            f"hint: is {given} split along the dimension of its tokens? See split_dim and expected_dims of its CPInput."
        )
    if any(part in cls for part in MIXES):
        return (
            "hint: it computes something over the tokens (a statistic, a convolution, a pooling), of which this rank "
            "has a part. Split behind it, or gather before it."
        )
    if routed:
        return (
            "hint: its attention went over the ranks. Look at what it joins, in the plan's CPAttention: the sequences "
            "of queries and keys, their order, and its masks."
        )
    return (
        "hint: it mixes tokens of which this rank has a part: attention that is not called through a provider, a "
        "statistic, or places in the sequence that it counts itself. Split behind it, gather before it, or give it the "
        "length with advanced.CPLength."
    )


def _like(argument: Argument, shard: Argument) -> bool:
    """Whether a whole tensor differs from one that is split, as it is in one process, in that dimension alone."""
    whole = shard.whole or ()
    return len(argument.here) == len(whole) and all(
        one == other for one, other, here in zip(argument.here, whole, shard.here) if other == here
    )


def _cut_lengths(argument: Argument) -> list[int]:
    return [whole for whole, here in zip(argument.whole or (), argument.here) if whole != here]


def _is(arguments: list[Argument]) -> str:
    return "is" if len(arguments) == 1 else "are"


def _it(arguments: list[Argument]) -> str:
    return "it" if len(arguments) == 1 else "them"
