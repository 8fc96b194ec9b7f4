"""A family gives the transformer what its pipeline gives it, at the noise levels of its sampler."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from diffusers_attn.nested import tensors_in
from diffusers_attn.training.data.collate import collate
from diffusers_attn.training.errors import TrainingError
from diffusers_attn.training.families import family_of
from diffusers_attn.training.loss import RectifiedFlow, VPrediction, sample_u
from diffusers_attn.training.randomness import SampleRandomness

from .runs import TINY_FLUX

SIZES = {
    "flux": {"height": 48, "width": 32},
    "wan": {"height": 48, "width": 32, "num_frames": 9},
    "cogvideox": {"height": 48, "width": 32, "num_frames": 9},
    "cogview4": {"height": 48, "width": 32},
    "qwen_image": {"height": 48, "width": 32},
    "z_image": {"height": 48, "width": 32},
    "flux2": {"height": 48, "width": 32},
}
UNGUIDED = {"flux": {"guidance_scale": 3.5}, "qwen_image": {"true_cfg_scale": 1.0}, "z_image": {"guidance_scale": 0.0}}
"""Arguments with which a pipeline calls its transformer once per step; others have a guidance_scale of 1."""
PER_THOUSAND = ("flux", "qwen_image", "flux2")
"""Families whose transformer takes timesteps from 0 to 1."""
FAMILIES = list(SIZES)


@pytest.fixture(scope="module")
def drawn():
    """For each pipeline: its family, and what the transformer was called with when the pipeline drew."""
    made = {}
    for name in FAMILIES:
        pipeline = _pipeline(name)
        guided = {"guidance": 3.5} if pipeline.transformer.config.get("guidance_embeds") else {}
        family = family_of(pipeline, max_sequence_length=16, **guided)
        calls = []
        names = list(inspect.signature(type(pipeline.transformer).forward).parameters)[1:]
        handle = pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, names=names, calls=calls: calls.append({**dict(zip(names, args)), **kwargs}),
            with_kwargs=True,
        )
        arguments = {**SIZES[name], "num_inference_steps": 3, "max_sequence_length": 16, "output_type": "latent"}
        guidance = UNGUIDED.get(name, {"guidance_scale": 1.0})
        pipeline(prompt="a cat", **arguments, **guidance, generator=torch.Generator().manual_seed(0))
        handle.remove()
        made[name] = family, calls
    return made


def _pipeline(name):
    if name == "flux":
        from diffusers import FluxPipeline

        return FluxPipeline.from_pretrained(TINY_FLUX, dtype=torch.float32)
    from ..tiny_pipelines import make

    return make(name)


def _latents(family, call):
    """The latents of a pipeline's call, as families have them."""
    if "x" in call:
        return torch.stack(call["x"])
    factor = family.pipeline.vae_scale_factor if family.kind == "image" else family.pipeline.vae_scale_factor_spatial
    factor *= 2 if type(family).__name__ == "Flux2" else 1  # whose latents are patches
    return family.prediction(call["hidden_states"], (0, 0, 0, 48 // factor, 32 // factor))


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_are_those_of_the_pipeline(drawn, name):
    family, calls = drawn[name]
    text = family.encode_text(["a cat"])
    call = {key: each for key, each in calls[1].items() if each is not None}
    noisy = _latents(family, call)
    timestep = (
        1000 - 1000 * call["t"] if name == "z_image" else call["timestep"] * (1000 if name in PER_THOUSAND else 1)
    )
    ours = {key: each for key, each in family.inputs(noisy, timestep, text).items() if each is not None}
    assert set(ours) == set(call) - {"return_dict", "attention_kwargs", "joint_attention_kwargs"}
    for key, each in ours.items():
        assert len(tensors_in(each)) == len(tensors_in(call[key])) and (tensors_in(each) or each == call[key]), key
        for one, other in zip(tensors_in(each), tensors_in(call[key])):
            assert torch.allclose(one.float(), other.float(), atol=1e-5), key
    again = [-each for each in call["x"]] if name == "z_image" else calls[0]["hidden_states"]
    assert family.prediction(again, noisy.shape).shape == noisy.shape


@pytest.mark.parametrize("name", ["flux", "cogview4", "qwen_image", "z_image"])
def test_noise_levels_are_those_of_the_sampler(drawn, name):
    family, _ = drawn[name]
    scheduler = family.pipeline.scheduler
    asked = {
        "cogview4": torch.linspace(1000, 1, 3).long() / 1000,
        "z_image": torch.tensor([1.0, 2 / 3, 1 / 3]),
    }.get(name, torch.linspace(1, 1 / 3, 3))
    level = family.objective.level(
        asked, family.tokens((1, 48 // family.size_multiple * 2, 32 // family.size_multiple * 2))
    )
    assert torch.allclose(level.sigma, scheduler.sigmas[:-1], atol=1e-6)
    assert torch.allclose(level.timestep, scheduler.timesteps, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "cogview4", "qwen_image", "z_image", "flux2"])
def test_predictions_are_velocities_from_image_to_noise(drawn, name):
    """A step of the sampler along the prediction leads to the pipeline's next latents. It holds sign and scale."""
    family, calls = drawn[name]
    now, after = ({key: each for key, each in call.items() if each is not None} for call in calls[:2])
    noisy, sigmas = _latents(family, now), family.pipeline.scheduler.sigmas
    timestep = family.pipeline.scheduler.timesteps[:1]
    with torch.no_grad():
        velocity = family.predict(family.pipeline.transformer, noisy, timestep, family.encode_text(["a cat"]))
    assert torch.allclose(noisy + (sigmas[1] - sigmas[0]) * velocity, _latents(family, after), atol=1e-4)


def test_the_shift_of_wan_and_one_of_ones_own(drawn):
    u = torch.tensor([0.5])
    family = drawn["wan"][0]
    assert family.objective.level(u, 100).sigma.item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    other = family_of(family.pipeline, shift=5.0)
    assert other.objective.level(u, 100).sigma.item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
    with pytest.raises(TrainingError, match=r"shift=5\.0.*CogVideoX"):
        family_of(drawn["cogvideox"][0].pipeline, shift=5.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_come_back_through_the_pipelines_way_of_decoding(drawn, name):
    family, _ = drawn[name]
    frames = 9 if family.kind == "video" else 1
    pixels = torch.rand(1, 3, frames, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded = family.encode(pixels)
    clean = family.clean(encoded, torch.zeros_like(encoded["latents_mean"]))
    assert clean.shape[2] == (frames - 1) // 4 + 1
    config = family.pipeline.vae.config
    if name == "flux2":
        bn = family.pipeline.vae.bn
        mean, std = (each.view(1, -1, 1, 1, 1) for each in (bn.running_mean, (bn.running_var + bn.eps).sqrt()))
        back = clean * std + mean
        assert back.shape[1:] == (64, 1, 3, 2)
    elif name in ("wan", "qwen_image"):
        mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (config.latents_mean, config.latents_std))
        back = clean * std + mean
    else:
        back = clean / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0) * (name != "cogview4")
    assert torch.allclose(back, encoded["latents_mean"], atol=1e-5)
    moved = family.clean(encoded, torch.ones_like(clean))
    assert name == "flux" or not torch.allclose(
        moved, clean, atol=1e-3
    )  # a posterior with a width (that VAE's has none)


@pytest.mark.parametrize("name", FAMILIES)
def test_size_rules(drawn, name):
    family, _ = drawn[name]
    assert family.size_multiple == {"flux": 2}.get(name, 16)
    assert family.frame_rule == ((4, 1) if family.kind == "video" else (1, 0))


def test_padding_of_captions_is_no_input(drawn):
    """A batch with a longer caption: Qwen-Image gets a mask, Z-Image each caption without its padding."""
    for name in ("qwen_image", "z_image"):
        family, calls = drawn[name]
        texts = [family.encode_text([each])["prompt_embeds"][0] for each in ("a", "number two")]
        batch = collate([{"prompt_embeds": each} for each in texts], frozenset({"prompt_embeds"}))
        noisy = _latents(family, {key: each for key, each in calls[1].items() if each is not None}).expand(
            2, -1, -1, -1, -1
        )
        with torch.no_grad():
            both = family.predict(family.pipeline.transformer, noisy, torch.tensor([500.0, 500.0]), batch)
            for i, text in enumerate(texts):
                alone = family.predict(
                    family.pipeline.transformer, noisy[:1], torch.tensor([500.0]), {"prompt_embeds": text[None]}
                )
                assert torch.allclose(both[i : i + 1], alone, atol=1e-4), name


def test_the_shift_of_flux2_is_that_of_its_pipelines(drawn):
    """Flux 2 takes it from the number of tokens and of steps, here 50."""
    family, _ = drawn["flux2"]
    scheduler = family.pipeline.scheduler
    scheduler.set_timesteps(sigmas=[0.5], mu=compute_empirical_mu(4096, 50))
    assert family.objective.level(torch.tensor([0.5]), 4096).sigma.item() == pytest.approx(scheduler.sigmas[0].item())


def test_captions_of_cogview4_are_padded_one_by_one(drawn):
    """As the pipeline does it for one prompt, whatever other captions there are; also those of one batch."""
    family, _ = drawn["cogview4"]
    captions = ["a", "number two"]
    texts = [family.encode_text([each])["prompt_embeds"] for each in captions]
    family.max_sequence_length, before = 64, family.max_sequence_length
    try:
        texts.append(family.encode_text(["a much longer caption than the others are"])["prompt_embeds"])
    finally:
        family.max_sequence_length = before
    assert [each.shape[1] for each in texts] == [16, 16, 48]
    for caption, ours in zip(captions, texts):
        theirs, _ = family.pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=16)
        assert torch.equal(ours, theirs)

    batch = {
        **collate([{"prompt_embeds": each[0]} for each in texts], frozenset({"prompt_embeds"})),
        "latents_mean": torch.arange(3.0)[:, None],
        "positions": [4, 5, 6],
        "drawn": {"noise": torch.arange(3.0)},
        "step": 7,
    }
    parts = family.parts(batch)
    assert all(part["prompt_embeds"].equal(text) for part, text in zip(parts, texts, strict=True))
    assert [(part["positions"], part["drawn"]["noise"].tolist(), part["step"]) for part in parts] == [
        ([4], [0.0], 7), ([5], [1.0], 7), ([6], [2.0], 7),
    ]  # fmt: skip


def test_v_prediction_is_the_weighted_error_of_the_clean_sample():
    alphas = torch.linspace(0.99, 0.01, 10)
    objective = VPrediction(alphas)
    clean, noise, wrong = (torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    level = objective.level(torch.tensor([0.05, 0.95]), 1)
    assert level.timestep.tolist() == [0, 9]
    noisy = objective.noisy(clean, noise, level)
    alpha = alphas[level.timestep].view(-1, 1, 1, 1, 1)
    predicted = alpha.sqrt() * noisy - (1 - alpha).sqrt() * wrong
    expected = ((predicted - clean) ** 2 / (1 - alpha)).flatten(1).mean(1)
    assert torch.allclose(objective.loss(wrong, clean, noise, level), expected, rtol=1e-4)


def test_rectified_flow():
    objective = RectifiedFlow(lambda tokens: 1.0)
    clean, noise = torch.zeros(2, 1, 1, 1, 1), torch.ones(2, 1, 1, 1, 1)
    level = objective.level(torch.tensor([0.25, 1.0]), 1)
    assert objective.noisy(clean, noise, level).flatten().tolist() == [0.25, 1.0]
    assert objective.loss(noise - clean, clean, noise, level).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_draws_belong_to_positions_not_to_processes(sampling):
    all_samples = SampleRandomness(0, 3, range(4))
    halves = [SampleRandomness(0, 3, range(2)), SampleRandomness(0, 3, range(2, 4))]
    u = sample_u(sampling, all_samples.generators("level"))
    assert u.equal(torch.cat([sample_u(sampling, half.generators("level")) for half in halves]))
    assert len(set(u.tolist())) == 4 and 0 <= u.min() and u.max() <= 1
    assert all_samples.normal("noise", [5]).equal(torch.cat([half.normal("noise", [5]) for half in halves]))
    assert not all_samples.normal("noise", [5]).equal(all_samples.normal("posterior", [5]))
    assert not all_samples.normal("noise", [5]).equal(SampleRandomness(0, 4, range(4)).normal("noise", [5]))
    with pytest.raises(TrainingError, match="timestep_sampling='often'"):
        sample_u("often", all_samples.generators("level"))


def test_a_model_that_is_not_known():
    class Unknown:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(TrainingError, match="class Linear. Training supports.*WanTransformer3DModel"):
        family_of(Unknown())
