"""The examples of each step.

Global batches depend on the data and the seed, not on the number of processes, which only divide them. So a run can be
resumed with the same batches on other machines.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from .errors import Problem, TrainingDataError

INCOMPLETE = ("fill", "drop")


class Step(NamedTuple):
    """The global batch of an optimizer step."""

    number: int
    """Number of the step, counted from 0 over all epochs."""
    epoch: int
    indices: tuple[int, ...]
    """Indices of the examples, all from one bucket."""


class BatchSampler:
    """The steps of a run. Each has a global batch from one bucket; every epoch is shuffled anew.

    Args:
        buckets: bucket of each example. Only examples of equal buckets share a batch.
        global_batch_size: number of examples per step, on all processes and over all accumulation steps.
        seed: seed of the order.
        repeats: number of times that an epoch has each example; or such a number for each.
        incomplete: treatment of a bucket's last, incomplete batch in an epoch. "fill" adds the bucket's first examples
            of the epoch; "drop" leaves it out. Other examples are left out in the next epoch.

    Raises:
        TrainingDataError: there are no examples, a number is below 1, or, with "drop", a bucket never fills a batch.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        *,
        global_batch_size: int,
        seed: int = 0,
        repeats: int | Sequence[int] = 1,
        incomplete: str = "fill",
    ) -> None:
        if incomplete not in INCOMPLETE:
            raise TrainingDataError(f"incomplete={incomplete!r}: accepted are {', '.join(map(repr, INCOMPLETE))}.")
        if global_batch_size < 1:
            raise TrainingDataError(f"global_batch_size={global_batch_size}: a number from 1 is accepted.")
        each = [repeats] * len(buckets) if isinstance(repeats, int) else list(repeats)
        if len(each) != len(buckets) or min(each, default=1) < 1:
            raise TrainingDataError(
                f"repeats={repeats!r}: a number from 1 is accepted, or one for each of the {len(buckets)} examples."
            )
        if not buckets:
            raise TrainingDataError("there are no examples to make batches of.")
        self.global_batch_size, self.seed, self.incomplete = global_batch_size, seed, incomplete
        self._members: dict[Hashable, list[int]] = defaultdict(list)
        for i, bucket in enumerate(buckets):
            self._members[bucket].extend([i] * each[i])
        if incomplete == "drop":
            self._refuse_small_buckets()
        self.steps_per_epoch = sum(self._steps_of(len(members)) for members in self._members.values())
        self._epoch: tuple[int, list[tuple[int, ...]]] | None = None
        self.made_of = {
            "examples": len(buckets),
            "examples per step": global_batch_size,
            "seed": seed,
            "repeats": repeats if isinstance(repeats, int) else list(repeats),
            "incomplete": incomplete,
        }
        """Settings that determine the batches, for error messages."""
        decisive = [list(map(str, buckets)), each, global_batch_size, seed, incomplete]
        self.fingerprint = hashlib.sha256(repr(decisive).encode()).hexdigest()
        """A hash of everything that determines the batches."""

    def step(self, number: int) -> Step:
        """The step at index `number`, counted from 0."""
        epoch, position = divmod(number, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return Step(number, epoch, self._epoch[1][position])

    @property
    def filled(self) -> int:
        """Number of examples added to an epoch to fill batches; negative: number of examples left out."""
        return self.steps_per_epoch * self.global_batch_size - sum(map(len, self._members.values()))

    def _shuffled(self, epoch: int) -> list[tuple[int, ...]]:
        # Seeded with a string, Python's generator gives the same numbers on every machine and in every version.
        generator = random.Random(f"{self.seed} {epoch}")
        size = self.global_batch_size
        batches = []
        for members in self._members.values():
            order = list(members)
            generator.shuffle(order)
            for i in range(self._steps_of(len(order))):
                batches.append(tuple(order[j % len(order)] for j in range(i * size, (i + 1) * size)))
        generator.shuffle(batches)
        return batches

    def _steps_of(self, examples: int) -> int:
        full, rest = divmod(examples, self.global_batch_size)
        return full + (1 if rest and self.incomplete == "fill" else 0)

    def _refuse_small_buckets(self) -> None:
        small = [
            Problem(f"bucket {bucket}", f"{len(members)} examples")
            for bucket, members in self._members.items()
            if len(members) < self.global_batch_size
        ]
        if small:
            raise TrainingDataError(
                f"with incomplete='drop' and {self.global_batch_size} examples per step, small buckets never fill a "
                "batch. Pass incomplete='fill', more `repeats`, fewer buckets or a smaller batch:",
                small,
            )


class Share(NamedTuple):
    """The part of each global batch for one data-parallel rank. All ranks of a context-parallel group have the same."""

    rank: int = 0
    """Data-parallel rank."""
    size: int = 1
    """Number of data-parallel ranks."""
    micro_batch_size: int = 1
    """Number of examples per forward on one rank."""

    def accumulation_steps(self, global_batch_size: int) -> int:
        """Number of forwards per step on each rank.

        Raises:
            TrainingDataError: the global batch cannot be divided evenly.
        """
        if self.micro_batch_size < 1 or not 0 <= self.rank < self.size:
            raise TrainingDataError(f"{self}: accepted are ranks from 0 to size - 1, and a micro_batch_size from 1.")
        steps, rest = divmod(global_batch_size, self.size * self.micro_batch_size)
        if rest or steps < 1:
            raise TrainingDataError(
                f"global_batch_size={global_batch_size} is not a multiple of {self.size} data-parallel ranks times "
                f"micro_batch_size={self.micro_batch_size}. Change one of them; the nearest accepted batches are "
                f"{steps * self.size * self.micro_batch_size or self.size * self.micro_batch_size} and "
                f"{(steps + 1) * self.size * self.micro_batch_size}."
            )
        return steps

    def positions(self, global_batch_size: int) -> list[range]:
        """Positions of each of this rank's micro-batches in a global batch. Raises as `accumulation_steps` does."""
        size = self.micro_batch_size
        firsts = [(step * self.size + self.rank) * size for step in range(self.accumulation_steps(global_batch_size))]
        return [range(first, first + size) for first in firsts]


class Position:
    """The position of a run in the steps of a sampler."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler
        self.next_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The position for a checkpoint, as JSON values that do not depend on the number of processes."""
        epoch, position = divmod(self.next_step, self.sampler.steps_per_epoch)
        batches = {"batches": self.sampler.fingerprint, "made of": self.sampler.made_of}
        return {"epoch": epoch, "position": position, **batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position that `state_dict` returned.

        Raises:
            TrainingDataError: the state is from other data, another global batch size or another seed.
        """
        if state["batches"] != self.sampler.fingerprint:
            before, now = state.get("made of", {}), self.sampler.made_of
            changes = [
                f"{name}: {before.get(name)} before, now {now[name]}" for name in now if now[name] != before.get(name)
            ]
            what = "; ".join(changes) if before and changes else "buckets, or the sizes of examples"
            raise TrainingDataError(
                f"the data or batches have changed since the checkpoint ({what}). Restore them, or start anew with "
                "another `output_dir`."
            )
        self.next_step = state["epoch"] * self.sampler.steps_per_epoch + state["position"]
