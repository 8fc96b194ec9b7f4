"""The tiny models of `diffusers_attn.tiny_models`, and measures of how their outputs depend on attention."""

from diffusers_attn.tiny_models import BATCH, CASES, Case, Inputs, outputs

from .sensitivity import AttentionCall, attention_modules, attention_sensitivity, relative_change

__all__ = [
    "BATCH",
    "CASES",
    "AttentionCall",
    "Case",
    "Inputs",
    "attention_modules",
    "attention_sensitivity",
    "outputs",
    "relative_change",
]
