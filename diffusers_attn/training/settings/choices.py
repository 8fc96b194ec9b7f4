"""The names that settings accept, as data without PyTorch, so that a command line is parsed in a moment."""

from __future__ import annotations

from typing import NamedTuple

AUTO = "auto"
"""Value of a switch that leaves the choice to the trainer."""
QUANTISED = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""Precisions of a quantised base model, each with the package that computes with it."""
BASE_PRECISIONS = ("bf16", *QUANTISED)
"""Precisions of the base model."""
OFFLOADS = ("none", "blocks", "disk")
"""Places of the base model's blocks while they do not run."""
LOW_VRAM = {"base_precision": "nf4", "offload": "blocks", "optimizer": "adamw8bit"}
"""Settings for little GPU memory."""
KINDS = ("lora", "rslora", "dora", "loha", "lokr", "oft", "ia3")
"""Types of adapters."""
WHOLE = "none"
"""In place of a type of adapter: the transformer's own weights are trained."""
WITHOUT_ALPHA, WITHOUT_RANK = ("oft", "ia3", WHOLE), ("ia3", WHOLE)
"""Types of adapters whose scale is not alpha / rank, and those that have no rank either."""
WHOLE_RATE = 1e-5
"""Default learning rate of the transformer's own weights."""
IN_DIFFUSERS_FORMAT = ("lora", "rslora", "dora")
"""Types of adapters that a pipeline's `load_lora_weights` loads."""
FORMATS = ("diffusers", "comfyui")
"""Formats of saved adapters."""
INITIALISATIONS = ("default", "gaussian", "orthogonal", "olora")
"""Initialisations of an adapter's weights."""
EXPERTS = ("high", "low", "both")
"""What to train of a model with one transformer for high noise levels and one for low ones."""
CLIPS = {"head": "head", "middle": "middle", "uniform:N": "uniform:[1-9][0-9]*", "all": "all"}
"""Rules by which clips are taken from videos, each with the regular expression that matches it."""
MASKS = ("none", "files", "alpha")
"""Where masks of the loss come from: nowhere, files beside those of the examples, or the transparency of images."""
CONDITIONS = ("references", "control", "control_mask")
"""Settings for folders with pictures and videos that examples are made from; also names of columns with these."""
SAMPLINGS = ("uniform", "logit_normal", "mode")
"""Distributions of noise levels."""
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
"""Learning-rate schedules."""
WITHOUT_WARMUP = ("constant",)
"""Schedules whose learning rate does not rise at first."""


class Optimizer(NamedTuple):
    """An optimizer and its package."""

    package: str
    """Python package with the optimizer."""
    install: str
    """Command that installs the package."""
    learning_rate: float
    """Default learning rate."""
    state_entries: tuple[str, ...] = ()
    """Entries of the parameter groups that the optimizer updates itself. All others are settings."""
    of_shards: bool = True
    """Whether it updates parameters that FSDP2 shards."""


OPTIMIZERS = {
    "adamw": Optimizer("torch", "", 1e-4),
    "adamw8bit": Optimizer("bitsandbytes", "pip install bitsandbytes", 1e-4, of_shards=False),
    "prodigy": Optimizer("prodigyopt", "pip install prodigyopt", 1.0, ("d", "d_max", "d_numerator", "k")),
}

WARMUP_STEPS = 50
"""Default of `lr_warmup_steps`; a run of fewer than ten times as many steps warms up for a tenth of its steps."""
