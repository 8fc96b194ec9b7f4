"""LoRA adapters on sharded weights: the results and gradients of one process."""

from __future__ import annotations

import torch

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel

from ..test_quickstart import MODEL
from .test_enable import build, error, inputs, mean_over_ranks, output


def lora(meshes):
    """Adapters from before and after: what differs from one process, and from its weights."""
    from peft import LoraConfig

    rank = torch.distributed.get_rank()
    sharded, plain = build("flux"), build("flux")
    answers = {}

    def adapt(model, name, seed, *layers):
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False), name)
        for path, weight in model.named_parameters():
            if f".{name}." in path:
                weight.data = weight.data.double()
                assert type(weight.data) is torch.Tensor  # it is no shard

    def compare(name, rank=rank):
        with torch.no_grad():
            answers[name] = error(output(sharded, inputs("flux", rank)), output(plain, inputs("flux")))

    for model in (sharded, plain):
        adapt(model, "before", 1, "to_q", "to_out.0")
    enable_context_parallel(sharded, shard_weights=True, mesh=meshes.lines[2], verbose=False)
    compare("before")
    for model in (sharded, plain):
        adapt(model, "after", 2, "to_k", "proj_mlp")
        model.set_adapters(["before", "after"], [0.5, 2.0])
    compare("after")
    for model in (sharded, plain):
        model.delete_adapters("before")
    compare("deleted")
    try:
        config = LoraConfig(r=2, target_modules=["to_v"], use_dora=True)
        sharded.add_adapter(config, "from weights")
    except AttentionProviderError as refused:
        message = str(refused)
    sharded.delete_adapters("from weights")
    compare("refused")
    disable_context_parallel(sharded)
    compare("not sharded", rank=0)
    return answers, sum(error(a, b) for a, b in zip(sharded.parameters(), plain.parameters())), message


def test_adapters_from_before_and_after(pool):
    for answers, weights, message in pool.run(2, lora):
        assert len(answers) == 5 and max(answers.values()) < 1e-10, answers
        assert weights == 0.0
        assert "is initialised from the model's weights" in message


def lora_files(meshes):
    """A pipeline's adapters from files: before and after, hot-swapped, scaled and unloaded. Gradients of an adapter."""
    from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline, FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    def pipeline():
        made = FluxPipeline.from_pretrained(MODEL, local_files_only=True)
        made.set_progress_bar_config(disable=True)
        return made

    def config(*layers):
        return LoraConfig(r=4, target_modules=list(layers), init_lora_weights=False)

    def file(seed):
        torch.manual_seed(seed)
        source, found = pipeline(), {}
        source.transformer.add_adapter(config("to_q", "proj_mlp", "x_embedder"))
        source.text_encoder.add_adapter(config("q_proj", "out_proj"))
        for name in ("transformer", "text_encoder"):
            for path, weight in get_peft_model_state_dict(getattr(source, name)).items():
                found[f"{name}.{path}"] = weight * 0.3
        return found

    def draw(pipeline, **options):
        size = {"height": 64, "width": 64, "max_sequence_length": 32, "num_inference_steps": 2}
        generator = torch.Generator().manual_seed(0)
        return pipeline("a cat", **size, generator=generator, output_type="latent", **options).images

    sharded, plain = pipeline(), pipeline()
    both, answers = (sharded, plain), {}

    def compare(name, **options):
        answers[name] = error(draw(sharded, **options), draw(plain, **options))

    for each in both:
        each.load_lora_weights(file(1), adapter_name="before")
    enable_context_parallel(sharded, shard_weights=True, mesh=meshes.lines[2], verbose=False)
    compare("before")
    for each in both:
        each.load_lora_weights(file(2), adapter_name="after")
        each.set_adapters(["before", "after"], [0.5, 2.0])
    compare("after", joint_attention_kwargs={"scale": 0.7})
    swapped = {name: weight for name, weight in file(3).items() if name.startswith("transformer.")}
    for each in both:
        each.load_lora_weights(swapped, adapter_name="before", hotswap=True)
    compare("swapped")
    for each in both:
        each.unload_lora_weights()
    compare("unloaded")
    for each in both:  # caches find blocks by their classes
        each.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    compare("cached")
    for each in both:
        each.transformer.disable_cache()
    sibling = FluxImg2ImgPipeline.from_pipe(sharded)  # takes models by their classes
    assert sibling.transformer is sharded.transformer and sibling.text_encoder is sharded.text_encoder
    grads = []
    given = flux_inputs(plain.transformer.config)
    for each in both:
        each.transformer.requires_grad_(False).train()
        torch.manual_seed(4)
        each.transformer.add_adapter(config("to_q", "to_k"))
        if each is sharded:
            each.transformer.enable_gradient_checkpointing()
        each.transformer(**given)[0].square().mean().backward()
        weights = [weight for name, weight in each.transformer.named_parameters() if "lora" in name]
        grads.append(torch.cat([weight.grad.flatten() for weight in weights]))
    answers["gradients"] = error(mean_over_ranks(grads[0], meshes.lines[2].get_group()), grads[1])
    disable_context_parallel(sharded)
    return answers


def flux_inputs(config):
    random = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 16, config.in_channels, generator=random),
        "encoder_hidden_states": torch.randn(1, 8, config.joint_attention_dim, generator=random),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=random),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }


def test_adapters_from_files_and_their_gradients(pool):
    for answers in pool.run(2, lora_files):
        assert len(answers) == 6 and max(answers.values()) < 1e-5, answers
