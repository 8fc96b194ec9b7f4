"""Where every rank of the job is, for the error of those that wait for one in vain.

A rank notes in the job's store what it begins and ends: "forward 7 of transformer". The store does not answer, so that
a note costs microseconds. Nobody reads the notes until an exchange fails. Then each rank that waited notes that too,
and who has not after a moment is missing. Where an exchange does not fail, but hangs, `stalls` reads them.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ...errors import AttentionProviderError
from .process_groups import job_store, resolve
from .rank_differences import ranks_in_words

_PREFIX = "diffusers_attn/"
GRACE = 3.0
"""seconds for other ranks to note that they wait, too: the connection of one ends with that of another."""
_WAITS, _IS = "waits", "is"

_here = "before its first call of enable_context_parallel"
_notes = 0
"""how many notes this rank has made."""
_begun = 0
"""how many forwards of models over ranks it has begun since it last enabled context parallelism."""
_is_within = False
"""whether the one that it began last has not ended."""
_meetings: tuple[object, dict[tuple[int, ...], int]] = (None, {})
"""a job, and how often these of its ranks met."""


_all_of: dict[str, tuple[int, ...]] = {}
"""by the name of a group, all ranks that share a sequence over it and others: who does not come to an exchange may wait
for a rank of another group."""


def belongs_to(groups: Sequence[str], ranks: Sequence[int]) -> None:
    """Groups of these names are those over which these ranks share a sequence."""
    _all_of.update(dict.fromkeys(groups, tuple(ranks)))


class RankMissingError(AttentionProviderError):
    """Ranks waited for others, which did not come: the message names them, and where they were last."""


def note(at: str) -> None:
    """This rank is `at` a place, such as "enable_context_parallel of a FluxPipeline"."""
    global _here, _notes
    _here = at
    _notes += 1
    _write(_IS)


def note_enabling(at: str) -> None:
    """As `note`, where ranks begin anew to count their forwards."""
    global _begun, _is_within
    _begun, _is_within = 0, False
    note(at)


def note_begin(at: str) -> None:
    """As `note`, of a forward that begins."""
    global _begun, _is_within
    _begun, _is_within = _begun + 1, True
    note(at)


def note_end() -> None:
    """The forward that began last is over on this host. Its device may still compute it, and wait for other ranks."""
    global _is_within
    if _is_within:
        _is_within = False
        note(f"{_here}, which is over")


def notes() -> int:
    """How many notes this rank has made."""
    return _notes


def _progress() -> int:
    """How far this rank has come: ranks that are in step have the same number, and those that are behind a lower."""
    return 2 * _begun + (not _is_within)


def here() -> str:
    """What was noted last."""
    return _here


def note_failure(error: BaseException, groups: Sequence[str] = ()) -> None:
    """This rank fails where it is, with an error of its own; or with one of PyTorch's for an exchange over one of these
    groups, as compiled code raises it. Then what is printed with it names the rank that is missing."""
    is_own = isinstance(error, AttentionProviderError)
    if groups and isinstance(error, RuntimeError) and not is_own and _is_of_exchange(error):
        error.add_note(str(explained(error, groups[0])))
    elif not isinstance(error, RankMissingError):
        said = str(error).strip().partition("\n")[0]
        note(f"{_here} (which failed there with {type(error).__name__}: {said[:200]})")


def _write(state: str) -> None:
    with contextlib.suppress(Exception):  # of a store that has ended the next exchange will tell
        job_store().set(
            f"{_PREFIX}position/{dist.get_rank()}", f"{state} {_machine()} {os.getpid()} {_progress()} {_here}"
        )


class _Position(NamedTuple):
    """What a rank noted last."""

    waits: bool
    """whether it waited in vain."""
    has_ended: bool
    """whether its process is known to have."""
    progress: int
    place: str


def _read(ranks: Sequence[int]) -> dict[int, _Position]:
    """Where each rank is; nothing of those that have noted nothing."""
    store = job_store()
    found: dict[int, _Position] = {}
    for rank in ranks:
        key = f"{_PREFIX}position/{rank}"
        if store.check([key]):
            state, machine, process, progress, place = store.get(key).decode().split(" ", 4)
            has_ended = machine == _machine() and not _runs(process)
            found[rank] = _Position(state == _WAITS, has_ended, int(progress), place)
    return found


@functools.cache
def _machine() -> str:
    """What tells this machine, and its numbering of processes, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown-to-others"


def _runs(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self/stat").exists()
    return state not in "ZX"


def lost(ranks: Sequence[int], cause: BaseException) -> RankMissingError:
    """The error for an exchange between these ranks that failed. Takes `GRACE` seconds at most."""
    _write(_WAITS)
    said = str(cause).strip().partition("\n")[0]
    deadline = time.monotonic() + GRACE
    try:
        while True:
            found = _read(ranks)
            others = [rank for rank in ranks if rank not in found or not found[rank].waits]
            ended = [rank for rank, position in found.items() if position.has_ended]
            if not others or ended or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except Exception:  # the store went with the process that had it
        return RankMissingError(
            f"rank {dist.get_rank()}, at {_here}, got no answer from others of the {ranks_in_words(ranks)}. Which one "
            f"is missing is unknown: the job's store, kept by the first rank or the launcher, has ended. ({said})"
        )
    # Some of those that wait at the same place may not have given up yet.
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
        f"sets how long ranks wait. {said})"
    )


def behind(ranks: Sequence[int]) -> str | None:
    """Which of these ranks have not begun, or ended, the forward that this one has, in words; None where there are
    none, or the store does not tell."""
    progress, here = _progress(), _here
    try:
        found = _read(ranks)
    except Exception:
        return None
    late = [rank for rank, position in found.items() if position.progress < progress]
    return f"{_missing(late, found)}Rank {dist.get_rank()} is at {here}." if late else None


def _missing(ranks: Sequence[int], found: Mapping[int, _Position]) -> str:
    return (
        f"{ranks_in_words(ranks)} {'is' if len(ranks) == 1 else 'are'} missing: "
        + "; ".join(_last(rank, found.get(rank)) for rank in ranks)
        + ". "
    )


def _last(rank: int, position: _Position | None) -> str:
    if position is None:
        return f"rank {rank} has not begun anything yet"
    if position.has_ended:
        return f"rank {rank}, whose process has ended, was last at {position.place}"
    return f"rank {rank} was last at {position.place}"


@contextlib.contextmanager
def waiting_for(ranks: Sequence[int]) -> Iterator[None]:
    """Within, these ranks exchange something. What PyTorch raises if one does not come becomes an error that names it.

    Raises:
        RankMissingError: in place of an error of PyTorch's.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_exchange(error):
            raise
        raise lost(ranks, error) from error


def explained(error: RuntimeError, group: str) -> Exception:
    """What to raise in place of an error in an exchange over the group of this name: one that names the rank that is
    missing; or the error itself, if it is of another kind (memory)."""
    if not _is_of_exchange(error):
        return error
    return lost(_all_of.get(group) or dist.get_process_group_ranks(resolve(group)), error)


def _is_of_exchange(error: RuntimeError) -> bool:
    """Whether it says that another rank did not answer. Only NCCL and stores have a class for that."""
    said = str(error)
    return isinstance(error, dist.DistError) or any(
        word in said for word in ("gloo", "imed out", "imeout", "onnection")
    )


def meet(ranks: Sequence[int], timeout: datetime.timedelta) -> None:
    """Returns when all these ranks have come here, each as often as the others.

    Raises:
        RankMissingError: they have not within the timeout.
    """
    tell(ranks, b"", timeout)


def tell(ranks: Sequence[int], said: bytes, timeout: datetime.timedelta) -> list[bytes]:
    """What each of these ranks says, in their order. All of them must call this, each as often as the others.

    It goes through the job's store. A collective would have NCCL make a communicator, which takes hundreds of MiB of
    every GPU.

    Raises:
        RankMissingError: a rank has not called this within the timeout.
    """
    global _meetings
    if _meetings[0] is not dist.group.WORLD:
        _meetings = dist.group.WORLD, {}
    members = tuple(ranks)
    number = _meetings[1].get(members, 0) + 1
    place = f"{_PREFIX}meeting/{'_'.join(map(str, members))}"
    own = f"{place}/{number}/{dist.get_rank()}"
    store = job_store()
    with waiting_for(members):
        store.set(own, said)
        try:
            keys = [f"{place}/{number}/{rank}" for rank in members]
            store.wait(keys, timeout)
            found = [store.get(key) for key in keys]
        except BaseException:
            store.delete_key(own)  # so that who comes late does not take this rank to be here
            raise
    _meetings[1][members] = number
    if number > 2:  # all who come to a meeting have left the last but one
        with contextlib.suppress(Exception):
            store.delete_key(f"{place}/{number - 2}/{dist.get_rank()}")
    return found
