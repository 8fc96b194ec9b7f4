"""A bound model computes the same after every change that diffusers offers, whenever it was bound.

A life is a model and a sequence of things that users do to models. The model lives it once as diffusers made it, and
again with the binding put on and taken off at each of its points.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_attn import DispatchProcessor, set_attention_provider
from diffusers_attn.processors import attention_modules
from diffusers_attn.processors.binding import attention_modules_of

from ..zoo import CASES, outputs, relative_change
from . import ip_adapters

Step = Callable[[torch.nn.Module], torch.nn.Module | None]


def flux_pipeline(model):
    rest = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=model, **rest)


def sd_pipeline(model):
    rest = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(unet=model, scheduler=DDIMScheduler(), requires_safety_checker=False, **rest)


def sd3_pipeline(model):
    rest = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(rest))


def add_lora(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))


def load_lora(model):
    donor = CASES["flux"].build()
    add_lora(donor)
    weights = get_peft_model_state_dict(donor, adapter_name="default")
    flux_pipeline(model).load_lora_weights({f"transformer.{name}": value for name, value in weights.items()})


def fuse_lora(model):
    model.fuse_lora()


def unfuse_lora(model):
    model.unfuse_lora()


def disable_lora(model):
    model.disable_adapters()


def delete_lora(model):
    model.enable_adapters()
    model.delete_adapters("default")


def unload_lora(model):
    flux_pipeline(model).unload_lora_weights()


def fuse(model):
    model.fuse_qkv_projections()


def unfuse(model):
    model.unfuse_qkv_projections()


def unload_ip_adapter(pipeline):
    def step(model):
        pipeline(model).unload_ip_adapter()

    return step


def scale_ip_adapter(model):
    flux_pipeline(model).set_ip_adapter_scale(0.25)


def to_float64(model):
    return model.to(torch.float64)


def slice_attention(model):
    model.set_attention_slice("max")


def unslice_attention(model):
    model.set_attention_slice(None)


def deepcopy(model):
    return copy.deepcopy(model)


def pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LORA = [add_lora, fuse_lora, unfuse_lora, disable_lora, delete_lora]
LIVES: dict[str, tuple[str, list[Step]]] = {
    **{f"lora-{case}": (case, LORA) for case in ("flux", "wan", "sd15", "cogview4", "mochi")},
    "lora-pipeline": ("flux", [load_lora, fuse_lora, unfuse_lora, unload_lora]),
    # These models exchange their processors for others,
    **{
        f"fuse-{case}": (case, [fuse, unfuse, fuse])
        for case in ("aura_flow", "cogvideox", "hunyuan_dit", "pixart", "sd3", "sd15")
    },
    # and these keep them.
    **{f"fuse-{case}": (case, [fuse, unfuse, fuse]) for case in ("flux", "wan_i2v", "chroma", "ltx")},
    "lora-and-fuse": ("sd3", [add_lora, fuse_lora, fuse, unfuse]),
    "ip-adapter-flux": (
        "flux",
        [ip_adapters.load_flux, scale_ip_adapter, to_float64, unload_ip_adapter(flux_pipeline)],
    ),
    "ip-adapter-unet": ("sd15", [ip_adapters.load_unet, pickle, unload_ip_adapter(sd_pipeline)]),
    "ip-adapter-sd3": ("sd3", [ip_adapters.load_sd3, deepcopy, unload_ip_adapter(sd3_pipeline)]),
    "slicing": ("sd15", [slice_attention, unslice_attention]),
    **{f"copies-{case}": (case, [deepcopy, pickle]) for case in ("flux2", "mochi", "sana", "sdxl")},
}


def run(model, case):
    inputs = case.inputs(dtype=model.dtype)
    if getattr(model, "encoder_hid_proj", None) or getattr(model, "image_proj", None):
        embeds = ip_adapters.image_embeds(model.dtype)
        if case.name == "sd15":
            inputs["added_cond_kwargs"] = {"image_embeds": [embeds]}
        else:
            inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": embeds if case.name == "sd3" else [embeds]}
    return outputs(model(**inputs))


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a model is at one point of its life without us."""

    outputs: list[torch.Tensor]
    calls: list[str]
    processors: list[type]


_known: dict[str, list[Moment]] = {}


@pytest.fixture
def moments(own_calls):
    """The life of `name` without us: before its first step, and after each."""

    def live(name):
        if name not in _known:
            case, steps = CASES[LIVES[name][0]], LIVES[name][1]
            model = case.build()
            _known[name] = []
            for step in [lambda model: model, *steps]:
                model = step(model) or model
                with own_calls(model) as calls:
                    result = run(model, case)
                processors = [type(module.processor) for _, module in attention_modules_of(model)]
                _known[name].append(Moment(result, calls, processors))
        return _known[name]

    return live


# Models of which each is bound in another way; the others are more of their kinds.
QUICK = (
    "lora-flux", "lora-mochi", "lora-pipeline", "fuse-sd3", "fuse-flux", "lora-and-fuse", "ip-adapter-flux",
    "ip-adapter-unet", "ip-adapter-sd3", "slicing", "copies-mochi",
)  # fmt: skip


def bindings():
    for name, (_, steps) in LIVES.items():
        last = len(steps)
        for start in range(last + 1):
            if name == "slicing" and start == 1:
                continue  # then there is nothing to bind
            for end in sorted({start, min(start + 1, last), last}):
                yield pytest.param(
                    name, start, end, id=f"{name}-{start}-{end}", marks=[pytest.mark.thorough] * (name not in QUICK)
                )


@pytest.mark.filterwarnings("ignore:SlicedAttnProcessor calls neither:UserWarning")
@pytest.mark.parametrize(("name", "start", "end"), bindings())
@torch.no_grad()
def test_bound_from_one_moment_to_another(name, start, end, moments, routed):
    case, steps = CASES[LIVES[name][0]], LIVES[name][1]
    model = case.build()
    bound: set[str] = set()
    for index, (moment, step) in enumerate(zip(moments(name), [lambda model: model, *steps], strict=True)):
        model = step(model) or model
        if index == start:
            model.set_attn_processor(DispatchProcessor("native"))
            bound = {module.name for module in attention_modules(model) if not module.obstacle}
        agrees(model, case, moment, bound, routed)
        if index == end:
            set_attention_provider(model, None)
            bound = set()
            agrees(model, case, moment, bound, routed)


def agrees(model, case, moment, bound, routed):
    """Outputs, processors and calls are those of `moment`, and all calls of the modules in `bound` go through us."""
    routed.clear()
    assert relative_change(run(model, case), moment.outputs) < 1e-6
    # Mochi's own processor attends once for each sample, ours once for all.
    calls = sorted(set(moment.calls)) if case.name == "mochi" else moment.calls
    assert len(routed) == sum(name in bound for name in calls)
    modules = attention_modules(model)
    assert [module.processor for module in modules] == [cls.__name__ for cls in moment.processors]
    for module in modules:
        assert module.provider == ("native" if module.name in bound and not module.obstacle else None)
