"""The adapter that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..bounds import BELOW_ONE, COUNT, POSITIVE
from ..choices import FORMATS, INITIALISATIONS, KINDS, WHOLE, WITHOUT_ALPHA, WITHOUT_RANK
from ..setting import setting


@dataclass
class AdapterSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "adapter"

    adapter: str = setting(
        "lora",
        "Type of adapter to train; none trains the transformer's own weights, which are saved in diffusers' format",
        (*KINDS, WHOLE),
    )
    rank: int = setting(
        16,
        "Rank of the adapter; of oft the size of the rotated blocks",
        bounds=COUNT,
        needs=("adapter", *(each for each in KINDS if each not in WITHOUT_RANK)),
    )
    alpha: float | None = setting(
        None,
        "Numerator of the adapter's scale, which is alpha / rank (default: the rank)",
        bounds=POSITIVE,
        needs=("adapter", *(each for each in KINDS if each not in WITHOUT_ALPHA)),
    )
    targets: list[str] | None = setting(
        None,
        "Names, or ends of names, of the layers that get an adapter, or one regular expression (default: the "
        "attention's projections)",
        needs=("adapter", *KINDS),
    )
    adapter_init: str = setting(
        "default",
        "Initialization of the adapter's weights; an olora adapter is saved with twice the rank",
        INITIALISATIONS,
    )
    init_adapter: str | None = setting(
        None,
        "Adapter to go on from, of the same --adapter, --rank and --targets: a .safetensors file, or a folder that a "
        "run wrote (default: a new one)",
    )
    adapter_dropout: float = setting(
        0.0,
        "Dropout probability of the adapter's input",
        bounds=BELOW_ONE,
        needs=("adapter", *(each for each in KINDS if each not in WITHOUT_RANK)),
    )
    format: list[str] = setting(
        ["diffusers"],
        "Formats in which the adapter is saved; comfyui adds comfyui_lora.safetensors to the adapter in diffusers' "
        "format, which is written in any case",
        FORMATS,
    )
