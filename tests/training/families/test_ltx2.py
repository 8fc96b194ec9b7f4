"""Runs of LTX-2 with sound, and without: a loop of diffusers and PEFT, and what the pipeline draws."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from safetensors.torch import load_file
from transformers.audio_utils import mel_filter_bank

from diffusers_attn.training import TrainConfig, TrainingError
from diffusers_attn.training.data import TrainingDataError
from diffusers_attn.training.data.decode import read_video
from diffusers_attn.training.data.sound import Span, read_sound
from diffusers_attn.training.data.source import FileSource
from diffusers_attn.training.families import family_of
from diffusers_attn.training.loop.checks import check_with_model
from diffusers_attn.training.loop.trainer import Trainer
from diffusers_attn.training.loss import sample_u
from diffusers_attn.training.randomness import derived_seed

from ...marks import thorough_but
from ..pipelines import make
from ..plain import RUN, plain_loop
from ..runs import make_data, train, train_all, train_sharded
from ..worlds import World, forget_accelerate

FRAMES, SIZE, FPS = 9, 96, 24
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def spectrogram(sound):
    """The log-mel spectrogram of Lightricks' trainer (torchaudio's `MelSpectrogram`), [channels, frames, bins]."""
    bank = mel_filter_bank(513, 16, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    stft = torch.stft(sound, 1024, 160, window=torch.hann_window(1024), pad_mode="reflect", return_complex=True)
    return (stft.abs().transpose(1, 2) @ torch.from_numpy(bank).float()).clamp(min=1e-5).log()


def expected(trainer):
    """The same run with diffusers, from the files."""
    config = trainer.config
    pipeline = LTX2Pipeline.from_pretrained(config.model, dtype=torch.float32)
    vae, audio_vae, transformer = pipeline.vae, pipeline.audio_vae, pipeline.transformer
    alone = config.audio_weight == 0

    @torch.no_grad()
    def encoded(example):
        path, first = Path(config.data, example.name), (example.frames - FRAMES) // 2
        frames = torch.stack(list(read_video(FileSource(path), range(first, first + FRAMES)))).float()
        frames = torch.nn.functional.interpolate(frames, (SIZE, SIZE), mode="bicubic", antialias=True)
        video = (frames / 127.5 - 1).clamp(-1, 1).transpose(0, 1)[None]
        latents = pipeline._normalize_latents(vae.encode(video).latent_dist.mean, vae.latents_mean, vae.latents_std)
        text, mask, *_ = pipeline.encode_prompt(
            example.caption, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
        )
        text, audio_text, mask = pipeline.connectors(text, mask)
        sound = read_sound(
            FileSource(path), Span((example.times or [i / FPS for i in range(20)])[first], FRAMES / FPS), 16_000
        )
        audio = audio_vae.encode(spectrogram(sound)[None, :, :33]).latent_dist.mean
        audio = (audio.transpose(1, 2).flatten(2) - audio_vae.latents_mean) / audio_vae.latents_std
        return pipeline._pack_latents(latents), audio, text, audio_text, mask

    def loss(_, examples, random):
        clean, audio, text, audio_text, mask = map(torch.cat, zip(*(encoded(each.example) for each in examples)))
        u = sample_u("logit_normal", random.generators("level"))
        shift = np.exp(calculate_shift(clean.shape[1], 256, 4096, 0.95, 2.05))
        sigma = (shift * u / (1 + (shift - 1) * u))[:, None, None]
        noise = pipeline._pack_latents(random.normal("noise", (8, 2, 3, 3)))
        audio_noise = random.normal("audio_noise", (4, 9, 4)).transpose(1, 2).flatten(2)
        if alone:
            audio, audio_noise = torch.zeros(2, 1, 16), torch.zeros(2, 1, 16)
        predicted, audio_predicted = transformer(
            (1 - sigma) * clean + sigma * noise, (1 - sigma) * audio + sigma * audio_noise, text, audio_text,
            1000 * sigma.flatten(), sigma=1000 * sigma.flatten(), encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask, num_frames=2, height=3, width=3, fps=float(FPS),
            audio_num_frames=audio.shape[1], use_cross_timestep=True, isolate_modalities=alone, return_dict=False,
        )  # fmt: skip
        found = (predicted - (noise - clean)).square().mean()
        return (
            found if alone else found + config.audio_weight * (audio_predicted - (audio_noise - audio)).square().mean()
        )

    targets = [f"{layer}.{each}" for layer in ("attn1", "attn2") for each in TARGETS] if alone else TARGETS
    losses, weights = plain_loop(trainer, {"transformer": transformer}, loss, targets=targets)
    return losses, weights["transformer"]


@pytest.mark.parametrize("weight", thorough_but([0.5], [0.5, 0.0]))
def test_it_is_a_plain_loop(weight, settings_of):
    """Of videos with their sound, and of videos alone. Samples are the pipeline's own, with its sound."""
    steps = []
    sample = {"validation_prompts": ["a cat"], "validation_steps": 2, "validation_guidance": 1.0, "seed": 3}
    more = {"audio_weight": weight, "evaluation_every": 3, "validation_lossless": True}
    settings = settings_of("ltx2", **RUN, **sample, **more, steps=3)
    trainer = Trainer(TrainConfig(**settings), on_step=lambda _, numbers: steps.append(numbers["loss"]))
    found = load_file(trainer.run())
    losses, weights = expected(trainer)
    assert steps == pytest.approx(losses, rel=1e-6)
    assert {f"transformer.{name}" for name in weights} == set(found)
    assert any("audio" in name for name in found) == (weight > 0)
    for name, each in weights.items():
        assert torch.allclose(found[f"transformer.{name}"], each, atol=1e-6), name

    pipeline = LTX2Pipeline.from_pretrained(settings["model"], dtype=torch.float32)
    pipeline.load_lora_weights(settings["output_dir"])
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "a cat", height=SIZE, width=SIZE, num_frames=FRAMES, num_inference_steps=2, guidance_scale=1.0,
        audio_guidance_scale=1.0, max_sequence_length=44, output_type="np",
        generator=torch.Generator().manual_seed(derived_seed(3, "validate", 0)),
    )  # fmt: skip
    source = FileSource(Path(settings["output_dir"], "samples", "last", "00-a-cat.mkv"))
    frames = torch.stack(list(read_video(source, range(FRAMES)))).movedim(1, -1).numpy()
    assert np.abs(frames.astype(float) - (drawn.frames[0] * 255).round()).max() <= 1
    sound = read_sound(source, Span(0.0, drawn.audio.shape[-1] / 8000), 8000)
    assert (drawn.audio[0] - drawn.audio[0].mean()).abs().max() > 1e-3
    assert torch.allclose(sound, drawn.audio[0], atol=1e-4)
    with av.open(str(Path(source.path).with_suffix(".mp4"))) as video:
        assert video.streams.audio[0].codec_context.name == "aac" and video.streams.audio[0].rate == 8000


@pytest.mark.slow
@pytest.mark.parametrize("weight", thorough_but([1.0], [1.0, 0.0]))
def test_two_processes_that_share_sequences_train_like_one(weight, run_worlds, settings_of):
    """Those of the video and of the sound, by a ring; of the video alone, the sound is one token."""
    few = {"steps": 2, "batch_size": 2, "lr_warmup_steps": 0, "audio_weight": weight, "evaluation_every": 2}
    one, two = (settings_of("ltx2", **few, **split) for split in ({}, {"cp_degree": 2, "ring_degree": 2}))
    [[alone]], together = run_worlds(World(1, train_all, {"several": [one]}), World(2, train_all, {"several": [two]}))
    for [of_rank] in together:
        for ours, theirs in zip(of_rank["steps"], alone["steps"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.thorough
def test_sharded_weights_train_like_one_process(run_worlds, settings_of):
    """By FSDP2, over two processes that share sequences."""
    few = {"steps": 2, "batch_size": 2, "lr_warmup_steps": 0, "evaluation_every": 2}
    one, two = settings_of("ltx2", **few), settings_of("ltx2", **few)
    arguments = {"settings": two, "block": "LTX2VideoTransformerBlock", "cp_degree": 2}
    [[alone]], sharded = run_worlds(World(1, train_all, {"several": [one]}), World(2, train_sharded, arguments))
    for of_rank in sharded:
        for ours, theirs in zip(of_rank["steps"], alone["steps"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)


def test_data_without_sound_are_refused_by_name(settings_of, tmp_path):
    data = make_data("video", tmp_path / "data")
    settings = settings_of("ltx2", steps=1, data=str(data))
    with pytest.raises(TrainingDataError, match=r"0\.mp4: no sound, which the model learns.*--audio_weight 0"):
        train(settings)
    forget_accelerate()
    assert len(train({**settings, "audio_weight": 0.0})["steps"]) == 1


def test_settings_that_do_not_fit():
    pipeline = make("ltx2")
    with pytest.raises(
        TrainingError, match="--max_sequence_length 43: this pipeline encodes multiples of 2 text tokens"
    ):
        family_of(pipeline, max_sequence_length=43)
    with pytest.raises(TrainingError, match=r"--audio_weight 0\.0: WanPipeline generates no sound"):
        family_of(make("wan"), audio_weight=0.0)
    family, alone = (family_of(pipeline, max_sequence_length=44, audio_weight=each) for each in (None, 0.0))
    for given in ({"fps": 0.0}, {"frame_pick": "spread"}):
        config = TrainConfig(model="m", data="d", resolution=[96], **given)
        with pytest.raises(
            TrainingError, match="learns sound, which belongs to frames at a fixed rate.*audio_weight 0"
        ):
            check_with_model(config, family, None)
        check_with_model(config, alone, None)


@pytest.mark.parametrize("weight", [None, 0.0])
def test_which_parameters_have_a_gradient(weight):
    family = family_of(make("ltx2"), max_sequence_length=44, audio_weight=weight)
    transformer = family.transformer.requires_grad_(True)
    shapes = {"": (1, 8, 2, 3, 3), "audio_": (1, 4, 9, 4)}
    noisy = {kind: torch.randn(shapes[kind], generator=torch.Generator().manual_seed(0)) for kind in family.latents}
    found = family.predict(transformer, noisy, torch.tensor([500.0]), family.encode_text(["a cat"]))
    sum(each.square().sum() for each in found.values()).backward()
    without = {name for name, each in transformer.named_parameters() if each.grad is None or not each.grad.any()}
    named = family.without_gradient
    assert without == {name for name, _ in transformer.named_parameters() if named and re.search(named, name)}
    assert bool(without) == (weight == 0)


def test_layers_of_the_sound_get_no_adapter_where_the_video_is_trained_alone(settings_of):
    targets = {"targets": ["to_q"], "audio_weight": 0.0}
    message = (
        r"--targets to_q: the video does not depend on transformer_blocks\.0\.audio_attn1\.to_q,.*such as attn1\.to_q"
    )
    for adapter in ("lora", "loha"):
        with pytest.raises(TrainingError, match=message):
            train(settings_of("ltx2", steps=1, adapter=adapter, adapter_init="default", **targets))
        forget_accelerate()
    names = {"targets": ["attn1.to_q"], "audio_weight": 0.0}
    assert len(train(settings_of("ltx2", steps=1, **names))["steps"]) == 1


@pytest.mark.parametrize("family", ["ltx", "ltx2"])
def test_the_frame_rate_of_the_data_is_an_input(family):
    found = family_of(make(family), max_sequence_length=44, fps=12.0)
    assert found.size_arguments(9, 96, 96)["frame_rate"] == found.fps == 12.0
    shape = {"latents_mean": (1, 16, 2, 3, 3)} if family == "ltx" else {}
    noisy = torch.zeros(shape.get("latents_mean", (1, 8, 2, 3, 3)))
    text = {"prompt_attention_mask": torch.ones(1, 44)}
    text |= dict.fromkeys(("prompt_embeds", "audio_prompt_embeds"), torch.zeros(1, 44, 32))
    inputs = found.inputs(noisy, torch.zeros(1), {**text, "audio_noisy": torch.zeros(1, 4, 19, 4)})
    assert inputs["fps"] == 12.0 if family == "ltx2" else inputs["rope_interpolation_scale"][0] == 8 / 12
