"""diffusers' caches and guidance on a model that is split: as on one process, or refused."""

import contextlib
import importlib
import pkgutil

import diffusers.hooks
import pytest
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.hooks.diffusers_hooks import (
    first_block_cache,
    mag_cache,
    sea_cache,
    smoothed_energy_guidance,
)
from diffusers_attn.context_parallel.hooks.diffusers_hooks.rules import RULES
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from tests.zoo import CASES

from ...parallelize.test_enable import build, error, inputs, output

STEPS = 8
LOCAL = ContextParallelMesh(ContextParallelConfig(3), Group("none", 1, 3), ALONE)


def test_there_is_a_rule_for_every_hook_class_of_diffusers():
    modules = [
        importlib.import_module(f"diffusers.hooks.{each.name}")
        for each in pkgutil.iter_modules(diffusers.hooks.__path__)
    ]
    classes = {
        f"{each.__module__}.{each.__qualname__}"
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, ModelHook) and each is not ModelHook
    }
    assert set(RULES) == classes


def test_diffusers_has_the_private_names_that_are_replaced():
    """Where this fails, diffusers has renamed one: the file of `hooks/diffusers_hooks` that has it must follow."""
    from diffusers.hooks import first_block_cache as fbc
    from diffusers.hooks import mag_cache as mag
    from diffusers.hooks import sea_cache as sea

    named = {
        first_block_cache.DECIDE: fbc.FBCHeadBlockHook,
        "head_block_residual": fbc.FBCSharedBlockState(),
        mag_cache.CALIBRATE: mag.MagCacheBlockHook,
        "calibration_ratios": mag.MagCacheState(),
        "previous_residual": mag.MagCacheState(),
        sea_cache.DECIDE: sea.SeaCacheSharedState,
        smoothed_energy_guidance.BLUR: ModelHook,
    }
    assert [name for name, holder in named.items() if not hasattr(holder, name)] == []
    module = torch.nn.Linear(2, 2)
    assert registry(module)._module_ref is module and module._diffusers_hook is registry(module)


def walk(model, given):
    """What a model gives, step by step, as a pipeline calls it: each step begins where the one before ended."""
    outs = []
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    context = getattr(model, "cache_context", lambda *_, **__: contextlib.nullcontext())
    sample = given["hidden_states"]
    for step in range(STEPS):
        model.timestep = 1000 * (1 - step / STEPS)
        with torch.no_grad(), context("cond", step_index=step, sigma=1 - step / STEPS, num_inference_steps=STEPS):
            outs.append(output(model, given | {"hidden_states": sample}))
        sample = sample - outs[-1].reshape(sample.shape) * 0.01 * (1 + step % 3)
    return outs


def in_order(model, mesh, order, put_on, take_off):
    """The steps of a model with what `put_on` puts on it, over ranks where `order` has these."""
    for what in order:
        put_on() if what == "hooks" else enable_context_parallel(model, mesh=mesh, verbose=False)
    try:
        return walk(model, inputs_of(model))
    finally:
        for what in reversed(order):
            take_off() if what == "hooks" else disable_context_parallel(model)


def inputs_of(model):
    return inputs(next(name for name, case in CASES.items() if case.model_class == type(model).__name__))


class Threshold(float):
    """Keeps what it is compared with."""

    seen: list[float]

    def __lt__(self, change):  # change > threshold
        self.seen.append(change)
        return float(self) < change


def first_block(meshes, ring, ulysses, order):
    """When the last block ran, and the outputs' errors, at thresholds on both sides of what one process finds."""
    from diffusers import FirstBlockCacheConfig

    model = build("flux")
    mesh = meshes.square if ring * ulysses == 4 else (meshes.lines if ring > 1 else meshes.heads)[ring * ulysses]

    def steps(threshold, order):
        threshold, ran = Threshold(threshold), []
        threshold.seen = []
        last = model.single_transformer_blocks[-1].attn.register_forward_pre_hook(lambda *_: ran.append(model.timestep))
        config = FirstBlockCacheConfig(threshold=threshold)
        outs = in_order(model, mesh, order, lambda: model.enable_cache(config), model.disable_cache)
        last.remove()
        return outs, ran, threshold.seen

    _, _, changes = steps(0.0, ["hooks"])
    answers = []
    for threshold in (changes[0] * (1 - 1e-6), changes[0] * (1 + 1e-6)):
        expected, ran_alone, _ = steps(threshold, ["hooks"])
        outs, ran, _ = steps(threshold, order)
        answers.append((ran_alone, ran, max(error(a, b) for a, b in zip(outs, expected, strict=True))))
    return answers


@pytest.mark.parametrize("ring, ulysses, order", [(2, 1, ["hooks", "ranks"]), (2, 2, ["ranks", "hooks"])])
def test_first_block_cache_decides_as_one_process_does(pool, ring, ulysses, order):
    for answers in pool.run(ring * ulysses, first_block, ring=ring, ulysses=ulysses, order=order):
        assert answers[0][0] != answers[1][0]
        for alone, ran, worst in answers:
            assert alone == ran and worst < 1e-6


def magcache(model):
    from diffusers import MagCacheConfig

    model.enable_cache(MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.5))


def calibration(model):
    from diffusers import MagCacheConfig

    model.enable_cache(MagCacheConfig(num_inference_steps=STEPS + 1, calibrate=True))


def seacache(model):
    from diffusers import SeaCacheConfig

    model.enable_cache(SeaCacheConfig(threshold=0.3))


def taylorseer(model):
    from diffusers import TaylorSeerCacheConfig

    model.enable_cache(
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float64)
    )


def pyramid(model):
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: model.timestep
    )
    model.enable_cache(config)


def faster(model):
    from diffusers import FasterCacheConfig

    config = FasterCacheConfig(is_guidance_distilled=True, current_timestep_callback=lambda: model.timestep)
    model.enable_cache(config)


def skipped_scores(model):
    from diffusers import LayerSkipConfig
    from diffusers.hooks import apply_layer_skip

    config = LayerSkipConfig(
        indices=[1], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    apply_layer_skip(model, config)


def smoothed(model):
    from diffusers.hooks.smoothed_energy_guidance_utils import (
        SmoothedEnergyGuidanceConfig,
        _apply_smoothed_energy_guidance_hook,
    )

    _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig(indices=[0, 1]), 1.0, "seg")


WAYS = {
    "magcache": ("flux", magcache),
    "magcache calibration": ("wan", calibration),
    "seacache": ("wan", seacache),
    "taylorseer": ("flux", taylorseer),
    "pyramid": ("wan", pyramid),
    "faster": ("wan", faster),
    "skipped scores": ("cogview4", skipped_scores),
    "smoothed, one sequence": ("wan", smoothed),
    "smoothed, joined sequences": ("cogvideox", smoothed),
    "smoothed, rows": ("sana", smoothed),
    "smoothed, one of those that are joined": ("sd3", smoothed),
}


def hooked(model):
    return [each for each in model.modules() if "_diffusers_hook" in vars(each)]


def as_alone(meshes, way, order):
    name, put_on = WAYS[way]
    model = build(name)
    printed = []

    def take_off():
        hooks = [each._diffusers_hook.get_hook("mag_cache_block_hook") for each in hooked(model)]
        ratios = [each.state_manager._state_cache["cond"].calibration_ratios for each in hooks if each is not None]
        printed.append(ratios[-1] if ratios else [])
        if getattr(model, "is_cache_enabled", False):
            model.disable_cache()
        for each in hooked(model):
            for hook in ("layer_skip_hook", "seg"):
                each._diffusers_hook.remove_hook(hook, recurse=False)

    plain = in_order(model, None, [], None, None)
    expected = in_order(model, None, ["hooks"], lambda: put_on(model), take_off)
    found = in_order(model, meshes.lines[2], order, lambda: put_on(model), take_off)
    worst = max(error(a, b) for a, b in zip(found, expected, strict=True))
    return worst, max(error(a, b) for a, b in zip(plain, expected, strict=True)), printed


@pytest.mark.parametrize("way", WAYS)
def test_like_one_process(pool, way):
    order = ["hooks", "ranks"] if len(way) % 2 else ["ranks", "hooks"]
    for worst, effect, (alone, over_ranks) in pool.run(2, as_alone, way=way, order=order):
        assert worst < 2e-6 and (effect > 1e-3 or "calibration" in way)
        assert over_ranks == pytest.approx(alone, rel=1e-6) and len(alone) == STEPS * ("calibration" in way)


class Unknown(ModelHook):
    """As another library might write it."""

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


class Declared(Unknown):
    exact_over_ranks = True


def registry(module):
    return HookRegistry.check_if_exists_or_initialize(module)


def test_hooks_that_nobody_knows():
    model = CASES["flux"].build()
    block = model.transformer_blocks[1]
    registry(block).register_hook(Unknown(), "mine")
    named = r"'transformer_blocks.1' in FluxTransformer2DModel has a hook of diffusers, Unknown \('mine'\)"
    with pytest.raises(AttentionProviderError, match=named):
        apply_context_parallel(model, LOCAL)
    registry(block).remove_hook("mine")
    apply_context_parallel(model, LOCAL)
    with pytest.raises(AttentionProviderError, match=named):
        registry(block).register_hook(Unknown(), "mine")
    assert not registry(block).hooks
    registry(block).register_hook(Declared(), "mine")
    registry(torch.nn.Linear(2, 2)).register_hook(Unknown(), "mine")  # of no model that is split
    remove_context_parallel(model)
    registry(block).register_hook(Unknown(), "not any more")


def test_hooks_on_the_model_itself():
    """They run within the model's own plan entry, so they may see full tensors only if there is none."""
    from diffusers import TextKVCacheConfig
    from diffusers.hooks import apply_text_kv_cache

    flux, cogview = CASES["flux"].build(), CASES["cogview4"].build()
    for model in (flux, cogview):
        apply_context_parallel(model, LOCAL)
    registry(cogview).register_hook(Unknown(), "mine")
    with pytest.raises(AttentionProviderError, match=r"^FluxTransformer2DModel has a hook of diffusers, Unknown"):
        registry(flux).register_hook(Unknown(), "mine")
    with pytest.raises(AttentionProviderError, match="needs the full encoder_hidden_states"):
        apply_text_kv_cache(flux, TextKVCacheConfig())


def test_hooks_that_are_refused():
    from diffusers import LayerSkipConfig
    from diffusers.hooks import apply_layer_skip

    model = CASES["cogview4"].build()
    apply_context_parallel(model, LOCAL)
    config = LayerSkipConfig(indices=[0], fqn="transformer_blocks", dropout=0.5)
    with pytest.raises(AttentionProviderError, match=r"LayerSkipConfig\(dropout=0.5\).*dropout=1.0"):
        apply_layer_skip(model, config)


def test_hooks_are_given_back_what_they_did():
    from diffusers import FirstBlockCacheConfig

    model = CASES["flux"].build()
    model.enable_cache(FirstBlockCacheConfig())
    hook = registry(model.transformer_blocks[0]).get_hook("fbc_leader_block_hook")
    before = dict(vars(hook))
    apply_context_parallel(model, LOCAL)
    assert vars(hook) != before
    remove_context_parallel(model)
    assert vars(hook) == before
