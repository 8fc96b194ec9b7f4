"""The table of diffusers' hook classes: exact over ranks, made exact, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...sequences.tracker import SequenceTracker
from . import first_block_cache, mag_cache, sea_cache, smoothed_energy_guidance


class Rule(NamedTuple):
    """How hooks of one class are treated. Without settings, the class is exact as it is."""

    adapt: Callable[[Any, SequenceTracker], None] | None = None
    """Makes a hook exact over ranks."""
    refuse: Callable[[Any], str | None] | None = None
    """Returns why a hook is refused and what to do instead; None if it is not refused."""
    needs: tuple[str, ...] = ()
    """Arguments that a hook on the model itself must receive in full."""
    needs_output: bool = False
    """Whether a hook on the model itself must receive the full output."""


def _random_skip(hook: Any) -> str | None:
    if hook.dropout in (0.0, 1.0):
        return None
    return (
        f"LayerSkipConfig(dropout={hook.dropout}) drops parts of a layer's output at random, and every rank would draw "
        "for its own tokens. dropout=1.0, which skips the layer, is accepted, and 0.0."
    )


def _split_twice(hook: Any) -> str:
    return (
        "diffusers' own enable_parallelism() has split the model already. Load it anew, and leave that call out; or "
        "leave out this library's context parallelism."
    )


_EXACT = Rule()

RULES: dict[str, Rule] = {
    f"diffusers.hooks.{name}": rule
    for name, rule in {
        "context_parallel.ContextParallelGatherHook": Rule(refuse=_split_twice),
        "context_parallel.ContextParallelSplitHook": Rule(refuse=_split_twice),
        # Takes halves of a batch, and spectra of the model's output.
        "faster_cache.FasterCacheDenoiserHook": Rule(needs_output=True),
        # Extrapolates each token separately. Decides by the step.
        "faster_cache.FasterCacheBlockHook": _EXACT,
        "first_block_cache.FBCHeadBlockHook": Rule(first_block_cache.adapt),
        # Adds residuals to each token separately. FBCHeadBlockHook decides.
        "first_block_cache.FBCBlockHook": _EXACT,
        # These three move weights, and inputs to the device.
        "group_offloading.GroupOffloadingHook": _EXACT,
        "group_offloading.LazyPrefetchGroupOffloadingHook": _EXACT,
        "group_offloading.LayerExecutionTrackerHook": _EXACT,
        # These three skip a layer: its output is its input, or its values, for each token separately.
        "layer_skip.AttentionProcessorSkipHook": Rule(refuse=_random_skip),
        "layer_skip.FeedForwardSkipHook": Rule(refuse=_random_skip),
        "layer_skip.TransformerBlockSkipHook": Rule(refuse=_random_skip),
        # These two cast weights.
        "layerwise_casting.LayerwiseCastingHook": _EXACT,
        "layerwise_casting.PeftInputAutocastDisableHook": _EXACT,
        # Adds residuals to each token separately. Decides by the step.
        "mag_cache.MagCacheHeadHook": _EXACT,
        "mag_cache.MagCacheBlockHook": Rule(mag_cache.adapt),
        # Returns the output of an earlier step. Decides by the step.
        "pyramid_attention_broadcast.PyramidAttentionBroadcastHook": _EXACT,
        # Decides by the latents that the model receives.
        "sea_cache.SeaCacheRootHook": Rule(sea_cache.adapt, needs=("hidden_states", "vision_tokens")),
        "sea_cache.SeaCacheLeaderBlockHook": Rule(sea_cache.adapt),
        # These two compute residuals for each token separately.
        "sea_cache.SeaCacheBlockHook": _EXACT,
        "sea_cache.SeaCachePostNormHook": _EXACT,
        "smoothed_energy_guidance_utils.SmoothedEnergyGuidanceHook": Rule(smoothed_energy_guidance.adapt),
        # Extrapolates each token separately. Decides by the step.
        "taylorseer_cache.TaylorSeerCacheHook": _EXACT,
        # Recognises a prompt by the address of its embeddings, see `check_in_graph`. Keeps the keys of each token.
        "text_kv_cache.TextKVCacheTransformerHook": Rule(needs=("encoder_hidden_states",)),
        "text_kv_cache.TextKVCacheBlockHook": _EXACT,
    }.items()
}
