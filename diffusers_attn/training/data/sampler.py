"""Which examples a step is made of. That depends on the seed only, not on the number of processes: a global batch is
a batch of the job, and processes take their parts of it. So a run goes on with the same batches on other machines."""

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
    """of the step, counted from 0 over all epochs."""
    epoch: int
    indices: tuple[int, ...]
    """of the examples, all of one bucket."""


class BatchSampler:
    """The steps of a training, each with a global batch from one bucket, shuffled anew in every epoch.

    Args:
        buckets: of each example; equal ones go together.
        global_batch_size: examples of a step, on all processes and over all accumulation steps.
        seed: decides the order.
        repeats: how often an epoch has each example; or a number for each.
        incomplete: what becomes of examples of a bucket that do not fill a batch. "fill" fills it with others of the
            bucket, the first of the epoch; "drop" leaves them out of this epoch: it is others in the next.

    Raises:
        TrainingDataError: no examples; numbers below 1; or, with "drop", a bucket that never fills a batch.
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
            raise TrainingDataError(f"incomplete={incomplete!r}; it is one of {', '.join(map(repr, INCOMPLETE))}.")
        if global_batch_size < 1:
            raise TrainingDataError(f"global_batch_size={global_batch_size}; it is 1 or more.")
        each = [repeats] * len(buckets) if isinstance(repeats, int) else list(repeats)
        if len(each) != len(buckets) or min(each, default=1) < 1:
            raise TrainingDataError(
                f"repeats={repeats!r}; it is 1 or more, or such a number for each of the {len(buckets)} examples."
            )
        if not buckets:
            raise TrainingDataError("there are no examples to draw batches from.")
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
            "examples of a step": global_batch_size,
            "seed": seed,
            "repeats": repeats if isinstance(repeats, int) else list(repeats),
            "incomplete": incomplete,
        }
        """what decides the batches, for a message where they are others."""
        said = [list(map(str, buckets)), each, global_batch_size, seed, incomplete]
        self.fingerprint = hashlib.sha256(repr(said).encode()).hexdigest()
        """of everything that decides the batches."""

    def step(self, number: int) -> Step:
        """The step of this number, counted from 0."""
        epoch, position = divmod(number, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return Step(number, epoch, self._epoch[1][position])

    @property
    def filled(self) -> int:
        """How many examples of an epoch are there only to fill a batch; negative: how many are left out."""
        return self.steps_per_epoch * self.global_batch_size - sum(map(len, self._members.values()))

    def _shuffled(self, epoch: int) -> list[tuple[int, ...]]:
        # Python's generator gives the same numbers on every machine and in every version, seeded by a string.
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
        whole, rest = divmod(examples, self.global_batch_size)
        return whole + (1 if rest and self.incomplete == "fill" else 0)

    def _refuse_small_buckets(self) -> None:
        small = [
            Problem(f"bucket {bucket}", f"{len(members)} examples")
            for bucket, members in self._members.items()
            if len(members) < self.global_batch_size
        ]
        if small:
            raise TrainingDataError(
                f"with incomplete='drop' and {self.global_batch_size} examples in a step, those of small buckets are "
                "never trained on. Pass incomplete='fill', more `repeats`, fewer buckets or a smaller batch:",
                small,
            )


class Share(NamedTuple):
    """The part of global batches that falls to one data-parallel rank. All ranks of a context-parallel group have the
    same."""

    rank: int = 0
    """of data parallelism."""
    size: int = 1
    """how many data-parallel ranks there are."""
    micro_batch_size: int = 1
    """examples of one forward on one rank."""

    def accumulation_steps(self, global_batch_size: int) -> int:
        """How many forwards of a rank make a step.

        Raises:
            TrainingDataError: it does not come out even.
        """
        if self.micro_batch_size < 1 or not 0 <= self.rank < self.size:
            raise TrainingDataError(f"{self}: the rank is one from 0 to size - 1, and micro_batch_size 1 or more.")
        steps, rest = divmod(global_batch_size, self.size * self.micro_batch_size)
        if rest or steps < 1:
            raise TrainingDataError(
                f"global_batch_size={global_batch_size} is no multiple of {self.size} data-parallel ranks times "
                f"micro_batch_size={self.micro_batch_size}. Change one of them: the next that work are "
                f"{steps * self.size * self.micro_batch_size or self.size * self.micro_batch_size} and "
                f"{(steps + 1) * self.size * self.micro_batch_size}."
            )
        return steps

    def positions(self, global_batch_size: int) -> list[range]:
        """Where in a global batch each of this rank's micro-batches is. Raises as `accumulation_steps` does."""
        size = self.micro_batch_size
        firsts = [(step * self.size + self.rank) * size for step in range(self.accumulation_steps(global_batch_size))]
        return [range(first, first + size) for first in firsts]


class Position:
    """How far a training has come through the steps of a sampler."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler
        self.next_step = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON can say it. Nothing in it depends on the number of processes."""
        epoch, position = divmod(self.next_step, self.sampler.steps_per_epoch)
        batches = {"batches": self.sampler.fingerprint, "made of": self.sampler.made_of}
        return {"epoch": epoch, "position": position, **batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            TrainingDataError: it is of other data, another global batch size or another seed.
        """
        if state["batches"] != self.sampler.fingerprint:
            before, now = state.get("made of", {}), self.sampler.made_of
            differ = [
                f"{name} were {before[name]} and are {now[name]}" for name in now if now[name] != before.get(name)
            ]
            what = "; ".join(differ) if before and differ else "buckets, or the sizes of examples, have changed"
            raise TrainingDataError(
                f"the checkpoint is of other data or batches, which have changed since: {what}. Restore that, "
                "or begin anew with another `output_dir`."
            )
        self.next_step = state["epoch"] * self.sampler.steps_per_epoch + state["position"]
