"""Decides among how many groups of ranks a step is divided: by samples of a batch, by branches of guidance, or both."""

from __future__ import annotations

import math
from typing import NamedTuple


class Division(NamedTuple):
    """The division of one step among groups of ranks."""

    parts: int
    """Number of parts of the batch."""
    owners: int
    """Number of groups that have the same part of the batch and compute different branches."""

    @property
    def groups(self) -> int:
        return self.parts * self.owners

    def place(self, index: int) -> tuple[int, int]:
        """The part, and the number among the owners, of the group with this index."""
        return divmod(index, self.owners)


class Divider(NamedTuple):
    """Divides steps among the ranks of a job."""

    ranks: int
    """Number of ranks."""
    guidance_degree: int | None
    """Number of groups that the user named for branches; None: as many as divide the branches evenly."""
    data_degree: int | None
    """Number of parts of a batch that the user named. None: as many as divide the batch evenly; if the user named
    `guidance_degree` alone, those groups divide either branches or samples."""

    def division(self, samples: int, branches: int, guides: bool) -> Division:
        """The division of a step. Branches are divided evenly or not at all; samples also unevenly, if the user named a
        `data_degree`.

        Args:
            samples: number of samples in a call; 1 if the model does not compute them separately.
            branches: number of calls in the step, as far as is known.
            guides: whether the pipeline uses guidance. Then a single call may have two branches in its batch.
        """
        if self.data_degree is None:
            if self.guidance_degree is None:
                parts = math.gcd(samples, self.ranks)
                return Division(parts, math.gcd(branches, self.ranks // parts))
            if samples % self.guidance_degree == 0:
                return Division(self.guidance_degree, 1)
            return Division(1, self._owners(branches, self.ranks))
        parts = self.data_degree if samples >= self.data_degree else 1
        left = self.ranks // parts
        if branches > 1:
            return Division(parts, self._owners(branches, left))
        halves = self.guidance_degree or math.gcd(2 if guides else 1, left)
        return Division(parts * halves if samples % (parts * halves) == 0 else parts, 1)

    def _owners(self, branches: int, ranks: int) -> int:
        if self.guidance_degree is None:
            return math.gcd(branches, ranks)
        return self.guidance_degree if branches % self.guidance_degree == 0 else 1
