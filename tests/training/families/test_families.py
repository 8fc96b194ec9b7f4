"""Objectives, random draws, and the rules of families for sizes and captions. (`test_pipelines` compares what they do
with pipelines.)"""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from diffusers_attn.training.data.collate import collate
from diffusers_attn.training.errors import TrainingError
from diffusers_attn.training.families import family_of
from diffusers_attn.training.loss import EpsilonPrediction, RectifiedFlow, VPrediction, sample_u
from diffusers_attn.training.randomness import SampleRandomness

from ..pipelines import make

FAMILIES = ("wan", "cogvideox", "cogview4", "flux2")


@pytest.fixture(scope="module")
def made():
    """The families of some pipelines."""
    return {name: family_of(make(name), max_sequence_length=16) for name in FAMILIES}


def test_the_shift_of_wan_and_one_of_ones_own(made):
    u = torch.tensor([0.5])
    family = made["wan"]
    assert family.objective.level(u, 100).sigma.item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    other = family_of(family.pipeline, shift=5.0)
    assert other.objective.level(u, 100).sigma.item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
    with pytest.raises(TrainingError, match=r"shift=5\.0.*CogVideoX"):
        family_of(made["cogvideox"].pipeline, shift=5.0)


def test_the_shift_of_flux2_is_that_of_its_pipelines(made):
    """Flux 2 takes it from the number of tokens and of steps, here 50."""
    family = made["flux2"]
    scheduler = family.pipeline.scheduler
    scheduler.set_timesteps(sigmas=[0.5], mu=compute_empirical_mu(4096, 50))
    assert family.objective.level(torch.tensor([0.5]), 4096).sigma.item() == pytest.approx(scheduler.sigmas[0].item())


def test_the_shift_of_a_distilled_krea2_is_fixed():
    pipeline = make("krea2")
    pipeline.register_to_config(is_distilled=True)
    pipeline.scheduler.set_timesteps(sigmas=[0.5], mu=1.15)
    level = family_of(pipeline).objective.level(torch.tensor([0.5]), 4096)
    assert level.sigma.item() == pytest.approx(pipeline.scheduler.sigmas[0].item())


def test_captions_of_cogview4_are_padded_one_by_one(made):
    """As the pipeline does it for one prompt, whatever other captions there are; also those of one batch."""
    family = made["cogview4"]
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


@pytest.mark.parametrize("objective", [RectifiedFlow(lambda tokens: 3.0), VPrediction(torch.linspace(0.99, 0.01, 10))])
def test_a_loss_with_a_mask_is_the_weighted_mean_of_the_errors(objective):
    """In a plain loop in float64."""
    shape = (2, 3, 2, 4, 5)
    prediction, clean, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.rand(2, 1, 1, 4, 5, generator=torch.Generator().manual_seed(3))
    mask[0, ..., :2, :] = 0
    level = objective.level(torch.tensor([0.3, 0.8]), 1)
    sigma = level.sigma.double().tolist()
    for sample in range(2):
        weighted, weights = 0.0, 0.0
        for channel, frame, row, column in itertools.product(*map(range, shape[1:])):
            at = (sample, channel, frame, row, column)
            x, e = clean[at].double().item(), noise[at].double().item()
            alpha = (1 - sigma[sample] ** 2) ** 0.5
            target = alpha * e - sigma[sample] * x if isinstance(objective, VPrediction) else e - x
            weight = mask[sample, 0, 0, row, column].double().item()
            weighted += weight * (prediction[at].double().item() - target) ** 2
            weights += weight
        loss = objective.loss(prediction, clean, noise, level, mask)[sample].item()
        assert loss == pytest.approx(weighted / weights, rel=1e-5)
    ones = torch.ones(2, 1, 1, 4, 5)
    plain = objective.loss(prediction, clean, noise, level)
    torch.testing.assert_close(objective.loss(prediction, clean, noise, level, ones), plain)


def test_noise_is_weighted_by_its_ratio_to_the_signal():
    """min-SNR is `min(snr, gamma)` times the error of the clean sample, whatever the model predicts."""
    alphas = torch.tensor([0.99, 0.9, 0.3, 0.01], dtype=torch.float64)
    clean, noise, wrong = (torch.randn(4, 2, 1, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    u = torch.tensor([0.1, 0.3, 0.6, 0.9])
    snr = alphas / (1 - alphas)
    error = ((wrong - clean) ** 2).flatten(1).mean(1)
    for objective, weight in (
        (EpsilonPrediction(alphas), snr),
        (EpsilonPrediction(alphas, 5.0), snr.clamp(max=5)),
        (VPrediction(alphas), snr + 1),
        (VPrediction(alphas, 5.0), snr.clamp(max=5)),
    ):
        level = objective.level(u, 1)
        assert level.timestep.tolist() == [0, 1, 2, 3]
        noisy = objective.noisy(clean, noise, level)
        alpha, sigma = (each.sqrt().view(-1, 1, 1, 1, 1).float() for each in (alphas, 1 - alphas))
        noise_of_wrong = (noisy - alpha * wrong) / sigma
        v = alpha * noise_of_wrong - sigma * wrong
        prediction = v if isinstance(objective, VPrediction) else noise_of_wrong
        assert torch.allclose(objective.loss(prediction, clean, noise, level).double(), weight * error, rtol=1e-4)
    silent = EpsilonPrediction(torch.tensor([0.0]), 5.0)
    level = silent.level(torch.tensor([0.5]), 1)
    assert silent.loss(wrong[:1], clean[:1], noise[:1], level).isfinite().all()


def test_the_noise_levels_of_sdxl_are_those_of_its_sampler():
    pipeline = make("sdxl")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    pipeline.scheduler.set_timesteps(10)
    family = family_of(pipeline)
    for timestep, expected in zip(pipeline.scheduler.timesteps, pipeline.scheduler.sigmas):
        level = family.objective.level((timestep + 0.5) / 1000, 1)
        assert level.timestep.item() == timestep
        assert (level.sigma / (1 - level.sigma**2).sqrt()).item() == pytest.approx(expected.item(), rel=1e-4)


def test_dropped_captions_of_sdxl_are_zeros_as_its_empty_negative_prompt():
    family = family_of(make("sdxl"))
    found = family.encode_text(["", "a cat"])
    _, negative, _, pooled = family.pipeline.encode_prompt("a cat", do_classifier_free_guidance=True)
    assert found["prompt_embeds"][:1].equal(negative) and found["pooled_prompt_embeds"][:1].equal(pooled)
    assert found["prompt_embeds"][1].any()
    family.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert family.encode_text([""])["prompt_embeds"].any()


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
