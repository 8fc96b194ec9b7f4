"""Routes the attention of diffusers models to providers.

- `dispatch`: `DispatchProcessor`, and `models`: binds all attention of a model or pipeline.
- `bound`: a view of the original processor in which the attention functions are those of `entry_points`. `overlay`
  rebuilds the processor's functions for that, and `reachability` finds out which of them call attention.
- `binding`: patches diffusers, so that processors stay bound. `requests` and `backend_scope` detect requests to
  diffusers' own attention, which conflict with a provider.
- `ace_step`, `anyflow_far`, `mochi`, `nabla` and `wan_animate2`: code for models whose call cannot be redirected.

Importing this package changes nothing. `binding.install` patches diffusers once, when the first processor is bound or
the name `DispatchProcessor` is first read (here or in `diffusers_attn`). The latter is needed for
`model.set_attn_processor(DispatchProcessor("flash"))`: Python looks up the method before it evaluates the argument, and
a third of diffusers' model classes lack this method before the patch.
"""

from typing import TYPE_CHECKING, Any

from .models import AttentionModule, attention_modules, set_attention_provider

if TYPE_CHECKING:
    from .dispatch import DispatchProcessor

__all__ = ["AttentionModule", "DispatchProcessor", "attention_modules", "set_attention_provider"]


def __getattr__(name: str) -> Any:
    if name == "DispatchProcessor":
        from .binding import install
        from .dispatch import DispatchProcessor

        install()
        return DispatchProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
