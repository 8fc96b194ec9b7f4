"""diffusers' own hooks within a model that is split: which of them are right as they are, made right, or refused.

diffusers' caches, guiders and offloading put hooks around the forward of blocks and layers (`HookRegistry`). Such a
hook runs within the hooks of a plan, in whichever order the two were set: it is given this rank's part of the tokens.
That is no matter where it computes every token by itself. It is one where it takes a mean over the tokens, sees a
picture in them, or decides by them whether to compute at all.

`RULES` has a line for every hook class of diffusers. A class that is not in it is refused, when context parallelism is
enabled and when the hook is registered later. This is the only file that touches diffusers' hooks.
"""

from __future__ import annotations

import functools
import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...cp_plans.plan import CPAttention, Plan, entries
from ...errors import AttentionProviderError
from ..comm.group import Group
from ..sequences import sharding
from ..sequences.find_by_length import check_lengths_suffice, find_by_length, joins
from ..sequences.tracker import SequenceTracker
from .find_argument import argument_of, as_param
from .plan_words import ARGUMENTS, find, words_in
from .submodules import original

_DECLARED = "exact_over_ranks"
"""the attribute by which a hook class that is not diffusers' says that it is right on a part of the tokens."""


class _Rule(NamedTuple):
    """What is known of a hook class."""

    adapt: Callable[[Any, SequenceTracker], None] | None = None
    """changes a hook so that it is right over ranks; None: it is right as it is."""
    refuse: Callable[[Any], str | None] | None = None
    """says why a hook is refused, and what to do instead; None where it is not."""
    needs: tuple[str, ...] = ()
    """where it is on the model itself: the arguments that it must be given whole."""
    needs_output: bool = False
    """where it is on the model itself: whether it must see the whole output."""


class Split(NamedTuple):
    """What a plan does to the model itself, "", which hooks on the model itself then see."""

    arguments: frozenset[str]
    """the model's own arguments that are split before its forward."""
    output: bool
    """whether the model's own output is gathered, or split, behind its forward."""

    @staticmethod
    def of(model: nn.Module, plan: Plan) -> Split:
        arguments: set[str] = set()
        output = False
        for path, spec in entries(plan):
            if path or isinstance(spec, CPAttention):
                continue
            if not isinstance(spec, Mapping):
                output = True
                continue
            for key, nested in spec.items():
                param = as_param(key)
                words = [(find(ARGUMENTS, word), word) for word in words_in(nested)]
                changing = [(kind, word) for kind, word in words if kind is not None and kind.changes_value(word)]
                if any(kind.is_for_output(word) for kind, word in changing):
                    output = True
                elif changing:
                    name, index = argument_of(model, path, param)
                    arguments.add(name or f"argument {index}")
        return Split(frozenset(arguments), output)


class _Watched(NamedTuple):
    split: Split
    tracker: SequenceTracker


_models: weakref.WeakKeyDictionary[nn.Module, _Watched] = weakref.WeakKeyDictionary()
"""the models that are split now."""


def watch(model: nn.Module, plan: Plan, tracker: SequenceTracker) -> None:
    """Makes the hooks that `model` has right over ranks, and from now on those that are registered within it.

    Raises:
        AttentionProviderError: it has one that is refused. Then nothing has changed.
    """
    check(model, plan)
    _install()
    _models[model] = _Watched(Split.of(model, plan), tracker)
    _standing.pop(model, None)
    for _, _, hook in _hooks_of(model):
        _adapt(hook, tracker)


def unwatch(model: nn.Module) -> None:
    """Gives the hooks of `model` back what they did before."""
    _standing.pop(model, None)
    if _models.pop(model, None) is not None:
        for _, _, hook in _hooks_of(model):
            _restore(hook)


def check(model: nn.Module, plan: Plan) -> None:
    """Raises AttentionProviderError where `model` has a hook that is refused under this plan."""
    split = Split.of(model, plan)
    for path, name, hook in _hooks_of(model):
        _check(model, split, path, name, hook)


def _hooks_of(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Paths of modules, and the names and hooks that are registered there."""
    for path, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for name, hook in list(registry.hooks.items()) if registry is not None else ():
            yield path, name, hook


def _class_name(hook: Any) -> str:
    return f"{type(hook).__module__}.{type(hook).__qualname__}"


_standing: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def standing(model: nn.Module) -> str:
    """Which hooks `model` has, in words that are the same on ranks that have the same; "" for none. What puts hooks on
    a model may choose its blocks in an order that differs between processes, as diffusers' fqn="auto" does."""
    if model not in _standing:
        found = sorted(f"{type(hook).__name__} ('{name}') at '{path}'" for path, name, hook in _hooks_of(model))
        digest = hashlib.blake2b("\n".join(found).encode(), digest_size=4).hexdigest()
        _standing[model] = f"{len(found)}, of which the first is {found[0]} (all: {digest})" if found else ""
    return _standing[model]


def check_in_graph(model: nn.Module) -> None:
    """Raises AttentionProviderError where `model`, whose whole forward is compiled, has a hook that knows inputs by
    their address: a graph gives it new copies in every forward."""
    registry = vars(model).get("_diffusers_hook")
    for name, hook in registry.hooks.items() if registry is not None else ():
        if type(hook).__name__ == "TextKVCacheTransformerHook":
            raise AttentionProviderError(
                f"{type(model).__name__} has a hook of diffusers, {type(hook).__name__} ('{name}'), which knows a "
                "prompt by its address, and is compiled as a whole, where inputs that ranks agree on have a new one in "
                "every forward. Compile its blocks instead (apply_compile(model)), or set inputs='trust'."
            )


def _check(model: nn.Module, split: Split, path: str, name: str, hook: Any) -> None:
    rule = RULES.get(_class_name(hook))
    within = f"'{path}' in {type(model).__name__}" if path else type(model).__name__
    has = f"{within} has a hook of diffusers, {type(hook).__name__} ('{name}')"
    if rule is None:
        if getattr(type(hook), _DECLARED, False) or (not path and not split.arguments and not split.output):
            return
        raise AttentionProviderError(
            f"{has}, which is not known to be right where a model is split between ranks. It is given this rank's part "
            f"of the tokens. Take it off (module._diffusers_hook.remove_hook('{name}')), or disable context "
            "parallelism. If it computes every token by itself and decides the same on all ranks, say so in its class: "
            f"{_DECLARED} = True."
        )
    reason = None if rule.refuse is None else rule.refuse(hook)
    if reason is not None:
        raise AttentionProviderError(f"{has}, which cannot run where a model is split between ranks: {reason}")
    needed = [each for each in rule.needs if each in split.arguments]
    if not path and (needed or (rule.needs_output and split.output)):
        raise AttentionProviderError(
            f"{has}, which needs the whole of {', '.join(needed) or 'the output'}, and the plan gives it this rank's "
            'part: it splits or gathers that of the model itself, "". Split and gather it within the model instead, or '
            "take the hook off (model.disable_cache())."
        )


def _adapt(hook: Any, tracker: SequenceTracker) -> None:
    rule = RULES.get(_class_name(hook))
    if rule is not None and rule.adapt is not None:
        rule.adapt(hook, tracker)


def _restore(hook: Any) -> None:
    for holder, name, before in vars(hook).pop(_REPLACED, ()):
        if before is None:
            vars(holder).pop(name, None)
        else:
            setattr(holder, name, before)


_REPLACED = "_replaced_over_ranks"


def _replace(hook: Any, holder: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts `function` in the place of an attribute, for `_restore` to put back.

    Raises:
        AttentionProviderError: there is none, since diffusers has changed.
    """
    if not hasattr(holder, name):
        raise AttentionProviderError(
            f"{_class_name(hook)} of this version of diffusers has no {name}, by which it is made right where a model "
            "is split between ranks. Install the version of diffusers that this library was tested with."
        )
    notes = vars(hook).setdefault(_REPLACED, [])
    notes.append((holder, name, vars(holder).get(name)))
    setattr(holder, name, function)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks that are registered later.


@functools.cache  # once
def _install() -> None:
    """Has diffusers' registry ask about every hook that is registered within a model that is split."""
    from diffusers.hooks.hooks import HookRegistry

    upstream = HookRegistry.register_hook

    @functools.wraps(upstream)
    def register_hook(self: Any, hook: Any, name: str) -> None:
        tracker = None
        for model, watched in list(_models.items()):
            path = next((path for path, part in model.named_modules() if part is original(self._module_ref)), None)
            if path is not None:
                _check(model, watched.split, path, name, hook)
                tracker = watched.tracker
        upstream(self, hook, name)
        if tracker is not None:
            _adapt(hook, tracker)
            _standing.clear()

    upstream_remove = HookRegistry.remove_hook

    @functools.wraps(upstream_remove)
    def remove_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream_remove(self, *args, **kwargs)
        _standing.clear()

    HookRegistry.register_hook = register_hook  # type: ignore[method-assign]
    HookRegistry.remove_hook = remove_hook  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------------------------
# Decisions and means that are those of the whole sequence.


def _summed(numbers: Tensor, tracker: SequenceTracker) -> Tensor:
    """Their sums over the ranks."""
    for group in (tracker.mesh.ring, tracker.mesh.ulysses):
        numbers = _all_reduced(numbers, group)
    return numbers


def _all_reduced(numbers: Tensor, group: Group) -> Tensor:
    if group.size == 1:
        return numbers
    reduced = torch.ops._c10d_functional.all_reduce(numbers, "sum", group.name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def _own_tokens(tensor: Tensor, tracker: SequenceTracker, dim: int) -> Tensor | None:
    """`tensor` without tokens that other ranks have as well; None where lengths do not tell which these are."""
    placed = [tracker.kept((name,)) for name in tracker.lengths]
    if not any(placed):
        return tensor
    every = joins(tuple(tracker.lengths))
    kept = {tracker.kept(names) for names in every if tracker.local_length(names) == tensor.shape[dim]}
    if len(kept) != 1:
        return None
    (one,) = kept
    return tensor if one is None else one.take_out(tensor, dim)


def _tokens_of(tensor: Tensor) -> int:
    """The dimension of the tokens in what blocks pass on: `[batch, tokens, channels]`, or without a batch."""
    return max(tensor.ndim - 2, 0)


def _first_block_cache(hook: Any, tracker: SequenceTracker) -> None:
    """Has all ranks decide by the residual of the whole sequence, as one process does."""
    _replace(hook, hook, "_should_compute_remaining_blocks", functools.partial(_first_block_changed, hook, tracker))


@torch.compiler.disable
def _first_block_changed(hook: Any, tracker: SequenceTracker, residual: Tensor) -> bool:
    before = hook.state_manager.get_state().head_block_residual
    same_shape = before is not None and before.shape == residual.shape
    own: Tensor | None = None
    own_before: Tensor | None = None
    if same_shape:
        own, own_before = (_own_tokens(each, tracker, _tokens_of(residual)) for each in (residual, before))
    usable = own is not None
    numbers = residual.new_zeros(5, dtype=torch.float64)
    if own is not None and own_before is not None:
        numbers[0] = (own - own_before).abs().sum(dtype=torch.float64)
        numbers[1] = own_before.abs().sum(dtype=torch.float64)
    numbers[2:] += torch.tensor([0 if own is None else own.numel(), before is not None, usable], device=numbers.device)
    change, size, count, kept, able = _summed(numbers, tracker).tolist()
    if kept == 0:
        return True
    if kept < tracker.mesh.size or able < kept:
        raise AttentionProviderError(
            "FirstBlockCache compares the first block's residual with that of the forward before, and over the ranks "
            f"{int(kept)} of {tracker.mesh.size} have kept one, of which {int(able)} can be compared with this one. "
            "Begin anew on all ranks when the size changes: model._reset_stateful_cache()."
        )
    # Rounded as one process rounds its means.
    means = torch.tensor([change, size], dtype=torch.float64) / count
    change_mean, size_mean = means.to(residual.dtype)
    return (change_mean / size_mean).item() > hook.threshold


def _mag_cache(hook: Any, tracker: SequenceTracker) -> None:
    """Has calibration print ratios of the whole sequence. (What is decided is decided by the number of the step.)"""
    _replace(hook, hook, "_perform_calibration_step", functools.partial(_calibrated, hook, tracker))


@torch.compiler.disable
def _calibrated(hook: Any, tracker: SequenceTracker, state: Any, residual: Tensor) -> None:
    ratio = 1.0
    if state.previous_residual is not None:
        now, before = (torch.linalg.norm(each.float(), dim=-1) for each in (residual, state.previous_residual))
        ratios = _own_tokens(now / (before + 1e-8), tracker, _tokens_of(residual))
        numbers = residual.new_zeros(3, dtype=torch.float64)
        if ratios is not None:
            numbers[0] = ratios.sum(dtype=torch.float64)
            numbers[1:] += torch.tensor([ratios.numel(), 1], device=numbers.device)
        total, count, able = _summed(numbers, tracker).tolist()
        if able < tracker.mesh.size:
            raise AttentionProviderError(
                "MagCache cannot be calibrated here: the lengths of this forward's sequences do not tell which tokens "
                f"are this rank's own ({tracker.describe()}). Calibrate it on one device."
            )
        ratio = total / count if count else math.nan
    state.calibration_ratios.append(ratio)


def _sea_cache(hook: Any, tracker: SequenceTracker) -> None:
    """Has all ranks take the first rank's decision. They decide by latents that all of them have whole; and where
    devices round differently, they would part."""
    shared = hook.shared_state
    if "resolve_gate" not in vars(shared):
        _replace(hook, shared, "resolve_gate", functools.partial(_gate_of_first_rank, shared, tracker))


def _gate_of_first_rank(
    shared: Any, tracker: SequenceTracker, state: Any, metadata: Any, indicator: Any, config: Any
) -> bool:
    if state.gate_key != (metadata.step_index, metadata.sigma):
        decided = type(shared).resolve_gate(shared, state, metadata, indicator, config)
        device = indicator[0].device if indicator else tracker.mesh.device_type
        numbers = torch.zeros(2, dtype=torch.float64, device=device)
        if tracker.mesh.rank == 0:
            numbers += torch.tensor([decided, state.accumulated_distance], device=device)
        decided, distance = _summed(numbers, tracker).tolist()
        state.gate_should_compute, state.accumulated_distance = bool(decided), distance
    return bool(state.gate_should_compute)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens as a picture.


def _smoothed_energy_guidance(hook: Any, tracker: SequenceTracker) -> None:
    """Has queries gathered before they are blurred as a picture, and takes this rank's part again."""
    _replace(hook, hook.fn_ref, "post_forward", functools.partial(_blurred, hook, tracker))


def _blurred(hook: Any, tracker: SequenceTracker, module: nn.Module, queries: Tensor) -> Any:
    """`queries`: `[batch, seq, channels]`, of a module's projection."""
    if not tracker.is_split or (tracker.role is not None and not tracker.role.query):
        return hook.post_forward(module, queries)
    shards, group = _shards_of_queries(queries.shape[1], tracker)
    queries = queries.unflatten(1, (-1, group))
    whole = sharding.gather(queries, shards, 1, tracker.mesh).flatten(1, 2).contiguous()
    whole = hook.post_forward(module, whole).unflatten(1, (-1, group))
    return sharding.take(whole, shards.spans[tracker.mesh.rank], 1).flatten(1, 2).contiguous()


def _shards_of_queries(length: int, tracker: SequenceTracker) -> tuple[sharding.Shards, int]:
    """What a projection of so many tokens holds, some of the sequences whose queries its attention module has; and how
    many tokens each entry of the sequence is.

    Raises:
        AttentionProviderError: lengths do not tell.
    """
    what = "the queries that SmoothedEnergyGuidance blurs"
    check_lengths_suffice(tracker, what)
    names = tuple(tracker.lengths) if tracker.role is None else tracker.present(tracker.role.query)
    shards = find_by_length(tracker, length, joins(names), what)
    if shards is not None:
        return shards, 1
    seen = tracker.local_length(names)
    if len(names) == 1 and seen and length % seen == 0:
        return tracker.shards(names), length // seen
    raise AttentionProviderError(
        f"{what}, {length} tokens on rank {tracker.mesh.rank}, are none of the sequences of its attention "
        f"({tracker.describe()}). Leave SmoothedEnergyGuidance out, or run on one device."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Refused.


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


_EXACT = _Rule()

RULES: dict[str, _Rule] = {
    f"diffusers.hooks.{name}": rule
    for name, rule in {
        "context_parallel.ContextParallelGatherHook": _Rule(refuse=_split_twice),
        "context_parallel.ContextParallelSplitHook": _Rule(refuse=_split_twice),
        # Takes halves of a batch, and spectra of the pictures that the model gives.
        "faster_cache.FasterCacheDenoiserHook": _Rule(needs_output=True),
        # Extrapolates token by token; decides by the step.
        "faster_cache.FasterCacheBlockHook": _EXACT,
        "first_block_cache.FBCHeadBlockHook": _Rule(_first_block_cache),
        # Residuals token by token; the head has decided.
        "first_block_cache.FBCBlockHook": _EXACT,
        # These three move weights, and inputs to the device.
        "group_offloading.GroupOffloadingHook": _EXACT,
        "group_offloading.LazyPrefetchGroupOffloadingHook": _EXACT,
        "group_offloading.LayerExecutionTrackerHook": _EXACT,
        # Skipped attention gives its input, or its values, token by token.
        "layer_skip.AttentionProcessorSkipHook": _Rule(refuse=_random_skip),
        "layer_skip.FeedForwardSkipHook": _Rule(refuse=_random_skip),
        "layer_skip.TransformerBlockSkipHook": _Rule(refuse=_random_skip),
        # These two cast weights.
        "layerwise_casting.LayerwiseCastingHook": _EXACT,
        "layerwise_casting.PeftInputAutocastDisableHook": _EXACT,
        # Residuals token by token; decides by the step.
        "mag_cache.MagCacheHeadHook": _EXACT,
        "mag_cache.MagCacheBlockHook": _Rule(_mag_cache),
        # The output of an earlier step; decides by the step.
        "pyramid_attention_broadcast.PyramidAttentionBroadcastHook": _EXACT,
        # Decides by the latents that the model is given.
        "sea_cache.SeaCacheRootHook": _Rule(_sea_cache, needs=("hidden_states", "vision_tokens")),
        "sea_cache.SeaCacheLeaderBlockHook": _Rule(_sea_cache),
        # These two compute residuals token by token.
        "sea_cache.SeaCacheBlockHook": _EXACT,
        "sea_cache.SeaCachePostNormHook": _EXACT,
        "smoothed_energy_guidance_utils.SmoothedEnergyGuidanceHook": _Rule(_smoothed_energy_guidance),
        # Extrapolates token by token; decides by the step.
        "taylorseer_cache.TaylorSeerCacheHook": _EXACT,
        # Knows a prompt by the address of its embeddings (`received.py`); keeps keys token by token.
        "text_kv_cache.TextKVCacheTransformerHook": _Rule(needs=("encoder_hidden_states",)),
        "text_kv_cache.TextKVCacheBlockHook": _EXACT,
    }.items()
}
