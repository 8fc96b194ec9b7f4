"""What training gives a transformer, and what it makes of its output, compared with the pipeline while it draws."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from diffusers_attn.nested import tensors_in
from diffusers_attn.training.data.collate import collate, varying
from diffusers_attn.training.families import Family, family_of
from diffusers_attn.training.loss import EpsilonPrediction, Level, RectifiedFlow

from ..pipelines import PIPELINES, make, small_references

PROMPT, LONGER = "a cat", "a cat that looks"


class Case(NamedTuple):
    """How a pipeline draws."""

    arguments: dict[str, Any] = {"guidance_scale": 1.0}
    """Arguments of the pipeline's call, with which it calls its transformer once per step."""
    text_length: int = 16
    frames: int = 1
    width: int = 32
    """Width in pixels. The height is 1.5 times as much."""
    multiple: int = 16
    """Number that sizes in pixels are multiples of."""
    frame_rule: tuple[int, int] = (4, 1)
    """Of videos."""
    unpacked: bool = False
    """Whether the pipeline's scheduler gets images [batch, channels, height, width]. Otherwise it gets what the
    transformer returns."""
    options: dict[str, Any] = {}
    """Options of the family."""
    images: int = 0
    """Number of images that the pipeline gets: for the first frame, or as references."""
    controls: bool = False
    """Whether it gets a control video and its mask."""
    more: tuple[str, ...] = ()
    """Arguments that the pipeline gives its transformer, which would compute them itself."""


CASES = {
    "flux": Case({"guidance_scale": 3.5}, multiple=2),
    "wan": Case(frames=9),
    "cogvideox": Case(frames=9),
    "cogview4": Case(),
    "qwen_image": Case({"true_cfg_scale": 1.0}, text_length=260),
    "z_image": Case({"guidance_scale": 0.0}, unpacked=True),
    "flux2": Case(),
    "sd3": Case(),
    "sdxl": Case(unpacked=True),
    "sdxl_v": Case(unpacked=True),
    "chroma": Case(),
    "ltx": Case(frames=9, width=64, multiple=32, frame_rule=(8, 1)),
    "ltx2": Case(
        {
            **dict.fromkeys(("guidance_scale", "modality_scale", "audio_guidance_scale", "audio_modality_scale"), 1.0),
            **dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0),
        },
        frames=9,
        width=64,
        multiple=32,
        frame_rule=(8, 1),
        more=("video_coords", "audio_coords"),
    ),
    "sana": Case({"guidance_scale": 1.0, "use_resolution_binning": False}, width=64, multiple=32, unpacked=True),
    "lumina2": Case(text_length=230, unpacked=True),
    "hunyuan_video": Case({"guidance_scale": 3.5}, text_length=600, frames=9),
    "hunyuan_video15": Case(text_length=40, frames=9),
    "flux_kontext": Case({"guidance_scale": 3.5}, images=1),
    "flux_control": Case({"guidance_scale": 3.5}, images=1),
    "qwen_image_edit": Case({"true_cfg_scale": 1.0}, images=1),
    "qwen_image_edit_plus": Case({"true_cfg_scale": 1.0}, images=2),
    "wan_i2v": Case(frames=9, images=1),
    "wan_ti2v": Case(frames=9, images=1),
    "wan_a14b": Case({"guidance_scale": 1.0, "num_inference_steps": 8}, frames=9, options={"expert": "high"}),
    "wan_vace": Case(frames=9, images=2, controls=True),
    "krea2": Case({"guidance_scale": 0.0}, text_length=260),
}


class Drawn(NamedTuple):
    """What a pipeline did."""

    calls: list[dict[str, Any]]
    """Arguments of the transformer in each step."""
    steps: list[tuple[Any, Tensor, Tensor, Tensor]]
    """Timestep, sample, model output and next sample of the scheduler in each step."""
    decoded: list[Tensor]
    """What the VAE decoded."""
    mu: dict[str, float]
    """The argument `mu` of the scheduler's `set_timesteps`, if the pipeline gave one."""


def draw(family: Family, case: Case) -> Drawn:
    """Lets a pipeline draw, and records its transformer, scheduler and VAE."""
    pipeline = family.pipeline
    scheduler, transformer, vae = pipeline.scheduler, family.transformer, pipeline.vae
    drawn = Drawn([], [], [], {})
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: drawn.calls.append({**dict(zip(names, args)), **kwargs}), with_kwargs=True
    )
    plain, decode = type(scheduler), vae.decode

    @functools.wraps(plain.step)  # whose signatures pipelines read
    def recording_step(self, output, timestep, sample, *args, **kwargs):
        result = plain.step(self, output, timestep, sample, *args, **kwargs)
        if self is scheduler:  # and not the copy that LTX-2 has for the sound
            drawn.steps.append((timestep, sample, output, result[0]))
        return result

    @functools.wraps(plain.set_timesteps)
    def recording_timesteps(self, *args, **kwargs):
        drawn.mu.update({"mu": kwargs["mu"]} if "mu" in kwargs else {})
        return plain.set_timesteps(self, *args, **kwargs)

    def recording_decode(latents, *args, **kwargs):
        drawn.decoded.append(latents)
        return decode(latents, *args, **kwargs)

    recording = {"step": recording_step, "set_timesteps": recording_timesteps}
    scheduler.__class__, vae.decode = type(plain.__name__, (plain,), recording), recording_decode
    arguments = {
        "num_inference_steps": 3,
        "max_sequence_length": case.text_length,
        "generator": torch.Generator().manual_seed(0),
        **family.size_arguments(case.frames, case.width * 3 // 2, case.width),
        **case.arguments,
    }
    if case.images:
        images = pictures(family, case)
        arguments[family.image_argument] = images if case.images > 1 else images[0]
    if case.controls:
        arguments |= {family.control_arguments[name]: frames for name, frames in controls(case).items()}
    accepted = inspect.signature(pipeline.__call__).parameters
    pipeline.set_progress_bar_config(disable=True)
    pipeline(prompt=PROMPT, output_type="pt", **{name: arguments[name] for name in arguments if name in accepted})
    hook.remove()
    scheduler.__class__ = plain
    del vae.decode
    return drawn


def pictures(family: Family, case: Case) -> list[Image.Image]:
    size = family.reference_size(case.width * 3 // 2, case.width)
    return [
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8))
        for number in range(case.images)
    ]


def controls(case: Case) -> dict[str, list[Image.Image]]:
    """A control video, and a mask of it that changes from frame to frame."""
    draw = np.random.default_rng(9)
    size = (case.frames, case.width * 3 // 2, case.width)
    pixels = {"control": draw.integers(0, 255, (*size, 3), dtype=np.uint8)}
    pixels["control_mask"] = (draw.integers(0, 2, size, dtype=np.uint8) * 255)[..., None].repeat(3, -1)
    return {name: [Image.fromarray(each) for each in frames] for name, frames in pixels.items()}


def _pixels(images: list[Image.Image]) -> Tensor:
    """Images as [number, 3, height, width] in [-1, 1]."""
    return torch.stack([torch.from_numpy(np.array(each)) for each in images]).movedim(-1, 1) / 127.5 - 1


def encoded(family: Family, case: Case, caption: str = PROMPT) -> dict[str, Tensor]:
    """The inputs of a sample: its text, and what belongs to the image that is given."""
    images = torch.zeros(1, 1, 3, case.width * 3 // 2, case.width)
    if case.images:
        images = _pixels(pictures(family, case))[None]
    given = {"references": images, "control": images.transpose(1, 2)}
    if case.controls:
        given |= {name: _pixels(frames).transpose(0, 1)[None] for name, frames in controls(case).items()}
    given = {name: given[name] for name in family.example_conditions}
    if family.sound_rate is not None:
        given["sound"] = torch.zeros(1, 2, 8000)
    pixels = torch.zeros(1, 3, 1, case.width * 3 // 2, case.width) if given else images.transpose(1, 2)
    found = family.encode(pixels.expand(-1, -1, case.frames, -1, -1), **given)
    seeing = family.seeing(images) if family.text_has_pictures else family
    return seeing.encode_text([caption]) | {name: each for name, each in found.items() if name[:8] != "latents_"}


def level_at(family: Family, timestep: float, tokens: int) -> Level:
    """The noise level at a timestep of the sampler, found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _level(family, middle, tokens).timestep.item() >= timestep else (middle, high)
    return _level(family, high, tokens)


def _level(family: Family, u: float, tokens: int) -> Level:
    return family.objective.level(torch.tensor([u], dtype=torch.float64), tokens)


def step_to(family: Family, noisy: Tensor, prediction: Tensor, level: Level, sigma: float) -> Tensor:
    """The sample at noise level `sigma`, by a step of first order along the prediction at `level`."""
    now = level.sigma.item()
    if isinstance(family.objective, RectifiedFlow):
        clean, noise = noisy - now * prediction, noisy + (1 - now) * prediction
        return (1 - sigma) * clean + sigma * noise
    alpha = (1 - now**2) ** 0.5
    if isinstance(family.objective, EpsilonPrediction):
        clean, noise = (noisy - now * prediction) / alpha, prediction
    else:
        clean, noise = alpha * noisy - now * prediction, alpha * prediction + now * noisy
    return (1 - sigma**2) ** 0.5 * clean + sigma * noise


@pytest.fixture(autouse=True)
def _small_references():
    with small_references():
        yield


@pytest.mark.parametrize("name", CASES)
def test_training_does_what_the_pipeline_does(name):
    """Inputs of the transformer, noise levels, sign and scale of the prediction, and the range of latents."""
    assert set(CASES) == {*PIPELINES, "flux"}
    if name in ("wan_i2v", "wan_ti2v"):
        pytest.importorskip("ftfy", reason="diffusers' pipelines of Wan from an image need ftfy")
    pipeline, case = make(name), CASES[name]
    embeds = hasattr(pipeline, "transformer") and pipeline.transformer.config.get("guidance_embeds")
    guidance = {"guidance": 3.5} if embeds else {}
    length = {} if name.startswith(("qwen_image_edit", "sdxl")) else {"max_sequence_length": case.text_length}
    family = family_of(pipeline, **length, **guidance, **case.options)
    assert family.size_multiple == case.multiple
    assert family.frame_rule == ((1, 0) if family.kind == "image" else case.frame_rule)
    drawn = draw(family, case)
    sound = {} if family.sound_rate is None else {"sound": torch.zeros(1, 2, 8000)}
    encoded_ones = family.encode(torch.zeros(1, 3, case.frames, case.width * 3 // 2, case.width), **sound)
    shape = encoded_ones["latents_mean"].shape
    tokens = family.tokens(shape)

    def latents(sample: Tensor) -> Tensor:
        return sample.unsqueeze(2) if case.unpacked else family.prediction(sample, shape)

    def noisy_at(number: int) -> dict[str, Tensor]:
        """The latents of each kind that the transformer got in a step."""
        further = {
            kind: each.prediction(
                drawn.calls[number][f"{kind}hidden_states"], encoded_ones[f"latents_{kind}mean"].shape
            )
            for kind, each in family.latents.items()
            if kind
        }
        return {"": latents(drawn.steps[number][1]), **further}

    # The range of latents: those that the VAE decodes are the last ones of the sampler.
    # (The first frame of a video may be the given one.)
    decoded, last = family.normalise(family.from_vae(drawn.decoded[0])), latents(drawn.steps[-1][3])
    assert torch.allclose(decoded[:, :, -1], last[:, :, -1], atol=1e-4)

    # Inputs.
    timestep, sample, *_ = drawn.steps[1]
    text = encoded(family, case)
    given = {f"{kind}noisy": each for kind, each in noisy_at(1).items()}
    ours = family.inputs(latents(sample), timestep.view(1).float(), {**text, **given})
    ours = {key: each for key, each in ours.items() if each is not None}
    theirs = {key: each for key, each in drawn.calls[1].items() if each is not None}
    assert set(ours) == set(theirs) - {"return_dict", "attention_kwargs", "joint_attention_kwargs", *case.more}
    for key, each in ours.items():
        assert len(tensors_in(each)) == len(tensors_in(theirs[key])), key
        assert tensors_in(each) or each == theirs[key], key
        for one, other in zip(tensors_in(each), tensors_in(theirs[key])):
            assert torch.allclose(one.float(), other.float(), atol=1e-4), key

    # Noise levels: the schedulers of some pipelines round timesteps.
    flow = isinstance(family.objective, RectifiedFlow)
    level = level_at(family, float(timestep), tokens)
    assert level.timestep.item() == pytest.approx(float(timestep), abs=1e-2)
    assert not flow or level.sigma.item() == pytest.approx(pipeline.scheduler.sigmas[1].item(), abs=1e-3)

    # Sign and scale of the prediction.
    timestep, sample, _, after = drawn.steps[0]
    level, then = (level_at(family, float(each[0]), tokens) for each in drawn.steps[:2])
    sigma = pipeline.scheduler.sigmas[1].item() if flow else then.sigma.item()
    if flow:
        level = level._replace(sigma=pipeline.scheduler.sigmas[:1])
    with torch.no_grad():
        found = family.predict(family.transformer, noisy_at(0), timestep.view(1).float(), text)
    prediction = found[""]
    assert torch.allclose(step_to(family, latents(sample), prediction, level, sigma), latents(after), atol=1e-4)
    for kind, each in noisy_at(1).items():
        assert torch.allclose(step_to(family, noisy_at(0)[kind], found[kind], level, sigma), each, atol=1e-4)

    # The shift. (That of Flux 2 depends on the number of steps, and has a test of its own.)
    if flow and name != "flux2":
        flow_match = isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
        pipeline.scheduler.set_timesteps(
            **({"sigmas": [0.5], **drawn.mu} if flow_match else {"num_inference_steps": 2})
        )
        middle = pipeline.scheduler.sigmas[0 if flow_match else 1].item()
        assert _level(family, 0.5, tokens).sigma.item() == pytest.approx(middle, abs=1e-6 if flow_match else 2e-3)

    # Padding: a sample gets the same prediction beside one with a longer caption.
    texts = [{key: each[0] for key, each in encoded(family, case, caption).items()} for caption in (PROMPT, LONGER)]
    both = collate(texts, varying({key: tuple(each.shape) for key, each in text.items()} for text in texts))
    noisy = {kind: each.expand(2, *[-1] * (each.ndim - 1)) for kind, each in noisy_at(0).items()}

    def part_of(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {kind: each[: len(part["at"])] for kind, each in noisy.items()}

    with torch.no_grad():
        predicted = torch.cat(
            [
                family.predict(family.transformer, part_of(part), part["at"], part)[""]
                for part in family.parts({**both, "at": timestep.float().expand(2)})
            ]
        )
    assert torch.allclose(predicted[:1], prediction, atol=1e-4)
    assert not torch.allclose(predicted[1:], prediction, atol=1e-4)
