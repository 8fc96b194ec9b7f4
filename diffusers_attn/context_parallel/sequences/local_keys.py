"""Checks that the keys of a local call are the same on all ranks, where only their length says that they are not split.

A plan that names no sequences leaves it to lengths which attention goes over ranks. Keys with a length of no split
sequence count as replicated, such as a text. Keys that a model makes from split tokens with another length
(`key[:, ::2]`, or a token that each rank appends) look the same, and each rank would attend to its own keys alone. So
ranks compare samples of such keys in the first forward that has them, and fail together if they differ.

Later forwards cost one lookup per call. In a compiled graph the comparison is an operator, which copies the keys. A
module with `CPAttention` in the plan needs neither, unless the keys of a call are as many as the tokens of a shard.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ...call import AttentionCall
from ...errors import AttentionProviderError
from ..comm.everyone import everyone
from ..comm.process_groups import resolve
from .active import active
from .module_names import active_module

if TYPE_CHECKING:
    from .tracker import SequenceTracker

_SAMPLES = 1024
"""Number of values of the keys that are compared."""
_TOLERANCE = 0.01
"""Relative difference that rounding may make between ranks, where kernels are not deterministic."""

_numbers = itertools.count(1)
_of_number: weakref.WeakValueDictionary[int, CheckedKeys] = weakref.WeakValueDictionary()


class CheckedKeys:
    """The local calls of one model whose keys have been compared.

    The calls of a forward are counted by the shape of their keys. Those beyond the count of earlier forwards are
    compared.
    """

    def __init__(self, tracker: SequenceTracker) -> None:
        self._tracker = weakref.ref(tracker)
        self.number = next(_numbers)
        self._compared: dict[tuple[int, ...], int] = {}
        """Number of compared calls in a forward, by shape and call site."""
        self._in_forward: dict[tuple[int, ...], int] = {}
        """Number of calls so far in the running forward."""
        _of_number[self.number] = self

    def start_counting(self) -> None:
        """Counts the calls of another forward."""
        self._in_forward.clear()

    def check(self, key: Tensor, call_site: int = 0) -> None:
        """Compares the keys with those of the other ranks, unless an earlier forward has.

        Args:
            key: this rank's keys.
            call_site: number of the call in a compiled graph.

        Raises:
            AttentionProviderError: on all ranks, if the keys differ between ranks.
        """
        tracker = self._tracker()
        kind = *key.shape, call_site
        if tracker is not None and tracker.is_running:
            calls = self._in_forward[kind] = self._in_forward.get(kind, 0) + 1
        else:  # in a compiled model, whose hooks are in the graph: each of its calls has a number of its own
            calls = 1
        if calls <= self._compared.get(kind, 0) or tracker is None or not tracker.strict or not _has_values(key):
            return
        _compare(key, tracker)
        self._compared[kind] = calls  # not before: a caller may catch the error and go on


def check_local_keys(call: AttentionCall, tracker: SequenceTracker) -> AttentionCall:
    """Checks a call that each rank serves by itself: in the first forward that has it, all ranks compare their keys.

    Args:
        call: plain tensors, in any layout.
        tracker: the sequences of the model that makes the call.

    Returns:
        The call; in a compiled graph with a copy of its keys, without which the compiler would drop the check.

    Raises:
        AttentionProviderError: on all ranks, if the keys differ between ranks.
    """
    if not tracker.is_split or call.not_plain is not None:
        return call
    if tracker.role is not None and not tracker.keys_to_compare(*_tokens(call)):
        return call
    if torch.compiler.is_compiling():
        number, call_site = tracker.checked_keys.number, _new_call_site()
        return call._replace(key=torch.ops.diffusers_attn.check_local_keys(call.key, number, call_site))
    if tracker is active.tracker:
        tracker.checked_keys.check(call.key)
    return call


def _tokens(call: AttentionCall) -> tuple[int, int]:
    """Numbers of queries and keys."""
    dim = -2 if call.layout == "bhsd" else -3
    return call.query.shape[dim], call.key.shape[dim]


@torch._dynamo.assume_constant_result
def _new_call_site() -> int:
    """A number that no other call of this process has, as a constant of the graph that is traced."""
    return next(_numbers)


def _has_values(key: Tensor) -> bool:
    """Whether the keys can be read now: not on the meta device, nor while a CUDA graph is recorded."""
    return key.device.type != "meta" and not (key.is_cuda and torch.cuda.is_current_stream_capturing())


def _compare(key: Tensor, tracker: SequenceTracker) -> None:
    mesh = tracker.mesh
    groups = [resolve(group.name) for group in (mesh.ring, mesh.ulysses) if group.size > 1]
    values = key.detach().flatten()
    sample = values[:: max(1, values.numel() // _SAMPLES)].double().tolist()
    first, *others = everyone((dist.get_rank(), list(key.shape), sample), groups)
    for rank, shape, theirs in others:
        if shape == first[1] and _equal(first[2], theirs):
            continue
        raise AttentionProviderError(
            f"the keys of an attention call have the shape {list(key.shape)} on rank {dist.get_rank()}. No split "
            f"sequence has their length ({tracker.describe()}), so they count as replicated; but ranks {first[0]} and "
            f"{rank} have different ones. Each rank would attend to its own keys alone. If they are made from split "
            "tokens, attend to these tokens themselves, or gather them before with CPOutput. If each rank needs its "
            'own keys only, give "path.of.the.attention": CPAttention((), key=()) in the plan. The call is made by '
            f"{active_module()}."
        )


def _equal(first: list[float], second: list[float]) -> bool:
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (first, second))
    if torch.equal(one, other):
        return True
    one, other = one.nan_to_num(), other.nan_to_num()
    return bool((one - other).norm() <= _TOLERANCE * one.norm())


@torch.library.custom_op("diffusers_attn::check_local_keys", mutates_args=())
def _check_local_keys(key: Tensor, number: int, call_site: int) -> Tensor:
    _of_number[number].check(key, call_site)
    return key.clone()


@_check_local_keys.register_fake
def _(key, number, call_site):  # type: ignore[no-untyped-def]
    return torch.empty_like(key)


_check_local_keys.register_autograd(lambda ctx, grad: (grad, None, None))
