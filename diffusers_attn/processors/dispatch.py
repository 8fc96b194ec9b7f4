"""The processor that users set."""

from __future__ import annotations

from typing import Any

from ..errors import AttentionProviderError
from ..providers.catalog import AttentionProvider
from ..scope import ProviderChoice


class DispatchProcessor:
    """Sends the attention of the modules it is set on through a provider.

        pipe.transformer.set_attn_processor(DispatchProcessor("flash"))
        pipe.transformer.set_attn_processor(DispatchProcessor("flash", deterministic=True))

    It is a request, not a processor: each module keeps the processor that it has, which goes on with what its model
    needs around attention (projections, norms, rotary embeddings); only the attention call inside goes elsewhere. So
    one object may be set on any number of modules and models.

    A binding stays through what diffusers itself does to processors (`fuse_qkv_projections` and back, IP-Adapters,
    KV caches). Setting any other processor ends it, as does `set_default_attn_processor`; to get back exactly what was
    there, use `set_attention_provider(model, None)`.

    Args:
        provider: a name of `AttentionProvider`. Without one, calls go where the `attention_provider` scope says, or
            else to `native`; a scope also overrides the provider that is named here.
        options: options of the provider's kernel.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine; says how to install it.
        AttentionProviderError: no such provider or option.
    """

    def __init__(self, provider: str | AttentionProvider | None = None, **options: object) -> None:
        self.choice: ProviderChoice | None = None
        if provider is not None:
            self.choice = ProviderChoice.of(provider, **options)
            self.choice.check_usable()
        elif options:
            raise AttentionProviderError(
                f"DispatchProcessor({', '.join(f'{name}=...' for name in options)}): options belong to a provider, and "
                "none is named. Name one, as in DispatchProcessor('flash', deterministic=True), or give the options to "
                "the attention_provider scope."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AttentionProviderError(
            "a DispatchProcessor was assigned to `module.processor`, where it took the place of the processor that it "
            "should work through. Set it with model.set_attn_processor(...) or module.set_processor(...)."
        )

    def __repr__(self) -> str:
        return f"DispatchProcessor({self.choice or ''})"
