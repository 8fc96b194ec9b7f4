"""Random numbers that depend only on the seed, the step and the sample, not on the process that draws them.

Each draw has its own generator on the CPU. Its seed is derived from the run's seed, the step, and the sample's position
in the step's global batch. So ranks that share a sequence draw the same values; ranks with other samples draw others; a
global batch gets the same values on any number of processes; and a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derived_seed(seed: int, *labels: int | str) -> int:
    """A seed of 63 bits for the purpose named by `labels`, the same on every machine and in every version."""
    text = "/".join(map(str, (seed, *labels))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *labels: int | str) -> torch.Generator:
    """A generator on the CPU, seeded with `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, *labels))


class SampleRandomness:
    """The random numbers of one micro-batch, with a generator for each sample.

    Args:
        seed: seed of the run.
        step: number of the optimizer step.
        positions: position of each sample in the step's global batch.
        purpose: label that separates draws with equal seed, step and position, such as "evaluate".
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int], purpose: str = "train") -> None:
        self.seed = seed
        self.step = step
        self.positions = tuple(positions)
        self.purpose = purpose

    def generators(self, what: str) -> list[torch.Generator]:
        """A generator for each sample. Draws with one name `what` do not affect draws with another."""
        return [generator(self.seed, self.purpose, what, self.step, position) for position in self.positions]

    def normal(self, what: str, shape: Sequence[int]) -> Tensor:
        """Normal noise, float32 [samples, *shape], on the CPU."""
        return torch.stack([torch.randn(*shape, generator=each) for each in self.generators(what)])
