"""`SequenceTracker`: the sequences that a model's forward has split, for its hooks and its attention calls."""

from __future__ import annotations

from ..comm.transport import Transport
from ..mesh import ContextParallelMesh
from .attention_calls import AttentionCalls
from .local_keys import CheckedKeys
from .split_gather import SplitGather


class SequenceTracker(SplitGather, AttentionCalls):
    """The sequences of one model on one mesh.

    It is made of four parts, each in a file of its own: which rank has which tokens (`layout`), the running forwards
    (`forwards`), splitting and gathering tensors (`split_gather`), and the shards of attention calls
    (`attention_calls`).
    """

    def __init__(self, mesh: ContextParallelMesh, transport: Transport | None = None) -> None:
        self.checked_keys = CheckedKeys(self)
        super().__init__(mesh)
        self.transport = Transport() if transport is None else transport
        """How keys and values travel to the other ranks of a ring, and why it was chosen."""
        self.model = "model"
        """Class name of the model, for errors."""
        self.strict = True
        """Whether attention that is computed elsewhere is an error. `verify_cp_plan` lets it run, to see the result."""

    def clear(self) -> None:
        """Clears the records of an earlier forward."""
        super().clear()
        self.checked_keys.start_counting()
