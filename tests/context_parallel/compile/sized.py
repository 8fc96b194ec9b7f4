"""A small model with two sequences that every block joins, at any size; and walks over sizes that count its graphs."""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import CPAttention, CPInput, CPOutput, apply_compile, attention_dispatch
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather

from ..models import MESHES

JOINED = ("text", "image")


class Attention(nn.Module):
    processor = None  # what makes it one, for a plan that says nothing of it

    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.to_qkv = nn.Linear(24, 72)

    def forward(self, tokens, mask=None):
        query, key, value = self.to_qkv(tokens).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None, :]
        return attention_dispatch(query, key, value, mask, is_causal=self.causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.attn = Attention(causal)
        self.ff = nn.Linear(24, 24)

    def forward(self, text, image, mask=None):
        tokens = torch.cat([text, image], dim=1)
        tokens = tokens + self.ff(self.attn(tokens, mask).tanh())
        return tokens[:, : text.shape[1]].contiguous(), tokens[:, text.shape[1] :].contiguous()


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, causal=False, blocks=1):
        super().__init__()
        self.embed = nn.Linear(6, 24)
        self.blocks = nn.ModuleList([Block(causal) for _ in range(blocks)])
        self.out = nn.Linear(24, 5)

    def forward(self, text, image, mask=None):
        text, image = self.embed(text), self.embed(image)
        for block in self.blocks:
            text, image = block(text, image, mask)
        return self.out(image)


def plan(says_attention=True):
    split = {"text": CPInput(1, 3, sequence="text"), "image": CPInput(1, 3, sequence="image")}
    found = {"": {**split, "mask": CPInput(1, 2, sequence=JOINED)}, "out": CPOutput(1, 3, sequence="image")}
    return {**found, "blocks.*.attn": CPAttention(JOINED)} if says_attention else found


def inputs(text, image, masked):
    drawn = torch.Generator().manual_seed(text * 100 + image)
    given = {
        "text": torch.randn(2, text, 6, generator=drawn).double(),
        "image": torch.randn(2, image, 6, generator=drawn).double(),
    }
    return {**given, "mask": torch.rand(2, text + image, generator=drawn) > 0.2} if masked else given


def run(model, given, training):
    """Output, and gradients if it is training."""
    with torch.set_grad_enabled(training):
        out = model(**given)
    grads = torch.autograd.grad(out.square().mean(), list(model.parameters())) if training else ()
    return out.detach(), torch.cat([torch.zeros(1, dtype=out.dtype), *(grad.flatten() for grad in grads)])


def walk(
    meshes, mesh, sizes, scope="regional", backend="eager", masked=False, causal=False, training=False,
    says_attention=True, blocks=1, **options,
):  # fmt: skip
    """Graphs after every size on this rank, or in one process (`mesh` None); and the largest error of output and
    gradient."""
    torch.manual_seed(0)
    model = Model(causal, blocks).double()
    drawn = [inputs(*size, masked) for size in sizes]
    expected = [run(model, given, training) for given in drawn]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    apply_compile(model, scope, backend=counter, **options)
    if mesh is not None:
        ring, ulysses, method = MESHES[mesh]
        mesh = meshes(ring, ulysses, rotate_method=method)
        apply_context_parallel(model, mesh, plan(says_attention))
    counts, errors = [], [0.0]
    for given, (out, grad) in zip(drawn, expected):
        found, found_grad = run(model, given, training)
        counts.append(counter.frame_count)
        if mesh is not None:
            found_grad = gather(found_grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh).mean(dim=0)
        errors += [(found - out).abs().max().item(), (found_grad - grad).abs().max().item()]
    remove_context_parallel(model)
    torch._dynamo.reset()
    return counts, max(errors)
