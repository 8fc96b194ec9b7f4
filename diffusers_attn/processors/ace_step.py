"""ACE-Step: attention windows as an option of the kernel instead of a dense mask.

For layers with a window, the model makes a dense mask of all queries by all keys. With a flash backend of diffusers,
its processor passes the window to the kernel instead. The code here does the same for providers with the option
`window_size`: it drops the mask and runs diffusers' own code for flash backends. Over several ranks the mask stays,
since a kernel's window would count positions within a shard.
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
    """The methods of a bound processor that replace `upstream`, the `__call__` of diffusers' processor."""
    masked = overlay.rebuild(upstream)
    windowed = with_globals(masked, _get_current_attention_backend=_flash)
    return {"__call__": _call, "with_mask": masked, "with_window": windowed}


def _flash(processor: object = None) -> AttentionBackendName:
    """Replaces the function from which diffusers' processor gets its backend."""
    return AttentionBackendName.FLASH


def _call(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Same as diffusers' processor, with the same arguments."""
    cross = attn.is_cross_attention and encoder_hidden_states is not None
    windowed = getattr(attn, "sliding_window", None) is not None and attention_mask is not None and not cross
    choice = active_choice(self.choice)
    if windowed and active.tracker is None and choice.provider != "auto":
        if "window_size" in SPECS[choice.provider].options:
            return self.with_window(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)
    return self.with_mask(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
