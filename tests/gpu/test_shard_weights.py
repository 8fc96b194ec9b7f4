"""Sharded weights over NCCL: results and memory, from CPU memory to the GPUs and back."""

from __future__ import annotations

import os

import pytest
import torch

from diffusers_attn import (
    AttentionProviderError,
    apply_compile,
    apply_cuda_graphs,
    disable_context_parallel,
    enable_context_parallel,
    remove_cuda_graphs,
)

from .several import SEVERAL_GPUS, SIZE

pytestmark = SEVERAL_GPUS
LAYERS = 12
MIB = 2**20


def wan():
    """A Wan model with layers of 26 million weights, in CPU memory."""
    from diffusers import WanTransformer3DModel

    from diffusers_attn.tiny_models.weights import randomize

    config = {"num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096, "text_dim": 256, "freq_dim": 256}
    model = WanTransformer3DModel(**config, num_layers=LAYERS)
    randomize(model, torch.Generator().manual_seed(0))
    return model.eval().to(torch.bfloat16)


def sharded(meshes, compiled):
    """Errors beside one GPU, memory in MiB, and whether the weights come back."""
    os.environ["DIFFUSERS_ATTN_LINKS"] = "typical"  # a measurement would count in the peak of memory
    model = wan()
    values = [weight.clone() for weight in model.parameters()]
    kept = list(model.parameters())  # as by a traceback that a notebook keeps
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, 3, 32, 32, generator=generator).to("cuda", torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 64, 256, generator=generator).to("cuda", torch.bfloat16),
        "timestep": torch.tensor([500], device="cuda"),
        "return_dict": False,
    }
    with torch.no_grad():
        expected = model.to("cuda")(**given)[0].float()
        model.to("cpu")
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        weights = sum(weight.nbytes for weight in model.parameters()) / MIB
        apply_cuda_graphs(model.to("cuda"))
        with pytest.raises(AttentionProviderError, match="remove_cuda_graphs"):
            enable_context_parallel(model, shard_weights=True, verbose=False)
        remove_cuda_graphs(model.to("cpu"))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        report = enable_context_parallel(model, shard_weights=True, verbose=False)
        loading, allocated = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        if compiled:
            apply_compile(model)
        errors = [((model(**given)[0].float() - expected).norm() / expected.norm()).item() for _ in range(4)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        now = torch.cuda.memory_allocated()
        model(**given)
        step = torch.cuda.max_memory_allocated() - now
        disable_context_parallel(model)
    assert all(weight.device.type == "cpu" for weight in kept)
    same = all(torch.equal(now, then) for now, then in zip(model.parameters(), values))
    return max(errors), weights, loading / MIB, allocated / MIB, step / MIB, same, str(report)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_from_cpu_memory_and_back(gpus, compiled):
    for wrong, weights, loading, allocated, step, same, report in gpus.run(SIZE, sharded, compiled=compiled):
        block = weights / LAYERS
        assert wrong < 2e-2 and same
        assert allocated < weights / SIZE * 1.1 and loading < weights / SIZE + 2.5 * block
        assert step < 5 * block  # gathered blocks and activations, not the model
        assert f"in 1/{SIZE} per rank" in report and "no CUDA graphs: its weights are sharded" in report
