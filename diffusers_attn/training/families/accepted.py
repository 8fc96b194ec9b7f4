"""Whether a family can train a pipeline's model: the inputs that its transformer needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import TrainingError
from ..settings.flag_names import option

if TYPE_CHECKING:
    from .base import Family

FURTHER_INPUTS = {
    "image_dim": "an image embedding",
    "added_kv_proj_dim": "an image embedding",
    "pos_embed_seq_len": "image embeddings",
    "ofs_embed_dim": "an offset between frames",
    "vace_layers": "a control video",
    "guidance_embeds": "a guidance scale",
    "image_condition_type": "an image",
    "use_meanflow": "a second timestep",
    "time_cond_proj_dim": "an embedding of a guidance scale",
}
"""Inputs of a transformer besides latents, timestep and text, by the configuration entry that turns each on."""


def check_inputs(family: Family) -> None:
    """Compares the inputs that the transformer needs, and the scheduler's prediction, with those of this family.

    Raises:
        TrainingError: the number of channels, a further input, or the type of prediction differs.
    """
    model, config = type(family.transformer).__name__, family.config
    expected, given = config.get("in_channels"), family.input_channels
    if expected is not None and given is not None and expected != given:
        raise TrainingError(
            f"this {model} has {expected} input channels, but the VAE's latents have {given}. It needs a further "
            f"input, such as an image, a mask or a control. Give a text-conditioned model{_examples(family)}."
        )
    for name, what in FURTHER_INPUTS.items():
        if config.get(name) and name not in family.provided_inputs:
            raise TrainingError(
                f"this {model} needs {what} (its {name} is {config[name]}), which training does not provide. Give "
                f"a text-conditioned model{_examples(family)}."
            )
    accepted = family.prediction_types
    predicts = family.pipeline.scheduler.config.get("prediction_type", accepted[0])
    if predicts not in accepted:
        raise TrainingError(
            f"the scheduler's prediction_type is {predicts!r}, but {type(family).__name__} is trained with "
            f"{' or '.join(map(repr, accepted))}. Give a model with such a scheduler."
        )


def check_guidance(family: Family, guidance: float | None) -> None:
    """Raises TrainingError if a guidance scale was given for a model without this input."""
    if guidance is not None and not (
        "guidance_embeds" in family.provided_inputs and family.config.get("guidance_embeds")
    ):
        raise TrainingError(
            f"{option('guidance', guidance)}: this {type(family.transformer).__name__} has no guidance "
            "input, which only guidance-distilled models such as FLUX.1-dev have. Leave it out."
        )


def _examples(family: Family) -> str:
    return f": a {' or '.join(family.pipelines)}" if family.pipelines else ""
