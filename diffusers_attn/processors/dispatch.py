"""`DispatchProcessor`, the processor that users set to choose a provider."""

from __future__ import annotations

from typing import Any

from ..errors import AttentionProviderError
from ..providers.catalog import AttentionProvider
from ..scope import ProviderChoice


class DispatchProcessor:
    """Routes the attention of the modules on which it is set through a provider.

        pipe.transformer.set_attn_processor(DispatchProcessor("flash"))
        pipe.transformer.set_attn_processor(DispatchProcessor("flash", deterministic=True))

    It does not replace a module's processor, which still computes projections, norms and rotary embeddings. Only the
    attention call inside goes to the provider. One object may be set on any number of modules and models.

    A binding persists when diffusers itself changes processors (`fuse_qkv_projections` and back, IP-Adapters, KV
    caches). Setting any other processor ends it, and so does `set_default_attn_processor`. To restore the former
    processors exactly, use `set_attention_provider(model, None)`.

    Args:
        provider: a name of `AttentionProvider`. None: the provider of the active `attention_provider` scope, or
            `native` outside of any scope. A scope also overrides the provider that is named here.
        options: options of the provider's kernel; and `source="hub"`, as for `attention_provider`.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine; the message says how to install it.
        AttentionProviderError: the provider or an option is unknown.
    """

    def __init__(self, provider: str | AttentionProvider | None = None, **options: object) -> None:
        self.choice: ProviderChoice | None = None
        if provider is not None:
            self.choice = ProviderChoice.of(provider, **options)
            self.choice.check_usable()
        elif options:
            raise AttentionProviderError(
                f"DispatchProcessor({', '.join(f'{name}=...' for name in options)}): options belong to a provider, but "
                "no provider is given. Name one, as in DispatchProcessor('flash', deterministic=True), or give the "
                "options to the attention_provider scope."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AttentionProviderError(
            "a DispatchProcessor was assigned to `module.processor` and replaced the processor that it should use. Set "
            "it with model.set_attn_processor(...) or module.set_processor(...)."
        )

    def __repr__(self) -> str:
        return f"DispatchProcessor({self.choice or ''})"
