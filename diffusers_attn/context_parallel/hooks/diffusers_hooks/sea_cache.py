"""SeaCache: all ranks take the first rank's decision.

All of them decide by latents that every rank has in full. Devices that round differently would decide differently.

Private names of diffusers in this file: `shared_state` of the hook, its `resolve_gate`, and the attributes of the gate.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...sequences.tracker import SequenceTracker
from .over_ranks import sum_over_ranks
from .replacing import replace

DECIDE = "resolve_gate"


def adapt(hook: Any, tracker: SequenceTracker) -> None:
    """Replaces the decision that the hooks of a model share."""
    shared = hook.shared_state
    if DECIDE not in vars(shared):
        replace(hook, shared, DECIDE, functools.partial(_gate_of_first_rank, shared, tracker))


def _gate_of_first_rank(
    shared: Any, tracker: SequenceTracker, state: Any, metadata: Any, indicator: Any, config: Any
) -> bool:
    if state.gate_key != (metadata.step_index, metadata.sigma):
        decided = type(shared).resolve_gate(shared, state, metadata, indicator, config)
        device = indicator[0].device if indicator else tracker.mesh.device_type
        numbers = torch.zeros(2, dtype=torch.float64, device=device)
        if tracker.mesh.rank == 0:
            numbers += torch.tensor([decided, state.accumulated_distance], device=device)
        decided, distance = sum_over_ranks(numbers, tracker).tolist()
        state.gate_should_compute, state.accumulated_distance = bool(decided), distance
    return bool(state.gate_should_compute)
