"""Evaluation losses that can be compared between steps: fixed examples, noise and noise levels."""

from __future__ import annotations

from typing import Any

import torch

from ..batches.prepare import PreparedData, evaluation_batches
from ..families import Family
from ..families.denoising import draw, losses_of
from ..model.experts import at_level, evaluating
from ..parallel import TrainingParallel
from ..randomness import SampleRandomness

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels `u`, before the shift, as parts of the range at which the transformer is trained."""


def evaluate(
    family: Family, prepared: PreparedData, parallel: TrainingParallel, seed: int, device: torch.device
) -> dict[str, float]:
    """The mean loss over the evaluation examples, at each noise level and over all. All processes must call this.

    Returns:
        "evaluation/loss" and "evaluation/loss at 0.1", ..., the same on all processes.
    """
    sums = [0.0] * len(LEVELS)
    with evaluating(family.trained):
        for component, transformer in family.trained.items():
            levels = [number for number, u in enumerate(_levels(family)) if at_level(family.levels, u) == component]
            pairs = [(example, level) for example in range(len(prepared.evaluation)) for level in levels]
            for turn in range(-(-len(pairs) // parallel.dp_degree)):
                # FSDP2 needs all processes in every round. Losses beyond the last pair are computed but not added.
                number = turn * parallel.dp_degree + parallel.dp_rank
                example, level = pairs[number % len(pairs)]
                batch = {name: each.to(device) for name, each in evaluation_batches(prepared, [example])[0].items()}
                random = SampleRandomness(seed, 0, [example], "evaluate")
                loss = loss_of(family, transformer, batch, random, _levels(family)[level])
                if number < len(pairs):
                    sums[level] += float(loss)
    shares = [each / parallel.cp_degree / len(prepared.evaluation) for each in parallel.ranks.sum(sums)]
    result = {f"evaluation/loss at {level}": share for level, share in zip(LEVELS, shares)}
    return {"evaluation/loss": sum(shares) / len(shares), **result}


def _levels(family: Family) -> list[float]:
    """The noise levels `u` of evaluations."""
    ranges = family.levels.values()
    low, high = min(each[0] for each in ranges), max(each[1] for each in ranges)
    return [low + (high - low) * part for part in LEVELS]


def loss_of(
    family: Family, transformer: Any, batch: dict[str, Any], random: SampleRandomness, u: float
) -> torch.Tensor:
    """The mean loss of a batch at noise level `u`, a scalar on the device."""
    device = batch["latents_mean"].device
    drawn = {name: each.to(device) for name, each in draw(batch, random).items()}
    drawn["u"] = torch.full((len(batch["latents_mean"]),), u, device=device)
    return losses_of(family, transformer, batch, drawn).mean()
