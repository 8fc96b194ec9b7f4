"""PEFT's casts of LoRA inputs, left out where autocast undoes them.

PEFT casts the input of a LoRA to the dtype of its weights, float32, and autocast casts it back to bfloat16 for the
product: two copies of each input and two of its gradient, for the same bits. A step of 18 blocks of Flux at 1024² takes
236 ms on an H200 without them, and 258 with them (benchmarks/results/peft_casts-flux-h200.json). Without autocast, the
casts are needed, as in the user's own code, so they are left out within a context only.

Names of PEFT in this file: `cast_input_dtype_enabled`, `lora_variant` and `lora_dropout` of its layers. (Its own
`disable_input_dtype_casting` takes DoRA along, and searches all modules for each step.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def castless_layers(model: nn.Module) -> list[Any]:
    """The layers whose results under autocast are the same to the bit without the casts: plain LoRA.

    Of dropout, the scaled values would be rounded to bfloat16; DoRA computes norms of weights in the input's dtype.
    """
    from peft.tuners.lora import LoraLayer

    return [
        each
        for each in model.modules()
        if isinstance(each, LoraLayer)
        and not each.lora_variant
        and all(isinstance(dropout, nn.Identity) for dropout in each.lora_dropout.values())
    ]


@contextmanager
def without_casts(layers: Sequence[Any]) -> Iterator[None]:
    """Within this context, PEFT does not cast the inputs of `layers`. For passes under autocast, backward included:
    checkpointing recomputes there."""
    try:
        for each in layers:
            each.cast_input_dtype_enabled = False
        yield
    finally:
        for each in layers:
            each.cast_input_dtype_enabled = True
