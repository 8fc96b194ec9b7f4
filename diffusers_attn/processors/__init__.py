"""How the attention of a diffusers model reaches a provider.

Importing this package changes nothing. `binding.install` patches diffusers once, when the first processor is bound.

`DispatchProcessor` is the one name whose reading patches diffusers, too, here and in `diffusers_attn`. In
`model.set_attn_processor(DispatchProcessor("flash"))` Python looks up the method before it makes the argument, and a
third of diffusers' model classes have no such method until it is patched in.
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
