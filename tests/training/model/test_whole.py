"""Training of a transformer's own weights: exact over split sequences and shards, resumed, and saved for diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CogView4Transformer2DModel
from safetensors.torch import load_file

from diffusers_attn.training import TrainConfig, Trainer, TrainingError

from ..runs import train, train_all, train_sharded
from ..worlds import World, forget_accelerate

STEPS = 3
WHOLE = {"steps": STEPS, "adapter": "none", "adapter_init": "default", "rank": 16, "batch_size": 2}


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def weights(path):
    return CogView4Transformer2DModel.from_pretrained(path).state_dict()


def test_all_weights_are_trained_saved_and_resumed(settings_of):
    settings = settings_of("cogview4", **WHOLE, checkpoint_every=1, checkpoints_kept=0)
    trainer = Trainer(TrainConfig(**settings))
    path = trainer.run()
    assert path == Path(settings["output_dir"]) / "transformer"
    found = weights(path)
    trained = {name: each for name, each in trainer.family.transformer.named_parameters()}
    assert all(found[name].equal(each) for name, each in trained.items()) and found.keys() >= trained.keys()
    before = weights(Path(settings["model"]) / "transformer")
    changed = [name for name in trained if not found[name].equal(before[name])]
    assert len(changed) > 0.9 * len(trained)
    card = (path.parent / "README.md").read_text()
    assert 'CogView4Transformer2DModel.from_pretrained("' in card and "A fine-tuned transformer" in card

    forget_accelerate()
    checkpoint = path.parent / "checkpoints" / "step-00000001"
    assert not (checkpoint / "transformer").exists()
    resumed = train(settings_of("cogview4", **WHOLE, resume=str(checkpoint)))
    assert all(each.equal(found[name]) for name, each in weights(resumed["path"]).items())


def test_a_step_is_that_of_a_plain_loop(settings_of):
    """The gradient that the optimizer gets is that of the loss, for every weight."""
    settings = settings_of("cogview4", **{**WHOLE, "steps": 1, "gradient_accumulation_steps": 1})
    settings |= {"lr_schedule": "constant", "learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 0.0}
    settings |= {"lr_warmup_steps": None, "caption_dropout": 0.0, "adam_eps": 1.0}
    trainer = Trainer(TrainConfig(**settings))
    found = weights(trainer.run())
    forget_accelerate()
    family, plain = trainer.family, CogView4Transformer2DModel.from_pretrained(f"{settings['model']}/transformer")
    loader = trainer.training.loader
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
    micros = iter(loader)
    batch = next(micros)
    micros.close()
    parts = family.parts(batch)  # each example by itself, since their texts have different lengths
    for part in parts:
        noise = part["drawn"]["noise"]
        clean = family.latents[""].sample(part, "", part["drawn"]["posterior"])
        level = family.objective.level(part["drawn"]["u"], family.tokens(clean.shape))
        text = {name: each for name, each in part.items() if name.startswith("prompt_")}
        noisy = {"": family.objective.noisy(clean, noise, level)}
        prediction = family.predict(plain, noisy, level.timestep, text)[""]
        (((prediction - (noise - clean)) ** 2).mean() / len(parts)).backward()
    for name, each in plain.named_parameters():
        # Adam's first step with an eps of 1.
        expected = each.detach() - 1e-3 * each.grad / (each.grad.abs() + 1)
        difference = (found[name] - expected).abs().max().item()
        assert difference < 1e-6, (name, difference)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cogview4", "flux"])
def test_in_bfloat16(settings_of, family):
    """Weights stay in float32; the forward computes under autocast."""
    settings = settings_of(family, **{**WHOLE, "steps": 2, "mixed_precision": "bf16"})
    trainer = Trainer(TrainConfig(**settings))
    path = trainer.run()
    assert {each.dtype for each in trainer.family.transformer.parameters()} == {torch.float32}
    assert {each.dtype for each in load_file(path / "diffusion_pytorch_model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
def test_over_split_sequences_and_shards(run_worlds, settings_of):
    """One process, two that share a sequence, and four with FSDP2, two by two."""
    one = settings_of("cogview4", **WHOLE)
    two = settings_of("cogview4", **WHOLE, cp_degree=2)
    [[alone], several] = run_worlds(World(1, train_all, {"several": [one]}), World(2, train_all, {"several": [two]}))
    four = settings_of("cogview4", **{**WHOLE, "batch_size": 1})
    arguments = {"settings": four, "block": "CogView4TransformerBlock", "cp_degree": 2}
    [sharded] = run_worlds(World(4, train_sharded, arguments))
    for of_rank in [*(each[0] for each in several), *sharded]:
        for ours, theirs in zip(of_rank["steps"], alone[0]["steps"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)
    expected = weights(alone[0]["path"])
    for settings in (two, four):
        found = weights(f"{settings['output_dir']}/transformer")
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, atol=1e-4, rtol=1e-4, msg=name)
    assert load_file(f"{four['output_dir']}/transformer/diffusion_pytorch_model.safetensors").keys() == expected.keys()


@pytest.mark.slow
def test_other_optimizers_over_ranks(run_worlds, settings_of):
    """8-bit state where ranks share a sequence; and Prodigy, whose step size depends on all weights, with shards."""
    for package in ("bitsandbytes", "prodigyopt"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[test]")
    of_8_bits = {**WHOLE, "optimizer": "adamw8bit", "learning_rate": 1e-3, "lr_warmup_steps": 0}
    prodigy = {**WHOLE, "optimizer": "prodigy", "learning_rate": None}
    one = [settings_of("cogview4", **each) for each in (of_8_bits, prodigy)]
    two = settings_of("cogview4", **of_8_bits, cp_degree=2)
    shards = settings_of("cogview4", **{**prodigy, "batch_size": 1})
    [[alone], several] = run_worlds(World(1, train_all, {"several": one}), World(2, train_all, {"several": [two]}))
    [sharded] = run_worlds(
        World(2, train_sharded, {"settings": shards, "block": "CogView4TransformerBlock", "cp_degree": 1})
    )
    for ours, theirs in ((several[0][0], alone[0]), (sharded[0], alone[1])):
        for mine, expected in zip(ours["steps"], theirs["steps"], strict=True):
            assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert mine["gradient norm"] == pytest.approx(expected["gradient norm"], rel=1e-5)
    for ours, theirs in ((several[0][0], alone[0]), (sharded[0], alone[1])):
        found, expected = weights(ours["path"]), weights(theirs["path"])
        assert any(each.numel() >= 4096 for each in expected.values())  # bitsandbytes keeps other states in float32
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8}, "--rank 8 has no effect with --adapter none"),
        ({"targets": ["to_q"]}, "--targets to_q has no effect with --adapter none"),
        ({"base_precision": "bf16"}, "--base_precision bf16 with --adapter none"),
        ({"offload": "blocks"}, "--offload blocks with --adapter none"),
        ({"init_adapter": "a"}, "--init_adapter a is accepted for --adapter lora"),
    ],
)
def test_what_needs_an_adapter(settings, message):
    with pytest.raises(TrainingError, match=message):
        TrainConfig(model="m", data="d", adapter="none", **settings)


def test_the_default_learning_rate_is_lower():
    assert TrainConfig(model="m", data="d", adapter="none").rate == 1e-5
    assert TrainConfig(model="m", data="d", adapter="none", optimizer="prodigy").rate == 1.0
    assert TrainConfig(model="m", data="d").rate == 1e-4
