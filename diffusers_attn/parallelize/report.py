"""What was done, for a user to read."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ContextParallelReport:
    """What `enable_context_parallel` did. Prints as one line."""

    models: tuple[str, ...]
    """what is split: the names of a pipeline's components, with their classes."""
    whole: tuple[str, ...]
    """denoising models of the pipeline that have no plan, which every rank runs whole."""
    ulysses_degree: int
    ring_degree: int
    rotate_method: str | None
    """None where there is no ring."""
    reason: str
    """why these degrees."""
    provider: str
    """of the attention of these models; several are joined by commas, and "scope" is whatever scope they run in."""
    inputs: str
    """how inputs are kept the same: "broadcast", "check" or "trust"."""
    ranks: tuple[int, ...]
    """those that share a sequence with this one, this one included."""
    world_size: int
    """ranks of the whole job."""

    @property
    def strategy(self) -> str:
        """ "ulysses", "ring", or "unified" for both."""
        if self.ring_degree == 1:
            return "ulysses"
        return "ring" if self.ulysses_degree == 1 else "unified"

    def __str__(self) -> str:
        method = f" ({self.rotate_method})" if self.rotate_method else ""
        degrees = {
            "ulysses": f"Ulysses over {self.ulysses_degree}",
            "ring": f"a ring{method} of {self.ring_degree}",
            "unified": f"Ulysses over {self.ulysses_degree} within a ring{method} of {self.ring_degree}",
        }[self.strategy]
        of = f" of {self.world_size}" if len(self.ranks) < self.world_size else ""
        inputs = {
            "broadcast": f"inputs are those of rank {self.ranks[0]}",
            "check": "inputs are compared",
            "trust": "inputs are trusted to be the same",
        }[self.inputs]
        whole = f"; whole on every rank, for want of a plan: {', '.join(self.whole)}" if self.whole else ""
        return (
            f"context parallelism: {', '.join(self.models)} on {len(self.ranks)}{of} ranks, {degrees} ({self.reason}); "
            f"attention by {self.provider}; {inputs}{whole}"
        )
