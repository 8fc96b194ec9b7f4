"""The report that `enable_context_parallel` returns."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ContextParallelReport:
    """The choices of `enable_context_parallel`. Prints as one line."""

    models: tuple[str, ...]
    """The split models: names of the pipeline's components, with their classes; for a single model, its class."""
    without_plan: tuple[str, ...]
    """Transformers of the pipeline without a plan, which every rank runs in full."""
    ulysses_degree: int
    ring_degree: int
    rotate_method: str | None
    """Exchange of keys and values in the ring, "allgather" or "alltoall"; None without a ring."""
    reason: str
    """Reason for these degrees."""
    guidance: str
    """How branches of guidance and samples of a batch are divided, in words; empty if they are not."""
    provider: str
    """Attention providers of the split models, separated by commas. "scope" is that of `attention_provider`."""
    inputs: str
    """How inputs are kept equal on all ranks: "broadcast", "check" or "trust"."""
    cuda_graphs: str
    """Whether steps are replayed as CUDA graphs, and if not, why; empty on devices other than "cuda"."""
    split_vaes: tuple[str, ...]
    """The VAEs that are split by rows: names of the pipeline's components, with their classes."""
    ranks: tuple[int, ...]
    """The ranks that share a sequence with this one, including this one."""
    world_size: int
    """Number of ranks in the job."""
    sharded_weights: tuple[str, ...] = ()
    """Components of which each rank holds an equal part of the weights; for a single model, its class."""

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
        graphs = f"; {self.cuda_graphs}" if self.cuda_graphs else ""
        vaes = f"; images are split by rows in {', '.join(self.split_vaes)}" if self.split_vaes else ""
        unsplit = f"; without a plan, so not split: {', '.join(self.without_plan)}" if self.without_plan else ""
        weights = f"; weights of {', '.join(self.sharded_weights)} in 1/{len(self.ranks)} per rank"
        guidance = f"{self.guidance}; other calls by " if self.guidance else ""
        return (
            f"context parallelism: {', '.join(self.models)} on {len(self.ranks)}{of} ranks, "
            f"{guidance}{degrees} ({self.reason}); "
            f"attention by {self.provider}; {inputs}{graphs}{vaes}"
            f"{weights if self.sharded_weights else ''}{unsplit}"
        )
