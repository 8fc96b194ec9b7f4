"""Pipelines with ControlNets: these are split as well, and the latents are those of one process."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch

from diffusers_attn import disable_context_parallel, enable_context_parallel
from diffusers_attn.context_parallel.hooks.apply import applied_tracker
from tests.zoo import CASES

MODEL = Path(__file__).parents[2] / "examples" / "tiny_flux"
SIZE = {"height": 64, "width": 48, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}
PICTURE = torch.linspace(-1, 1, 3 * 64 * 48, dtype=torch.float64).reshape(1, 3, 64, 48)


def random(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # results of a new ControlNet are zero
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.double().eval()


def flux():
    """Two ControlNets, and guidance by a second call of the transformer."""
    parts = diffusers.FluxPipeline.from_pretrained(MODEL).components
    config = {**parts["transformer"].config, "num_layers": 1, "num_single_layers": 1}
    nets = [random(diffusers.FluxControlNetModel.from_config(config)) for _ in range(2)]
    pipe = diffusers.FluxControlNetPipeline(
        **{name: parts[name] for name in parts if name not in ("image_encoder", "feature_extractor")},
        controlnet=diffusers.FluxMultiControlNetModel(nets),
    ).to(torch.float64)
    call = {"prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 2.0, "max_sequence_length": 32}
    picture = PICTURE[..., :16, :12]
    call |= {"height": 16, "width": 12, "control_image": [picture, -picture]}
    return pipe, nets, call | {"controlnet_conditioning_scale": [0.5, 0.3]}


def sd3():
    """One ControlNet, with both branches of guidance in a batch of as many samples as the ControlNet has blocks."""
    net = random(CASES["sd3_controlnet"].build(dtype=torch.float64))
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    pipe = diffusers.StableDiffusion3ControlNetPipeline(
        transformer=CASES["sd3"].build(dtype=torch.float64).double().eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=random(vae),
        controlnet=net,
        **dict.fromkeys(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
    )
    generator = torch.Generator().manual_seed(2)
    call = {}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(2, 9, 32, generator=generator, dtype=torch.float64)
        call[f"{prefix}pooled_prompt_embeds"] = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    return pipe, [net], call | {"control_image": PICTURE, "controlnet_conditioning_scale": 0.5, "guidance_scale": 4.0}


def draw(pipe, call):
    torch.manual_seed(0)  # for what the VAE draws
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(generator=torch.Generator().manual_seed(0), **SIZE | call)[0]


def compared(meshes, make, **degrees):
    """The report's models, the error of two calls, and the tokens of each ControlNet's first block on this rank."""
    pipe, nets, call = make()
    expected = draw(pipe, call)
    unlike = (draw(pipe, call | {"control_image": PICTURE.flip(2)} if len(nets) == 1 else call) - expected).abs().max()
    report = enable_context_parallel(pipe, verbose=False, **degrees)
    tokens = []
    for net in nets:
        net.transformer_blocks[0].attn.to_q.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2]))
    found = [(draw(pipe, call) - expected).abs().max() / expected.abs().max() for _ in range(2)]
    disable_context_parallel(pipe)
    left = [applied_tracker(net) for net in nets]
    return report.models, max(found).item(), {tuple(shape) for shape in tokens}, left, unlike.item()


def test_two_controlnets_of_flux(pool):
    for models, error, tokens, left, _ in pool.run(4, compared, make=flux, guidance_degree=2):
        assert [name.partition(" ")[0] for name in models] == ["transformer", "controlnet.nets.0", "controlnet.nets.1"]
        assert error < 1e-10
        assert tokens == {(1, 12)}  # of 48, on all ranks
        assert left == [None, None]


def test_a_controlnet_of_sd3_with_guidance_in_one_batch(pool):
    for models, error, tokens, _, effect in pool.run(4, compared, make=sd3):
        assert len(models) == 2 and error < 1e-10 < effect
        assert tokens == {(1, 12)}  # of four samples
