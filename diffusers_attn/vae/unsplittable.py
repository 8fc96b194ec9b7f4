"""The error for an operation that rows cannot be split for. It names the module that called it."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import AttentionProviderError


def unsplittable(reason: str) -> AttentionProviderError:
    """The error for an operation of a split VAE.

    Args:
        reason: a clause that names the operation, such as "aten.roll.default has no rule".
    """
    modules = _calling_modules()
    where = f" in {' within '.join(type(module).__name__ for module in modules[:3])}" if modules else ""
    return AttentionProviderError(
        f"the VAE cannot be split by rows: {reason}{where}. Pass split_vae=False to enable_context_parallel (or leave "
        "split_vae() out): every rank then computes the whole image."
    )


def _calling_modules() -> list[nn.Module]:
    """The modules whose forward is running, the innermost first."""
    found: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
        if isinstance(module, nn.Module) and module not in found:
            found.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    return found
