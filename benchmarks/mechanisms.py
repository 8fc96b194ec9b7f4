"""Switches mechanisms of the library off, one at a time, so that a benchmark shows what each of them gains.

A switch changes a module of the library for the duration of a step. Compiled variants with different switches share no
graph: `SECONDS_OF_A_SECOND_CALL`, a number that Dynamo guards on, has another value for each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from unittest import mock

from diffusers_attn.context_parallel.attention import allgather_kv_one_call, merge
from diffusers_attn.context_parallel.comm import copy_plan, symmetric_memory
from diffusers_attn.context_parallel.compile import inductor


@contextlib.contextmanager
def _seconds_of_a_second_call(seconds: float) -> Iterator[None]:
    with mock.patch.object(allgather_kv_one_call, "SECONDS_OF_A_SECOND_CALL", seconds):
        yield


@contextlib.contextmanager
def without_a_second_call() -> Iterator[None]:
    """Compiled attention always waits for all keys and is one call."""
    with _seconds_of_a_second_call(math.inf):
        yield


@contextlib.contextmanager
def two_calls() -> Iterator[None]:
    """Compiled attention never waits for all keys: one call over local keys, one over the others, and a merge."""
    with _seconds_of_a_second_call(0.0):
        yield


@contextlib.contextmanager
def late() -> Iterator[None]:
    """Compiled graphs begin an exchange where attention is called (no `overlap_pass`)."""
    seconds = allgather_kv_one_call.SECONDS_OF_A_SECOND_CALL
    with (
        _seconds_of_a_second_call(seconds * 1.0001 if seconds else -1.0),
        mock.patch.object(inductor, "_make_pass", lambda others: others),
    ):
        yield


@contextlib.contextmanager
def no_merge_kernel() -> Iterator[None]:
    """Eager attention merges by PyTorch's operations (no `merge_triton`)."""
    with mock.patch.object(merge, "_has_triton", lambda: False):
        yield


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Copy engines send nothing, and no rank waits. Results are wrong; the time shows the cost of the exchange."""
    with (
        mock.patch.object(copy_plan.Copy, "make", lambda *_: None),
        mock.patch.object(symmetric_memory.SymmetricMemory, "barrier", lambda *_: None),
    ):
        yield


SWITCHES = {
    "one-call": without_a_second_call,
    "two-calls": two_calls,
    "late": late,
    "no-merge-kernel": no_merge_kernel,
    "nothing-sent": silence,
}


@contextlib.contextmanager
def switched(names: Iterable[str]) -> Iterator[None]:
    """Context in which the switches of these names are set, in this order."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SWITCHES[name]())
        yield
