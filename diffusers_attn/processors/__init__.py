"""How the attention of a diffusers model comes to a provider."""

from .binding import install
from .dispatch import DispatchProcessor
from .models import AttentionModule, attention_modules, set_attention_provider

__all__ = ["AttentionModule", "DispatchProcessor", "attention_modules", "set_attention_provider"]

# Now, and not when the first DispatchProcessor is made: in `model.set_attn_processor(DispatchProcessor("flash"))`
# Python looks up the method, which a third of the model classes lack, before it makes its argument.
install()
