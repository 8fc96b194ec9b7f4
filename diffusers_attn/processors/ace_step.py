"""ACE-Step: windows of attention as an option of the kernel, where it has one, in place of a dense mask.

The model makes a mask of all queries by all keys for its layers with a window, unless a flash backend of diffusers is
set; with one, its processor passes the window on. Through a provider with the option `window_size` it does the same
here: the mask, which says nothing but the window, is left out, and diffusers' own code takes the way of its flash
backends. Over several ranks a window would count positions of a shard, so that the mask stays.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from ..context_parallel.sequences.active import active
from ..providers.catalog import SPECS
from ..scope import active_choice
from .overlay import Overlay, with_globals

PROCESSOR = "diffusers.models.transformers.ace_step_transformer.AceStepAttnProcessor2_0"


def methods(upstream: FunctionType, overlay: Overlay) -> dict[str, Callable[..., Any]]:
    """What a bound processor has in place of `upstream`, the `__call__` of diffusers' processor."""
    masked = overlay.rebuild(upstream)
    windowed = with_globals(masked, _get_current_attention_backend=_flash)
    return {"__call__": _call, "with_mask": masked, "with_window": windowed}


def _flash(processor: object = None) -> AttentionBackendName:
    """In place of the function by which diffusers' processor asks for its backend."""
    return AttentionBackendName.FLASH


def _call(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As diffusers' processor, with the same arguments."""
    cross = attn.is_cross_attention and encoder_hidden_states is not None
    windowed = getattr(attn, "sliding_window", None) is not None and attention_mask is not None and not cross
    choice = active_choice(self.choice)
    if windowed and active.tracker is None and choice.provider != "auto":
        if "window_size" in SPECS[choice.provider].options:
            return self.with_window(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)
    return self.with_mask(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
