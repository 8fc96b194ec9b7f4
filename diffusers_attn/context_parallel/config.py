"""The settings of context parallelism, validated once."""

from __future__ import annotations

import dataclasses

from ..errors import AttentionProviderError

ROTATE_METHODS = ("allgather", "alltoall")


@dataclasses.dataclass(frozen=True)
class ContextParallelConfig:
    """How one sequence is spread over `ring_degree * ulysses_degree` ranks.

    Raises:
        AttentionProviderError: a value is not accepted.
    """

    ring_degree: int = 1
    """Number of ranks between which keys and values travel, from 1."""
    ulysses_degree: int = 1
    """Number of ranks that exchange tokens for heads, from 1. Each of them attends with some of the heads."""
    rotate_method: str = "allgather"
    """How keys and values travel. "allgather" sends all at once, while the rank attends to its local keys or the model
    computes something else. "alltoall" sends them from rank to rank around the ring, each block while the rank attends
    to the one before. It needs memory for two blocks only."""
    convert_to_fp32: bool = True
    """Whether partial results merge in float32. Otherwise they merge in the dtype of the query."""

    def __post_init__(self) -> None:
        for name in ("ring_degree", "ulysses_degree"):
            degree = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise AttentionProviderError(
                    f"{name}={degree!r}: a whole number from 1 is accepted; 1 turns it off. ring_degree * "
                    "ulysses_degree is the number of ranks that share a sequence."
                )
        if self.rotate_method not in ROTATE_METHODS:
            raise AttentionProviderError(
                f"rotate_method={self.rotate_method!r}: accepted are {' and '.join(map(repr, ROTATE_METHODS))}. "
                "On NVLink 'allgather' is faster; 'alltoall' needs less memory."
            )
        if not isinstance(self.convert_to_fp32, bool):
            raise AttentionProviderError(
                f"convert_to_fp32={self.convert_to_fp32!r}: True (partial results merge in float32) and False (in the "
                "dtype of the query) are accepted."
            )

    @property
    def size(self) -> int:
        """Number of ranks that share a sequence."""
        return self.ring_degree * self.ulysses_degree
