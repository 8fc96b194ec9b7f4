"""The noise levels that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..bounds import NOT_NEGATIVE, POSITIVE, Bounds
from ..choices import SAMPLINGS
from ..setting import setting


@dataclass
class NoiseSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "noise"

    timestep_sampling: str | None = setting(
        None,
        "Distribution of the noise levels (default: logit_normal; uniform for models that predict v)",
        SAMPLINGS,
    )
    logit_mean: float = setting(
        0.0,
        "Mean of the normal distribution of logit_normal, in logits",
        bounds=Bounds(-10, 10),
        needs=("timestep_sampling", "logit_normal"),
    )
    logit_std: float = setting(
        1.0,
        "Standard deviation of the normal distribution of logit_normal, in logits",
        bounds=Bounds(0, 10, low_is_in=False),
        needs=("timestep_sampling", "logit_normal"),
    )
    mode_scale: float = setting(
        1.29,
        "Scale of the mode distribution; 0 is uniform, more prefers the middle noise levels",
        bounds=Bounds(-1, 1.75),
        needs=("timestep_sampling", "mode"),
    )
    shift: float | None = setting(
        None,
        "Timestep shift; above 1 moves noise levels towards pure noise (default: that of the pipeline's scheduler)",
        bounds=POSITIVE,
    )
    min_snr_gamma: float | None = setting(
        None,
        "Largest signal-to-noise ratio with its full weight in the loss, for models that predict the noise or v; 5 is "
        "usual (default: no such weight)",
        bounds=POSITIVE,
    )
    audio_weight: float | None = setting(
        None,
        "Weight of the sound's loss beside that of the video, for a model that generates both (LTX-2); 0 trains videos "
        "alone, which may then be silent (default: 1)",
        bounds=NOT_NEGATIVE,
    )
    guidance: float | None = setting(
        None, "Guidance scale that a guidance-distilled model gets as its input (default: 1)", bounds=NOT_NEGATIVE
    )
