"""Attention of Flux at 1024², forward and backward as its blocks call it, against float64. One provider per process:
after an illegal memory access, no other call of the process works.

    CUDA_LAUNCH_BLOCKING=1 python -m tests.gpu.flux_attention auto
    CUDA_LAUNCH_BLOCKING=1 python -m tests.gpu.flux_attention auto after_torch   # PyTorch's own function trains before
    compute-sanitizer python -m tests.gpu.flux_attention torch       # PyTorch's function as it is, without this library

Prints the errors as JSON, by kind of block.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_attn import attention_dispatch, attention_provider

from .. import reference

TEXT, TOKENS, HEADS, HEAD_DIM, MLP = 512, 4608, 24, 128, 12288
BLOCKS = ("single", "double", "double", "single")
"""In the order of a backward, then in the other order: a kernel that keeps the layout of its first gradient reads the
second one wrongly."""


def main(provider: str, before: str | None = None) -> None:
    errors: dict[str, float] = {}
    if before is not None:
        _train_without_library()
    attend = F.scaled_dot_product_attention if provider == "torch" else attention_dispatch
    with attention_provider("native" if provider == "torch" else provider):
        for number, block in enumerate(BLOCKS):
            torch.manual_seed(number)
            inputs = [_tokens().requires_grad_() for _ in range(3)]
            out = attend(*(each.transpose(1, 2) for each in inputs)).transpose(1, 2)
            expected, wanted = _expected(inputs, _grad(block, number))
            grads = torch.autograd.grad(_block(block, out), inputs, _grad(block, number))
            torch.cuda.synchronize()
            for name, ours, true in zip(("out", "dq", "dk", "dv"), (out, *grads), (expected, *wanted)):
                errors[f"{number} {block} {name}"] = reference.relative_error(ours, true)
    print(json.dumps(errors))


def _train_without_library() -> None:
    """One backward of PyTorch's own function, for the gradient of a single block. PyTorch keeps its preparations."""
    inputs = [_tokens().requires_grad_() for _ in range(3)]
    out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in inputs)).transpose(1, 2)
    torch.autograd.grad(_block("single", out), inputs, _grad("single", 0))
    torch.cuda.synchronize()


def _tokens() -> Tensor:
    return torch.randn(1, TOKENS, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)


def _block(block: str, out: Tensor) -> Tensor:
    """What follows attention. The gradient of a single block's output lies between those of its other features; that
    of a double block's has no gaps."""
    flat = out.flatten(2)
    if block == "single":
        return torch.cat([flat, flat.new_zeros(1, TOKENS, MLP)], dim=2)
    text, image = flat.split([TEXT, TOKENS - TEXT], dim=1)
    return torch.cat([image, text], dim=1)


def _grad(block: str, number: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(number)
    width = HEADS * HEAD_DIM + (MLP if block == "single" else 0)
    return torch.randn(1, TOKENS, width, device="cuda", dtype=torch.bfloat16, generator=generator)


def _expected(inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in float64, one head at a time."""
    block = "single" if grad.shape[2] > HEADS * HEAD_DIM else "double"
    leaf = torch.zeros(1, TOKENS, HEADS, HEAD_DIM, device="cuda", dtype=torch.float64, requires_grad=True)
    (grad_out,) = torch.autograd.grad(_block(block, leaf), leaf, grad.double())
    outs, grads = [], []
    for head in range(HEADS):
        one = [each[:, :, head : head + 1].detach().double().requires_grad_() for each in inputs]
        out = reference.attention(*(each.transpose(1, 2) for each in one))[0].transpose(1, 2)
        grads.append(torch.autograd.grad(out, one, grad_out[:, :, head : head + 1]))
        outs.append(out.detach())
    return torch.cat(outs, 2), [torch.cat(each, 2) for each in zip(*grads)]


if __name__ == "__main__":
    main(*sys.argv[1:])
