"""A run that trains both transformers of Wan 2.2 A14B, by the noise level of each step."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from diffusers_attn.training import TrainConfig, TrainingError
from diffusers_attn.training.data.store import read_tensors
from diffusers_attn.training.loop.trainer import Trainer
from diffusers_attn.training.loss import sample_u
from diffusers_attn.training.randomness import generator

from ..plain import RUN as PLAIN
from ..plain import cached_sample, plain_loop
from ..runs import train, train_all, train_sharded
from ..worlds import World, forget_accelerate

STEPS = 5
RUN = {
    **PLAIN, "expert": "both", "steps": STEPS, "timestep_sampling": "uniform", "checkpoint_every": 2,
    "checkpoints_kept": 0,
}  # fmt: skip
BOUNDARY = 875
"""The timestep from which the pipeline uses the transformer for high noise levels."""


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def run(settings_of):
    """A run: its trainer, its steps, and the adapters of both experts."""
    settings = settings_of(
        "wan_a14b", **RUN, evaluation_every=STEPS, validation_prompts=["a cat"], validation_steps=4, ema_decay=0.9
    )
    steps = []
    trainer = Trainer(TrainConfig(**settings), on_step=lambda step, numbers: steps.append({"step": step, **numbers}))
    path = trainer.run()
    forget_accelerate()
    return settings, trainer, steps, path


def adapters(folder):
    return {each: load_file(Path(folder) / each / "pytorch_lora_weights.safetensors") for each in ("high", "low")}


def expected(trainer):
    """The same run with diffusers. Returns losses, weights and experts."""
    pipeline = WanPipeline.from_pretrained(trainer.config.model, dtype=torch.float32)
    models = {"high": pipeline.transformer, "low": pipeline.transformer_2}
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1, 1)
        for each in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )

    def chosen(step):
        u = sample_u("uniform", [generator(trainer.config.seed, "train", "expert", step)])
        return "high" if 1000 * 3 * u / (1 + 2 * u) >= BOUNDARY else "low"

    def loss(expert, examples, random):
        texts = [read_tensors(trainer.prepared.text[each.example.caption])["prompt_embeds"] for each in examples]
        clean = (cached_sample(examples, random) - mean) / std
        noise = random.normal("noise", clean.shape[1:])
        low, high = (0.7, 1.0) if expert == "high" else (0.0, 0.7)
        u = sample_u("uniform", random.generators("level"), levels=(low, high))
        sigma = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)
        assert (1000 * sigma >= BOUNDARY - 1e-3).all() if expert == "high" else (1000 * sigma <= BOUNDARY).all()
        predicted = models[expert](
            (1 - sigma) * clean + sigma * noise, 1000 * sigma.flatten(), torch.stack(texts), return_dict=False
        )[0]
        return (predicted - (noise - clean)).square().mean()

    losses, weights = plain_loop(trainer, models, loss, chosen)
    return losses, weights, [chosen(step) for step in range(trainer.config.steps)]


def test_it_is_a_plain_loop_with_an_optimizer_for_each(run):
    settings, trainer, steps, path = run
    losses, weights, experts = expected(trainer)
    assert set(experts) == {"high", "low"}
    assert [each["loss"] for each in steps] == pytest.approx(losses, rel=1e-6)
    output = Path(settings["output_dir"])
    assert path == output / "high" / "pytorch_lora_weights.safetensors"
    for expert, found in adapters(output / "not_averaged").items():
        assert {f"transformer.{name}" for name in weights[expert]} == set(found)
        for name, each in weights[expert].items():
            assert torch.allclose(found[f"transformer.{name}"], each, atol=1e-6), (expert, name)
    card = (output / "README.md").read_text()
    assert 'subfolder="low", adapter_name="low", load_into_transformer_2=True)' in card
    assert len(list((output / "samples" / "last").glob("*.mp4"))) == 1


def test_the_pipeline_loads_both_and_uses_each_at_its_levels(run):
    settings, trainer, *_ = run
    pipeline = WanPipeline.from_pretrained(settings["model"], dtype=torch.float32)
    pipeline.load_lora_weights(settings["output_dir"], subfolder="high", adapter_name="high")
    pipeline.load_lora_weights(
        settings["output_dir"], subfolder="low", adapter_name="low", load_into_transformer_2=True
    )
    levels = trainer.family.levels
    for component, expert in {"transformer": "high", "transformer_2": "low"}.items():
        loaded = peft.get_peft_model_state_dict(getattr(pipeline, component), adapter_name=expert)
        saved = adapters(settings["output_dir"])[expert]
        assert loaded and all(each.equal(saved[f"transformer.{name}"]) for name, each in loaded.items())
        timesteps = trainer.family.objective.level(torch.tensor(levels[component]), 1).timestep.tolist()
        assert timesteps == pytest.approx([BOUNDARY, 1000] if expert == "high" else [0, BOUNDARY])


def test_a_resumed_run_goes_on_exactly(run, settings_of):
    settings, _, steps, _ = run
    again = settings_of("wan_a14b", **RUN, ema_decay=0.9)
    resumed = train({**again, "resume": f"{settings['output_dir']}/checkpoints/step-00000002"})
    assert resumed["steps"] == steps[2:]
    for expert, found in adapters(again["output_dir"]).items():
        expected = adapters(settings["output_dir"])[expert]
        assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


def same(ours, steps, output, settings):
    for mine, theirs in zip(ours["steps"], steps, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)
    for expert, found in adapters(output["output_dir"]).items():
        expected = adapters(Path(settings["output_dir"], "not_averaged"))[expert]
        assert found.keys() == expected.keys()
        assert all(found[name].allclose(expected[name], atol=1e-4) for name in found)


@pytest.mark.thorough
@pytest.mark.parametrize("offload", ["blocks", "disk"])
def test_offloaded_blocks_train_alike(run, settings_of, offload):
    output = settings_of("wan_a14b", **RUN, offload=offload)
    assert train(output)["steps"] == run[2]
    assert not list(Path(output["cache_dir"]).glob("offload-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        {"batch_size": 1},
        pytest.param({"cp_degree": 2}, marks=pytest.mark.thorough),
        pytest.param({"batch_size": 1, "cp_degree": 2, "size": 4}, marks=pytest.mark.thorough),
    ],
    ids=["dp", "cp", "dp x cp"],
)
def test_several_processes_train_alike(run, run_worlds, settings_of, split):
    settings, _, steps, _ = run
    split = dict(split)
    size = split.pop("size", 2)
    more = {"evaluation_every": 2, "validation_prompts": ["a cat"], "validation_steps": 4}
    output = settings_of("wan_a14b", **{**RUN, **split, **more})
    [ranks] = run_worlds(World(size, train_all, {"several": [output]}))
    for [ours] in ranks:
        same(ours, steps, output, settings)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("cp_degree", [1, 2])
def test_sharded_weights_train_alike(run, run_worlds, settings_of, cp_degree):
    settings, _, steps, _ = run
    more = {"evaluation_every": 2, "validation_prompts": ["a cat"], "validation_steps": 4}
    output = settings_of("wan_a14b", **{**RUN, **more, "batch_size": cp_degree})
    arguments = {"settings": output, "block": "WanTransformerBlock", "cp_degree": cp_degree}
    [ranks] = run_worlds(World(2, train_sharded, arguments))
    for ours in ranks:
        same(ours, steps, output, settings)


def test_weights_for_one_of_them_are_refused():
    with pytest.raises(TrainingError, match="--transformer x with --expert both"):
        TrainConfig(model="m", data="d", transformer="x", expert="both")
