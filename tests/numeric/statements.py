"""What a provider's capabilities say about a cell: served, or refused and why.

Reads the catalog as a user reads its table (docs/providers.md), apart from the code that decides calls. Where the two
disagree, one of them is wrong.
"""

from __future__ import annotations

import torch

from diffusers_attn.masks import MaskKind
from diffusers_attn.providers.catalog import SPECS
from diffusers_attn.providers.registry import provider_status

from .features import MASKS, Feature
from .forms import FORMS

NONE, ULYSSES = "none", "ulysses"


def dtype_of(provider: str, feature: Feature, device: str) -> torch.dtype:
    """The dtype of a call that does not name one: half precision on a GPU; on a CPU the widest that the provider has,
    so that rounding hides nothing."""
    if feature.dtype is not None:
        return feature.dtype
    if device == "cuda":
        return torch.bfloat16
    return (
        torch.float64 if provider == "auto" or torch.float64 in SPECS[provider].capabilities.dtypes else torch.float32
    )


def compiled_over_ranks(provider: str, feature: Feature) -> bool:
    """Whether a call is compiled over ranks on a CPU, where each takes seconds: with one provider, what differs in
    masks, causality, heads and lengths, which strategies handle themselves."""
    kept = ("mask", "is_causal", "heads", "kv_heads", "query_len", "key_len", "dropout_p")
    by_strategy = feature == Feature(**{name: getattr(feature, name) for name in kept})
    several = min(feature.query_len, feature.key_len) > 1
    return provider == "native" and by_strategy and several


def passes_of(provider: str, strategy: str, feature: Feature, device: str) -> tuple[str, ...]:
    """The passes that a feature has. Graphs are CUDA's; a capture over ranks is that of a whole model (tests/gpu)."""
    form = FORMS[feature.form]
    passes = form.passes if device == "cuda" or form.cpu_passes is None else form.cpu_passes
    absent = {
        "captured": device != "cuda" or strategy != NONE,
        "compiled": device == "cpu" and strategy != NONE and not compiled_over_ranks(provider, feature),
    }
    return tuple(each for each in passes if not absent.get(each))


def refusals(provider: str, strategy: str, feature: Feature, name: str, device: str, needs_grad: bool) -> list[str]:
    """Words of every error that the cell may end with; empty if it must be within its tolerance.

    Args:
        name: the pass.
        needs_grad: whether it computes gradients of query, key and value.
    """
    dtype = dtype_of(provider, feature, device)
    form = FORMS[feature.form]
    if form.refused:
        return [form.refused]
    words = [] if strategy == NONE else _over_ranks(feature, form.over_ranks, needs_grad)
    if form.only:
        return words + ["takes plain tensors"] * (provider not in form.only)
    if provider != "auto":
        return words + _own(provider, strategy, feature, dtype, name, device, needs_grad)
    if feature.options:
        return ["has no option"]
    exact = [each for each, spec in SPECS.items() if spec.capabilities.exact and provider_status(each).available]
    if any(not _own(each, strategy, feature, dtype, name, device, needs_grad) for each in exact):
        return words
    return [*words, "no attention provider usable here serves this call"]


def _over_ranks(feature: Feature, of_form: str, needs_grad: bool) -> list[str]:
    """What no provider serves where tokens are split over ranks."""
    words = [of_form] * bool(of_form)
    words += ["over several ranks only 0 is accepted"] * (feature.dropout_p > 0)
    words += ["over several ranks a torch.Tensor is accepted"] * (feature.mask_kind == MaskKind.BLOCK)
    return words + ["computes no gradients of masks"] * (needs_grad and needs_bias_gradient(feature))


def needs_bias_gradient(feature: Feature) -> bool:
    return bool(feature.mask) and MASKS[feature.mask].needs_grad


def _own(
    provider: str, strategy: str, feature: Feature, dtype: torch.dtype, name: str, device: str, needs_grad: bool
) -> list[str]:
    """What the capabilities of one provider exclude."""
    can = SPECS[provider].capabilities
    kind, largest = feature.mask_kind, max(feature.head_dim, feature.value_head_dim)
    if feature.is_causal and kind != MaskKind.NONE:  # merged into the mask, which then has rows
        kind = MaskKind.DENSE if kind in (MaskKind.KEY, MaskKind.DENSE) else MaskKind.BIAS
    if feature.form == "lower right":
        kind = MaskKind.DENSE
    causal = feature.is_causal or feature.form == "upper left"
    unknown = [option for option, _ in feature.options if option not in SPECS[provider].options]
    parts = strategy not in (NONE, ULYSSES)
    counts = "window_size" in dict(feature.options) and not unknown
    checks = {
        "has no option": bool(unknown),
        "it accepts ": dtype not in can.dtypes or kind not in can.masks,
        "its head_dim is at most": can.max_head_dim is not None and largest > can.max_head_dim,
        "its value must have the head_dim": feature.head_dim != feature.value_head_dim and not can.value_head_dim,
        "it has no causal kernel": causal and can.causal == "none",
        "it has no dropout": feature.dropout_p > 0 and not can.dropout,
        "it has no backward": needs_grad and (not can.backward or device in can.without_backward_on),
        "it computes no gradient of attn_mask": needs_grad and needs_bias_gradient(feature) and not can.bias_gradient,
        "torch.func": feature.form in ("vmap", "func.grad", "jvp") and not can.every_derivative,
        "it returns no log-sum-exp": parts and not can.lse,
        "it has no backward for a part of the keys": parts and needs_grad and not can.backward_of_parts,
        "counts positions": parts and counts,
        "in a CUDA graph": name == "captured" and not can.cuda_graph,
    }
    return [words for words, excluded in checks.items() if excluded]
