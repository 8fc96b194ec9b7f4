"""What a model is trained to do: it gets noisy latents, and its predictions have a loss.

A model may learn several kinds of latents together, as LTX-2 those of a video and of its sound. Kinds are told apart by
a prefix of names: "latents_mean" is of the kind "", which every model has, and "latents_audio_mean" is of "audio_".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..randomness import SampleRandomness
from .base import Family

_MEAN = re.compile("latents_(.*)mean")
DRAWN = ("posterior", "noise")


def draw(batch: Mapping[str, Any], random: SampleRandomness) -> dict[str, Tensor]:
    """The normal random tensors for a batch, float32 in the shape of the latents: for each of its kinds "posterior", to
    draw from the VAE's distribution, and "noise"."""
    return {
        f"{kind}{what}": random.normal(f"{kind}{what}", batch[f"latents_{kind}mean"].shape[1:])
        for kind in kinds_of(batch)
        for what in DRAWN
    }


def kinds_of(names: Iterable[str]) -> list[str]:
    """The kinds of latents among names of tensors."""
    return [found[1] for found in map(_MEAN.fullmatch, names) if found]


def losses_of(
    family: Family, transformer: Callable[..., Any], batch: Mapping[str, Any], drawn: Mapping[str, Tensor]
) -> Tensor:
    """The loss of each example: the sum over the kinds of latents, each with its weight.

    Args:
        family: the family of the model.
        transformer: the model, which may be wrapped, for example by DDP.
        batch: tensors of `LatentLoader` on the model's device. Its `loss_weight` is not used here.
        drawn: what `draw` returned, and the noise levels "u", float32 [batch].

    Returns:
        float32 [batch].
    """
    kinds, objective = family.latents, family.objective
    clean = {kind: each.sample(batch, kind, drawn[f"{kind}posterior"]) for kind, each in kinds.items()}
    level = objective.level(drawn["u"], family.tokens(clean[""].shape))
    noisy = {kind: objective.noisy(each, drawn[f"{kind}noise"], level) for kind, each in clean.items()}
    inputs = {name: each for name, each in batch.items() if not name.startswith(("latents_", "loss_"))}
    predicted = family.predict(transformer, noisy, level.timestep, inputs)
    mask = batch.get("loss_mask")
    losses = [
        each.weight * each.loss(predicted[kind], clean[kind], drawn[f"{kind}noise"], level, mask)
        for kind, each in kinds.items()
    ]
    return sum(losses[1:], losses[0])
