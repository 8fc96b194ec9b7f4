"""The cells that run on GPUs: CUDA graphs, and features whose devices or kernels a CPU does not have.

A model is recorded where that gives the same results; under hooks of diffusers it is not, and the outcome is "off".
"""

from __future__ import annotations

from .features import KINDS
from .ways import GPU_WAYS

_NEEDS_GPU = tuple(KINDS["What needs a GPU"])
_ON_ONE = (
    *KINDS["Step caches"],
    "one, loaded from a file",
    "two, with weights",
    "DoRA",
    "another scale between calls",
    "hot-swapped between calls",
    "disabled, enabled, deleted",
    "loaded and unloaded between calls",
    "fused and unfused between calls",
    "bfloat16",
    "`enable_layerwise_casting`, float8",
    "two ControlNets, Flux",
    "true CFG, Qwen-Image",
    "both branches in one batch, PixArt",
    "skip-layer",
    "adaptive projected",
    "`copy.deepcopy`",
    "`transformer.compile()`",
    "other sizes between calls",
    "several prompts, several videos of one",
    "a callback that changes latents",
    "a callback that interrupts",
    "calls in another thread",
    "another pipeline in another thread at once",
    *_NEEDS_GPU,
)
_OVER_RANKS = (
    "FirstBlockCache",
    "another scale between calls",
    "loaded and unloaded between calls",
    "two ControlNets, Flux",
    "other sizes between calls",
    "a callback that interrupts",
    "`enable_group_offload`, blocks to a GPU",
)
_GUIDED = (
    "FirstBlockCache",
    "`transformer.compile()`",
    "`torch.compile(transformer)`",
    "several prompts, several videos of one",
)

GPU_CELLS = [
    *((name, "graphs") for name in _ON_ONE),
    *((name, "graphs over ranks") for name in _OVER_RANKS),
    *((name, "guidance on GPUs") for name in _GUIDED),
]
assert {way for _, way in GPU_CELLS} == set(GPU_WAYS)
