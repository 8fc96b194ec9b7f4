"""Random numbers that depend on what they are for, and on nothing else.

Every draw comes from a generator of its own on the CPU, whose seed is made of the run's seed and of numbers that say
where in the run the draw belongs: the step, and the place of the sample in that step's global batch. So the ranks that
share a sequence draw the same; ranks with other samples draw something else; one process and many draw the same for the
same global batch; and a resumed run needs no state of any generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derived_seed(seed: int, *labels: int | str) -> int:
    """A seed from `seed` and what it is for: 63 bits, the same on every machine and in every version."""
    said = "/".join(map(str, (seed, *labels))).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *labels: int | str) -> torch.Generator:
    """A generator on the CPU that is seeded with `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, *labels))


class SampleRandomness:
    """The draws of one micro-batch, each sample by itself.

    Args:
        seed: of the run.
        step: the optimizer step.
        positions: the place of each sample in the step's global batch.
        purpose: sets apart draws that have all of this in common, such as those of an evaluation.
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int], purpose: str = "train") -> None:
        self.seed = seed
        self.step = step
        self.positions = tuple(positions)
        self.purpose = purpose

    def generators(self, what: str) -> list[torch.Generator]:
        """One for each sample, for `what`: draws for one thing do not move those for another."""
        return [generator(self.seed, self.purpose, what, self.step, position) for position in self.positions]

    def normal(self, what: str, shape: Sequence[int]) -> Tensor:
        """Normal noise, float32 [samples, *shape], on the CPU."""
        return torch.stack([torch.randn(*shape, generator=each) for each in self.generators(what)])
