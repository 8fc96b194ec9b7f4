"""Any attention kernel by name, under any diffusers model: exact, scoped, compiled."""

from .dispatch import attention_dispatch, attention_provider
from .errors import AttentionProviderError, ProviderUnavailableError
from .providers.catalog import AttentionProvider
from .providers.registry import ProviderStatus, list_providers, provider_status

__all__ = [
    "AttentionProvider",
    "AttentionProviderError",
    "DispatchProcessor",
    "ProviderStatus",
    "ProviderUnavailableError",
    "attention_dispatch",
    "attention_provider",
    "list_providers",
    "provider_status",
    "set_attention_provider",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # These two import diffusers' attention modules, which code that only dispatches need not pay for.
    if name in ("DispatchProcessor", "set_attention_provider"):
        from . import processors

        return getattr(processors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
