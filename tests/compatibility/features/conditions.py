"""Models and processors beside the transformer that condition it, and guidance within a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import PIL.Image
import torch
from torch import Tensor

from diffusers_attn.nested import mapped
from diffusers_attn.tiny_models.weights import randomize

from ... import tiny_pipelines
from ...guidance import families
from ...parallelize import test_controlnets as controlnets
from ...processors import ip_adapters
from ...vae.cases import CASES as VAES
from ...zoo import CASES
from ..feature import Feature, lossy


def _controlnet(make: Callable[[], Any], **options: Any) -> Feature:
    def build() -> Any:
        pipe, _, pipe.arguments = make()
        return pipe

    def draw(pipe: Any, **more: Any) -> list[Tensor]:
        call = mapped(pipe.arguments, lambda each: each.to(pipe._execution_device))
        return [controlnets.draw(pipe, call | more)]

    def without(pipe: Any) -> list[Tensor]:
        scale = pipe.arguments["controlnet_conditioning_scale"]
        return draw(pipe, controlnet_conditioning_scale=[0.0] * len(scale) if isinstance(scale, list) else 0.0)

    return Feature(build=build, draw=draw, plain=without, orders=("before",), not_under=("vae", "whole"), **options)


def _qwen_image() -> tuple[Any, list[Any], dict[str, Any]]:
    parts = tiny_pipelines.make("qwen_image").components
    transformer = parts["transformer"]
    net = diffusers.QwenImageControlNetModel.from_config({**transformer.config, "num_layers": 1})
    randomize(net, torch.Generator().manual_seed(1))
    pipe = diffusers.QwenImageControlNetPipeline(**parts, controlnet=net.eval())
    picture = torch.linspace(-1, 1, 3 * 64 * 48).reshape(1, 3, 64, 48)
    call = {"prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 4.0, "control_image": picture}
    return pipe, [net], call | {"controlnet_conditioning_scale": 0.8}


def _sana() -> tuple[Any, list[Any], dict[str, Any]]:
    net = controlnets.random(CASES["sana_controlnet"].build(dtype=torch.float64))
    pipe = diffusers.SanaControlNetPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=controlnets.random(VAES["dc"].make()),
        transformer=CASES["sana"].build(dtype=torch.float64).double().eval(),
        controlnet=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    generator = torch.Generator().manual_seed(2)
    call = {"control_image": controlnets.PICTURE[..., :32], "height": 64, "width": 32, "negative_prompt": None}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(1, 13, 24, generator=generator, dtype=torch.float64)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(1, 13, dtype=torch.bool)
    return pipe, [net], call | {"use_resolution_binning": False, "controlnet_conditioning_scale": 0.5}


def _hunyuan_dit() -> tuple[Any, list[Any], dict[str, Any]]:
    transformer = CASES["hunyuan_dit"].build(dtype=torch.float64).double().eval()
    net = controlnets.random(CASES["hunyuan_dit_controlnet"].build(dtype=torch.float64))
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor")
    pipe = diffusers.HunyuanDiTControlNetPipeline(
        **dict.fromkeys(absent),
        vae=controlnets.sd3()[0].vae,
        transformer=transformer,
        controlnet=net,
        scheduler=diffusers.DDPMScheduler(clip_sample=False),
        requires_safety_checker=False,
    )
    generator = torch.Generator().manual_seed(2)
    call = {"control_image": controlnets.PICTURE, "use_resolution_binning": False}
    for prefix in ("", "negative_"):
        for number, tokens, dim in (("", 13, 32), ("_2", 7, 64)):
            embeds = torch.randn(1, tokens, dim, generator=generator, dtype=torch.float64)
            call[f"{prefix}prompt_embeds{number}"] = embeds
            call[f"{prefix}prompt_attention_mask{number}"] = torch.ones(1, tokens, dtype=torch.long)
    return pipe, [net], call | {"controlnet_conditioning_scale": 0.5}


def _z_image() -> tuple[Any, list[Any], dict[str, Any]]:
    parts = tiny_pipelines.make("z_image").components
    config = parts["transformer"].config
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=config.in_channels,
        add_control_noise_refiner=None, dim=config.dim, n_refiner_layers=1, n_heads=config.n_heads,
    )  # fmt: skip
    randomize(net, torch.Generator().manual_seed(1))
    pipe = diffusers.ZImageControlNetPipeline(**parts, controlnet=net.eval())
    picture = torch.linspace(-1, 1, 3 * 64 * 48).reshape(1, 3, 64, 48)
    call = {"prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 4.0, "control_image": picture}
    return pipe, [net], call | {"controlnet_conditioning_scale": 0.8}


def _ip_adapter(family: str, load: Callable[[Any], None], **embeds: Any) -> Feature:
    def draw(pipe: Any) -> list[Tensor]:
        return [families.draw(pipe, family, seed=seed, **embeds) for seed in (0, 1)]

    return lossy(
        lambda pipe: load(pipe.transformer),
        build=functools.partial(families.build, family),
        draw=draw,
        plain=lambda pipe: [families.draw(pipe, family, seed=seed) for seed in (0, 1)],
    )


def _image(sign: int) -> Tensor:
    return sign * ip_adapters.image_embeds(torch.float64)[:1]


def _vace() -> Any:
    parts = tiny_pipelines.make("wan").components
    config = {**parts["transformer"].config, "vace_layers": [0, 1], "vace_in_channels": 96}
    transformer = diffusers.WanVACETransformer3DModel.from_config(config)
    randomize(transformer, torch.Generator().manual_seed(0))
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    pipe = diffusers.WanVACEPipeline(**{name: parts[name] for name in names}, transformer=transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw_vace(pipe: Any, scale: float = 1.0) -> list[Tensor]:
    frames = [PIL.Image.new("RGB", (32, 48), (50 * number, 0, 255 - 50 * number)) for number in range(5)]
    embeds = [torch.full((1, 13, 32), value) for value in (0.5, -0.5)]
    with torch.no_grad():
        call = pipe(
            video=frames, height=48, width=32, num_frames=5, num_inference_steps=2, conditioning_scale=scale,
            prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return [call.frames]


def _guided(family: str, **call: Any) -> Feature:
    def draw(pipe: Any) -> list[Tensor]:
        return [families.draw(pipe, family, seed=seed, **call) for seed in (0, 1)]

    return Feature(build=functools.partial(families.build, family), draw=draw, orders=("before",))


FEATURES = {
    "two ControlNets, Flux": _controlnet(controlnets.flux),
    "ControlNet, Stable Diffusion 3": _controlnet(controlnets.sd3),
    "ControlNet, Qwen-Image": _controlnet(_qwen_image, tolerance=1e-3),
    "ControlNet, Sana": _controlnet(_sana, tolerance=1e-3),
    "ControlNet, Hunyuan-DiT": _controlnet(_hunyuan_dit),
    "ControlNet, Z-Image": _controlnet(_z_image, tolerance=1e-3),
    "VACE, Wan": Feature(
        build=_vace, draw=_draw_vace, plain=lambda pipe: _draw_vace(pipe, 0.0), orders=("before",), tolerance=1e-4
    ),
    "IP-Adapter, Flux": _ip_adapter(
        "flux",
        ip_adapters.load_flux,
        ip_adapter_image_embeds=[_image(1)],
        negative_ip_adapter_image_embeds=[_image(-1)],
    ),
    "IP-Adapter, Stable Diffusion 3": _ip_adapter(
        "sd3", ip_adapters.load_sd3, ip_adapter_image_embeds=torch.cat([_image(-1), _image(1)])
    ),
    "true CFG, Qwen-Image": _guided("qwenimage"),
    "both branches in one batch, PixArt": _guided("pixart"),
}
