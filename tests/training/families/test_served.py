"""Pipelines that share a transformer's class with those that are trained, but feed it something else, are refused
before anything is encoded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_attn.training import TrainConfig
from diffusers_attn.training.data import Bucket
from diffusers_attn.training.data.conditions import given_file
from diffusers_attn.training.data.pixels import References, read_references
from diffusers_attn.training.errors import TrainingError
from diffusers_attn.training.families import FAMILIES, family_class, family_of, register_family, registered
from diffusers_attn.training.families.accepted import FURTHER_INPUTS
from diffusers_attn.training.families.flux import Flux
from diffusers_attn.training.loop.preview_checks import check_previews
from diffusers_attn.training.loop.sample_controls import control_frames
from diffusers_attn.training.loss import sample_u
from diffusers_attn.training.model.pipeline import load_pipeline

from ...tiny_pipelines import make
from .. import pipelines
from ..data.media import picture, video
from ..runs import TINY_FLUX

SERVED = {
    "ChromaTransformer2DModel": ("ChromaPipeline",),
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline",),
    "CogView4Transformer2DModel": ("CogView4Pipeline",),
    "Flux2Transformer2DModel": ("Flux2Pipeline", "Flux2KleinPipeline"),
    "FluxTransformer2DModel": ("FluxPipeline", "FluxKontextPipeline", "FluxControlPipeline"),
    "HunyuanVideo15Transformer3DModel": ("HunyuanVideo15Pipeline",),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideoPipeline",),
    "Krea2Transformer2DModel": ("Krea2Pipeline",),
    "LTX2VideoTransformer3DModel": ("LTX2Pipeline",),
    "LTXVideoTransformer3DModel": ("LTXPipeline",),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline",),
    "QwenImageTransformer2DModel": ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline",),
    "SanaTransformer2DModel": ("SanaPipeline",),
    "UNet2DConditionModel": ("StableDiffusionXLPipeline",),
    "WanTransformer3DModel": ("WanPipeline", "WanImageToVideoPipeline"),
    "WanVACETransformer3DModel": ("WanVACEPipeline",),
    "ZImageTransformer2DModel": ("ZImagePipeline",),
}
"""Pipelines that are trained, by the class of their transformer. Diffusers has others for each, with other inputs."""
CLASS = re.compile(r"^class (\w+)\(([^)]*)\)|^        (?:transformer|unet): (\w+)", re.MULTILINE)


def pipelines_of_diffusers():
    """Class name, names of base classes, and class name of the transformer of each pipeline of the installed diffusers.
    They are read from its source, since importing all of them takes half a minute."""
    for file in sorted(Path(diffusers.__file__).parent.glob("pipelines/**/pipeline_*.py")):
        name = bases = ""
        for found in CLASS.finditer(file.read_text()):
            if found[1]:
                name, bases = found[1], found[2]
            elif name.endswith("Pipeline"):
                yield name, {each.strip() for each in bases.split(",")}, found[3]


def test_pipelines_that_share_a_transformer_are_refused_by_name():
    assert set(FAMILIES) == set(SERVED)
    served = {name for names in SERVED.values() for name in names}
    found = set()
    for name, bases, transformer in pipelines_of_diffusers():
        if transformer not in SERVED:
            continue
        found.add((name, transformer))
        assert not bases & served, f"{name} would be trained, since it is a {bases & served}"
        pipeline = type(name, (), {})
        if name in SERVED[transformer]:
            one = family_class(pipeline, transformer)
            assert one is family_class(type("MyPipeline", (pipeline,), {}), transformer)
            assert name in one.pipelines and all(hasattr(diffusers, each) for each in one.pipelines)
            continue
        with pytest.raises(TrainingError) as refused:
            family_class(pipeline, transformer)
        message = str(refused.value)
        supported = message.partition("supports only ")[2].partition(", since")[0]
        assert f"is a {name}. " in message and set(supported.split(" and ")) == set(SERVED[transformer])
        assert all(each in message for each in served)
    assert {(name, transformer) for transformer, names in SERVED.items() for name in names} <= found
    assert {"FluxFillPipeline", "FluxControlPipeline", "WanVideoToVideoPipeline"} <= {name for name, _ in found}


def test_it_is_refused_before_weights_are_read(tmp_path):
    """The folder has no weights at all."""
    index = json.loads((TINY_FLUX / "model_index.json").read_text()) | {"_class_name": "FluxFillPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    one = SimpleNamespace(any=lambda flag: flag)
    with pytest.raises(TrainingError, match=r"--model is a FluxFillPipeline\."):
        load_pipeline(str(tmp_path), revision=None, dtype=torch.float32, ranks=one, local_main=True)


def test_experts_are_named_before_weights_are_read(tmp_path):
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer_2": index["transformer"]}))
    one = SimpleNamespace(any=lambda flag: flag)
    with pytest.raises(TrainingError, match="(transformer_2).*Give --expert high or --expert low"):
        load_pipeline(str(tmp_path), revision=None, dtype=torch.float32, ranks=one, local_main=True)
    with pytest.raises(TrainingError, match="--expert low: this pipeline has one transformer"):
        family_of(make("wan"), expert="low")


def test_each_expert_is_trained_at_its_noise_levels():
    pipeline = pipelines.make("wan_a14b")
    high, low = (family_of(pipeline, expert=each) for each in ("high", "low"))
    assert high.transformer is pipeline.transformer and low.transformer is pipeline.transformer_2
    for family in (high, low):
        [levels] = family.levels.values()
        u = sample_u("uniform", [torch.Generator().manual_seed(i) for i in range(200)], levels=levels)
        timesteps = family.objective.level(u, 1).timestep
        assert (timesteps.min() >= 875) == (family is high) and (timesteps.max() <= 875) == (family is low)
        assert timesteps.max() - timesteps.min() > (100 if family is high else 800)
    with pytest.raises(TrainingError, match="hardly ever draws a noise level"):
        sample_u("logit_normal", [torch.Generator()], logit_mean=-9.0, logit_std=0.1, levels=high.levels["transformer"])


def test_samples_from_an_image_need_one_for_each_prompt(tmp_path):
    def check(family, **settings):
        check_previews(TrainConfig(model="model", data="data", **settings), family)

    family = family_of(pipelines.make("wan_i2v"))
    check(family)
    with pytest.raises(TrainingError, match="'a': WanImageToVideoPipeline needs an image for each sample"):
        check(family, validation_prompts=["a"])
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(TrainingError, match=r"no\.png cannot be read as an image"):
        check(family, validation_prompts=["a"], validation_images=[str(tmp_path / "no.png")])
    with pytest.raises(TrainingError, match="WanPipeline takes no image"):
        check(family_of(make("wan")), validation_prompts=["a"], validation_images=["a.png"])
    with pytest.raises(TrainingError, match="nothing is left to train"):
        family.encode(torch.zeros(1, 3, 1, 32, 32))


def _transformer(name, **others):
    pipeline = make(name)
    config = {**pipeline.transformer.config, **others, "_use_default_values": []}
    return pipeline, type(pipeline.transformer).from_config(config)


@pytest.mark.parametrize(
    ("name", "others", "message"),
    [
        ("wan", {"in_channels": 36}, "has 36 input channels, but the VAE's latents have 16"),
        ("wan", {"image_dim": 8, "added_kv_proj_dim": 64}, "needs an image embedding"),
        ("cogvideox", {"in_channels": 32}, "has 32 input channels, but the VAE's latents have 16"),
        ("cogvideox", {"ofs_embed_dim": 16}, "needs an offset"),
        ("cogview4", {"in_channels": 32}, "has 32 input channels, but the VAE's latents have 16"),
    ],
)
def test_what_the_transformer_expects_is_compared_with_what_is_fed(name, others, message):
    """Of a pipeline that says it is one of those that are served."""
    pipeline, transformer = _transformer(name, **others)
    pipeline.register_modules(transformer=transformer)
    with pytest.raises(TrainingError, match=f"{message}.*{type(pipeline).__name__}"):
        family_of(pipeline)


def test_every_name_of_a_further_input_is_one_of_a_configuration():
    names = "CogVideoXTransformer3D WanVACETransformer3D FluxTransformer2D HunyuanVideoTransformer3D"
    names += " UNet2DCondition"
    known = set()
    for name in (*names.split(), "HunyuanVideo15Transformer3D"):
        model = getattr(diffusers, f"{name}Model")
        known |= set(model._get_init_keys(model))
    assert set(FURTHER_INPUTS) <= known


def test_guidance_is_told_to_models_that_take_it_only():
    pipeline = diffusers.FluxPipeline.from_pretrained(TINY_FLUX, dtype=torch.float32)
    assert family_of(pipeline).guidance == 1.0
    with pytest.raises(TrainingError, match=r"--guidance 3\.5: this FluxTransformer2DModel has no guidance"):
        family_of(pipeline, guidance=3.5)
    pipeline.transformer.register_to_config(guidance_embeds=True)
    assert family_of(pipeline, guidance=3.5).guidance == 3.5


def test_a_scheduler_for_another_prediction():
    pipeline = make("cogvideox")
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(TrainingError, match="is 'epsilon', but CogVideoX is trained with 'v_prediction'"):
        family_of(pipeline)


def test_schedulers_and_unets_of_other_models():
    pipeline = pipelines.make("sdxl")
    pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(TrainingError, match="is 'sample', but StableDiffusionXL is trained with 'epsilon' or 'v_pred"):
        family_of(pipeline)
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(TrainingError, match="EDMEulerScheduler has no alphas_cumprod"):
        family_of(pipeline)
    pipeline = pipelines.make("sdxl")
    with pytest.raises(TrainingError, match=r"shift=2\.0.*UNet2DConditionModel"):
        family_of(pipeline, shift=2.0)
    with pytest.raises(TrainingError, match="--max_sequence_length 50: this pipeline always encodes 77"):
        family_of(pipeline, max_sequence_length=50)
    pipeline.unet.register_to_config(addition_embed_type=None)
    with pytest.raises(TrainingError, match="addition_embed_type is None"):
        family_of(pipeline)
    with pytest.raises(
        TrainingError, match=r"--min_snr_gamma 5\.0: WanTransformer3DModel is trained with rectified flow"
    ):
        family_of(make("wan"), min_snr_gamma=5.0)


def test_more_text_than_the_model_takes():
    pipeline = make("cogvideox")
    assert family_of(pipeline).max_sequence_length == 21
    with pytest.raises(TrainingError, match="--max_sequence_length 22: this CogVideoX.* accepts up to 21 text tokens"):
        family_of(pipeline, max_sequence_length=22)


def test_a_family_of_ones_own_says_what_it_serves():
    class Kontext(Flux):
        pipelines = ("FluxKontextPipeline",)

    try:
        register_family("FluxTransformer2DModel", Kontext)
        assert family_class(diffusers.FluxKontextPipeline, "FluxTransformer2DModel") is Kontext
        with pytest.raises(TrainingError, match="supports only FluxKontextPipeline"):
            family_class(diffusers.FluxPipeline, "FluxTransformer2DModel")
    finally:
        registered.pop("FluxTransformer2DModel", None)


def test_samples_of_wan_vace_are_drawn_from_a_control_or_images(tmp_path):
    family = family_of(pipelines.make("wan_vace"))
    image, control = str(picture(tmp_path / "a.png")), str(video(tmp_path / "a.mp4", frames=12, fps=8))
    short, broken = str(video(tmp_path / "short.mp4", frames=3, fps=8)), tmp_path / "no.mp4"
    broken.write_text("no video")

    def check(of, **preview):
        (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a", **preview}]))
        check_previews(TrainConfig(model="model", data="data", validation_prompts=[str(tmp_path / "prompts.json")]), of)

    for accepted in ({"control": control}, {"image": [image, image]}, {"control": image, "control_mask": image}):
        check(family, **accepted)
    with pytest.raises(TrainingError, match="draws from a control or from images"):
        check(family)
    with pytest.raises(TrainingError, match="control_mask .* without a control"):
        check(family, image=[image], control_mask=image)
    with pytest.raises(TrainingError, match=r"control .*no\.mp4 cannot be read"):
        check(family, control=str(broken))
    with pytest.raises(TrainingError, match="WanPipeline takes none here"):
        check(family_of(make("wan")), control=control)

    frames = control_frames(control, Bucket(5, 32, 48), 8.0)
    assert len(frames) == 5 and frames[0].size == (48, 32)
    blue = [np.asarray(each)[-1, -1, 2].astype(int) for each in frames]
    assert np.abs(np.array(blue) - 20 * np.arange(5)).max() <= 8
    assert len({each.tobytes() for each in control_frames(image, Bucket(3, 32, 48), 8.0)}) == 1
    with pytest.raises(TrainingError, match=r"short\.mp4 cannot be used for a sample of 5 frames"):
        control_frames(short, Bucket(5, 32, 48), 8.0)


def test_reference_images_of_wan_vace_get_the_borders_of_its_pipeline(tmp_path):
    """Of pictures whose sides are multiples of 8, to which the pipeline resizes others first."""
    pipeline = pipelines.make("wan_vace")
    for size in ((32, 56), (56, 32), (64, 48), (128, 40)):
        file = picture(tmp_path / f"{size[0]}.png", width=size[0], height=size[1])
        _, _, [[theirs]] = pipeline.preprocess_conditions(
            reference_images=Image.open(file), height=48, width=64, num_frames=1, dtype=torch.float32
        )
        [ours] = read_references([given_file(file)], Bucket(1, 48, 64), References(borders=True))
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_wan_vace_learns_the_latents_of_its_references_before_those_of_the_video():
    family = family_of(pipelines.make("wan_vace"))
    draw = torch.Generator().manual_seed(0)
    pixels, references = (torch.rand(2, *shape, generator=draw) * 2 - 1 for shape in ((3, 9, 32, 48), (2, 3, 32, 48)))
    found = family.encode(pixels, references=references)
    assert found["latents_mean"].shape == (2, 16, 5, 4, 6) and found["control"].shape == (2, 96, 5, 4, 6)
    for name, encoded in family_of(make("wan")).encode(pixels).items():
        assert torch.allclose(found[name][:, :, 2:], encoded, atol=1e-5)
        for i in range(2):  # each goes before the others, as in the pipeline
            one = family_of(make("wan")).encode(references[:, i, :, None])[name]
            assert torch.allclose(found[name][:, :, 1 - i : 2 - i], one, atol=1e-5)
    assert torch.allclose(found["control"][:, :16, :2], family.normalise(found["latents_mean"][:, :, :2]), atol=1e-4)


def test_wan_vace_with_two_experts():
    pipeline = pipelines.make("wan_vace")
    pipeline.register_modules(transformer_2=type(pipeline.transformer).from_config(pipeline.transformer.config))
    pipeline.register_to_config(boundary_ratio=0.875)
    family = family_of(pipeline, expert="both")
    assert list(family.trained) == ["transformer", "transformer_2"]
    assert family.levels["transformer"][0] == family.levels["transformer_2"][1] == pytest.approx(0.7)
    pipeline.transformer.register_to_config(vace_in_channels=40)
    with pytest.raises(TrainingError, match="has 40 channels for the control, but the pipeline makes 96"):
        family_of(pipeline, expert="high")
