"""The node "Attention provider (diffusers_attn)"."""

from __future__ import annotations

from typing import Any

from diffusers_attn import AttentionProvider, attention_provider

from .attention import HOOK, AttentionOverride

PROVIDERS = [each.value for each in AttentionProvider]


class AttentionProviderNode:
    """Has a diffusion model compute its attention with a provider of diffusers_attn."""

    CATEGORY = "model_patches/attention"
    DESCRIPTION = "Computes the attention of a diffusion model with a kernel of diffusers_attn, chosen by name."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "model": ("MODEL",),
                "provider": (
                    PROVIDERS,
                    {"default": "auto", "tooltip": "The kernel. auto is the fastest exact one for each call."},
                ),
                "source": (
                    ["package", "hub"],
                    {
                        "default": "package",
                        "tooltip": "Where the kernel comes from: an installed package, or the Hugging Face Hub.",
                    },
                ),
                "refused_calls": (
                    ["error", "comfyui"],
                    {
                        "default": "error",
                        "tooltip": "Calls that the kernel cannot compute: an error, or ComfyUI's own attention.",
                    },
                ),
            }
        }

    def patch(self, model: Any, provider: str, source: str, refused_calls: str) -> tuple[Any]:
        """A copy of `model` with the provider. The weights are shared.

        Raises:
            ProviderUnavailableError: the provider cannot be used on this machine. The message says how to install it.
        """
        chosen: dict[str, Any] = {"source": source} if source == "hub" else {}
        attention_provider(provider, **chosen)  # raises if it cannot be used
        patched = model.clone()
        options = patched.model_options.get("transformer_options", {})
        earlier = options.get(HOOK)
        if isinstance(earlier, AttentionOverride):  # the same node twice: the later one counts
            earlier = earlier.earlier
        override = AttentionOverride(provider, chosen, refused_calls, earlier)
        patched.model_options["transformer_options"] = {**options, HOOK: override}
        return (patched,)


NODE_CLASS_MAPPINGS = {"DiffusersAttnProvider": AttentionProviderNode}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffusersAttnProvider": "Attention provider (diffusers_attn)"}
