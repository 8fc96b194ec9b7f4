"""The position of every rank of the job, for errors that name the missing rank.

A rank writes a note into the job's store when it begins or ends something, such as "forward 7 of transformer". It does
not wait for an answer, so a note costs microseconds. Notes are read only when an exchange fails. Then each rank that
waited notes that it waited; a rank without such a note, after a moment, is missing. If an exchange hangs instead,
`stalls` reads the notes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ...errors import AttentionProviderError
from .activity import IDLE, Quiet
from .process_groups import own_store, resolve
from .rank_differences import ranks_in_words

PREFIX = "diffusers_attn/"
GRACE = 3.0
"""Seconds until a rank that failed reads which others waited, too: one closed connection closes others."""
_WAITS, _IS = "waits", "is"
_STATES = {"ended": "has ended", "stopped": "is stopped (SIGSTOP, or a debugger)"}

_place = "before its first call of enable_context_parallel"
_notes = 0
"""Number of notes that this rank has made."""
_begun = 0
"""Number of forwards over ranks that this rank has begun since it last enabled context parallelism."""
_is_within = False
"""Whether the latest of these forwards is still running."""
_idle = IDLE
"""Seconds that this rank waits for others while no rank computes."""
_all_of: dict[str, tuple[int, ...]] = {}
"""For the name of a group, all ranks that share a sequence over it and over other groups. A rank that does not join an
exchange may be waiting for a rank of another group."""


def belongs_to(groups: Sequence[str], ranks: Sequence[int]) -> None:
    """Records that `ranks` share a sequence over the groups of these names."""
    _all_of.update(dict.fromkeys(groups, tuple(ranks)))


class RankMissingError(AttentionProviderError):
    """Ranks waited for others in vain. The message names the missing ranks and their last positions."""


def wait_for_idle_ranks(seconds: float) -> None:
    """Sets how long this rank waits for others, from now on, while no rank computes."""
    global _idle
    _idle = seconds


def note(at: str) -> None:
    """Notes this rank's position, such as "enable_context_parallel of a FluxPipeline"."""
    global _place, _notes
    _place = at
    _notes += 1
    _write(_IS)


def note_enabling(at: str) -> None:
    """As `note`, and restarts the count of forwards."""
    global _begun, _is_within
    _begun, _is_within = 0, False
    note(at)


def note_begin(at: str) -> None:
    """As `note`, for a forward that begins."""
    global _begun, _is_within
    _begun, _is_within = _begun + 1, True
    note(at)


def note_end() -> None:
    """Notes that the latest forward is over on this host. Its device may still compute, and wait for other ranks."""
    global _is_within
    if _is_within:
        _is_within = False
        note(f"{_place}, which is over")


def notes() -> int:
    """The number of notes that this rank has made."""
    return _notes


def _progress() -> int:
    """A number that grows with each begin and end of a forward. Ranks that are behind have a lower one."""
    return 2 * _begun + (not _is_within)


def here() -> str:
    """The latest note."""
    return _place


def note_failure(error: BaseException, groups: Sequence[str] = ()) -> None:
    """Notes that this rank fails. If the error is one that PyTorch raises in compiled code for an exchange over one of
    `groups`, a text that names the missing rank is added to it."""
    is_own = isinstance(error, AttentionProviderError)
    if groups and isinstance(error, RuntimeError) and not is_own and _is_of_exchange(error):
        error.add_note(str(explained(error, groups[0])))
    elif not isinstance(error, RankMissingError):
        message = str(error).strip().partition("\n")[0]
        note(f"{_place} (which failed there with {type(error).__name__}: {message[:200]})")


def _write(state: str) -> None:
    with contextlib.suppress(Exception):  # if the store has ended, the next exchange fails
        own_store().set(
            f"{PREFIX}position/{dist.get_rank()}", f"{state} {_machine()} {os.getpid()} {_progress()} {_place}"
        )


class Position(NamedTuple):
    """The latest note of a rank."""

    waits: bool
    """Whether it waited in vain."""
    process: str | None
    """Number of its process; None on another machine."""
    state: str
    """"ended" or "stopped", if that is known of its process; else ""."""
    progress: int
    place: str


def positions(ranks: Sequence[int]) -> dict[int, Position]:
    """The positions of ranks. Ranks without a note are left out."""
    store = own_store()
    found: dict[int, Position] = {}
    for rank in ranks:
        key = f"{PREFIX}position/{rank}"
        if store.check([key]):
            state, machine, process, progress, place = store.get(key).decode().split(" ", 4)
            here = process if machine == _machine() else None
            found[rank] = Position(state == _WAITS, here, _state(here) if here else "", int(progress), place)
    return found


@functools.cache
def _machine() -> str:
    """An identifier of this machine and its process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown-to-others"


def _state(process: str) -> str:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "ended" if Path("/proc/self/stat").exists() else ""
    return {"Z": "ended", "X": "ended", "T": "stopped"}.get(state, "")


def lost(ranks: Sequence[int], cause: BaseException) -> RankMissingError:
    """The error for a failed exchange between these ranks. Takes `GRACE` seconds at most."""
    _write(_WAITS)
    message = str(cause).strip().partition("\n")[0]
    deadline = time.monotonic() + GRACE
    try:
        while True:
            found = positions(ranks)
            others = [rank for rank in ranks if rank not in found or not found[rank].waits]
            ended = [rank for rank, position in found.items() if position.state]
            if not others or ended or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except Exception:  # the store has ended with its process
        return RankMissingError(
            f"rank {dist.get_rank()}, at {_place}, got no answer from others of the {ranks_in_words(ranks)}. Which one "
            f"is missing is unknown: the job's store, kept by the first rank or the launcher, has ended. ({message})"
        )
    # A rank at the same place as those that waited may still be waiting: it is not missing.
    places = {position.place for position in found.values() if position.waits}
    elsewhere = [rank for rank in others if rank not in found or found[rank].place not in places]
    missing = ended or elsewhere or others
    what = "they are at different places. " if not missing and len(places) > 1 else ""
    if missing:
        what = _missing(missing, found)
    at: dict[str, list[int]] = {}
    for rank, position in found.items():
        if rank not in missing:
            at.setdefault(position.place, []).append(rank)
    waiting = "; ".join(f"{ranks_in_words(those)} at {place}" for place, those in at.items())
    return RankMissingError(
        f"ranks that share a sequence got no answer from each other: {what}Waiting: {waiting}. See the messages of the "
        "other ranks: one may have ended, failed, skipped a call or be slow. (enable_context_parallel(timeout=...) "
        f"sets how long ranks wait. {message})"
    )


def behind(ranks: Sequence[int]) -> str | None:
    """A text that names the ranks that are behind this one. None if there are none, or the store cannot be read."""
    progress, here = _progress(), _place
    try:
        found = positions(ranks)
    except Exception:
        return None
    late = [
        rank
        for rank, position in found.items()
        if position.state or (position.progress, position.place == here) < (progress, True)
    ]
    return f"{_missing(late, found)}Rank {dist.get_rank()} is at {here}." if late else None


def _missing(ranks: Sequence[int], found: Mapping[int, Position]) -> str:
    return (
        f"{ranks_in_words(ranks)} {'is' if len(ranks) == 1 else 'are'} missing: "
        + "; ".join(_last(rank, found.get(rank)) for rank in ranks)
        + ". "
    )


def _last(rank: int, position: Position | None) -> str:
    if position is None:
        return f"rank {rank} has not begun anything yet"
    if position.state:
        return f"rank {rank}, whose process {_STATES[position.state]}, was last at {position.place}"
    return f"rank {rank} was last at {position.place}"


@contextlib.contextmanager
def waiting_for(ranks: Sequence[int]) -> Iterator[None]:
    """Context for an exchange between these ranks.

    Raises:
        RankMissingError: in place of PyTorch's error for a rank that did not come.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_exchange(error):
            raise
        raise lost(ranks, error) from error


def explained(error: RuntimeError, group: str) -> Exception:
    """The error to raise in place of one that an exchange over this group raised: one that names the missing rank; or
    the same error, if it has another cause, such as memory."""
    if not _is_of_exchange(error):
        return error
    return lost(_all_of.get(group) or dist.get_process_group_ranks(resolve(group)), error)


def _is_of_exchange(error: RuntimeError) -> bool:
    """Whether an error says that another rank did not answer. Only NCCL and stores have a class for that."""
    message = str(error)
    return isinstance(error, dist.DistError) or any(
        word in message for word in ("gloo", "imed out", "imeout", "onnection")
    )


def idle_limit() -> float:
    """Seconds that this rank waits for others while no rank computes."""
    return _idle


def idle_for(quiet: Quiet) -> float:
    """Seconds for which no rank of the job has computed, as far as this rank can see."""
    try:
        return quiet.seconds({rank: each.process for rank, each in positions(range(dist.get_world_size())).items()})
    except Exception:  # the store has ended
        return 0.0
