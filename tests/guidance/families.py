"""Small pipelines of each family that guides, without text encoders and VAEs: prompts are random embeddings, and
results are latents. Transformers are those of the zoo, in float64."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch

from diffusers_attn.nested import mapped
from diffusers_attn.tiny_models.weights import randomize
from tests.vae.cases import CASES as VAES
from tests.zoo import CASES

TEXT = 13
STEPS = 4


class Family(NamedTuple):
    """How to make a pipeline and call it."""

    pipeline: str
    """Name of the class in diffusers."""
    case: str
    """Name of its transformer in the zoo."""
    prompt: Callable[[Any], dict[str, Any]]
    """Makes the arguments for one prompt: called with the transformer, for the prompt and for the negative one."""
    call: dict[str, Any] = {}
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    config: dict[str, Any] = {}
    """Changes to the configuration of the transformer."""
    parts: Callable[[], dict[str, Any]] = dict
    """Makes other models of the pipeline, which it needs for latents as well."""


def _embeds(dim: int, *, mask: bool = False, pooled: int = 0, listed: bool = False) -> Callable[..., dict[str, Any]]:
    def draw(generator: torch.Generator) -> dict[str, Any]:
        embeds = torch.randn(1, TEXT, dim, generator=generator, dtype=torch.float64)
        found: dict[str, Any] = {"prompt_embeds": [embeds[0]] if listed else embeds}
        if mask:
            found["prompt_attention_mask"] = torch.ones(1, TEXT, dtype=torch.bool)
        if pooled:
            found["pooled_prompt_embeds"] = torch.randn(1, pooled, generator=generator, dtype=torch.float64)
        return found

    return draw


def _qwen(generator: torch.Generator) -> dict[str, Any]:
    return _embeds(32)(generator) | {"prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.bool)}


def _ltx2_parts() -> dict[str, Any]:
    """Connectors between text encoder and transformer, and the statistics of both VAEs' latents."""
    heads = {
        f"{kind}_connector_{name}": number
        for kind in ("video", "audio")
        for name, number in {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}.items()
    }
    registers = {f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")}
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=1, **heads, **registers
    )
    audio = {"base_channels": 8, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 8}
    randomize(connectors, torch.Generator().manual_seed(3))
    return {
        "connectors": connectors.double().eval(),
        "vae": VAES["ltx2"].make(),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(**audio),
    }


_VIDEO = {"num_frames": 5}
_BY_32 = {"height": 160, "width": 64}
_NO_WORDS = {"negative_prompt": None}
_UNBINNED = {"use_resolution_binning": False}

FAMILIES = {
    # One call per branch.
    "wan": Family("WanPipeline", "wan", _embeds(32), _VIDEO),
    "qwenimage": Family("QwenImagePipeline", "qwenimage", _qwen, {"true_cfg_scale": 4.0}),
    "chroma": Family("ChromaPipeline", "chroma", _embeds(32, mask=True)),
    "flux": Family("FluxPipeline", "flux", _embeds(32, pooled=24), {"true_cfg_scale": 3.0}),
    "ovis_image": Family("OvisImagePipeline", "ovis_image", _embeds(32), _NO_WORDS),
    "lumina2": Family("Lumina2Pipeline", "lumina2", _embeds(32, mask=True)),
    "skyreels_v2": Family("SkyReelsV2Pipeline", "skyreels_v2", _embeds(32), _VIDEO),
    # Branches in one batch.
    "sd3": Family("StableDiffusion3Pipeline", "sd3", _embeds(32, pooled=24)),
    "pixart": Family(
        "PixArtSigmaPipeline", "pixart", _embeds(24, mask=True), _UNBINNED | _NO_WORDS, "DPMSolverMultistepScheduler"
    ),
    "sana": Family("SanaPipeline", "sana", _embeds(24, mask=True), _UNBINNED | _NO_WORDS | _BY_32),
    "z_image": Family("ZImagePipeline", "zimage", _embeds(32, listed=True)),
    "ltx": Family("LTXPipeline", "ltx", _embeds(32, mask=True), {"num_frames": 9} | _BY_32),
    "mochi": Family("MochiPipeline", "mochi", _embeds(32, mask=True), {"num_frames": 7}),
    "aura_flow": Family("AuraFlowPipeline", "aura_flow", _embeds(32, mask=True)),
    # Both branches of the text in one batch, and a call for each other kind of guidance.
    "ltx2": Family(
        "LTX2Pipeline",
        "ltx2",
        _embeds(32, mask=True),
        {"num_frames": 9, "height": 160, "width": 64, "spatio_temporal_guidance_blocks": [1]},
        config={"perturbed_attn": True},
        parts=_ltx2_parts,
    ),
    "hunyuan_video": Family("HunyuanVideoPipeline", "hunyuan_video", _embeds(32, mask=True, pooled=24), _VIDEO),
}


def build(name: str) -> Any:
    """The pipeline of a family."""
    family = FAMILIES[name]
    cls = getattr(diffusers, family.pipeline)
    case = CASES[family.case]
    case = dataclasses.replace(case, config={**case.config, **family.config})
    transformer = case.build(dtype=torch.float64).double().eval()
    names = [each for each in inspect.signature(cls.__init__).parameters if each != "self"]
    required = {
        each: None
        for each in names
        if inspect.signature(cls.__init__).parameters[each].default is inspect.Parameter.empty
    }
    scheduler = getattr(diffusers, family.scheduler)()
    pipe = cls(**required | {"transformer": transformer, "scheduler": scheduler} | family.parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _several(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments for several prompts, from those of each."""
    joined = {}
    for key, value in found[0].items():
        every = [each[key] for each in found]
        joined[key] = [item for each in every for item in each] if isinstance(value, list) else torch.cat(every)
    return joined


def draw(
    pipe: Any, name: str, *, seed: int = 0, scale: float = 4.0, steps: int = STEPS, prompts: int = 1, **more: Any
) -> torch.Tensor:
    """The latents that a call of the pipeline returns. Several prompts have a generator each."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(7)
    prompt, negative = (
        mapped(
            _several([family.prompt(generator) for _ in range(prompts)]), lambda each: each.to(pipe._execution_device)
        )
        for _ in range(2)
    )
    arguments = prompt | {f"negative_{key}": value for key, value in negative.items()} | family.call
    key = "true_cfg_scale" if "true_cfg_scale" in arguments else "guidance_scale"
    if key == "guidance_scale" or scale == 1:
        arguments[key] = scale
    arguments = {"height": 80, "width": 48, "num_inference_steps": steps, "output_type": "latent"} | arguments | more
    every = [torch.Generator().manual_seed(seed + number) for number in range(prompts)]
    generators = every if prompts > 1 else every[0]
    with torch.no_grad():
        result: torch.Tensor = pipe(generator=generators, return_dict=False, **arguments)[0]
    return result
