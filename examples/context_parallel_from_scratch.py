"""Ulysses and ring attention from scratch: context parallelism in one file.

    torchrun --nproc_per_node 2 examples/context_parallel_from_scratch.py

Every rank holds a shard of the sequence, and attention needs all of it. Ulysses (arXiv 2309.14509) exchanges tokens for
heads: each rank then attends over the whole sequence, for its share of the heads, with any kernel. Ring attention
(arXiv 2310.01889) keeps the queries and passes keys and values from rank to rank: each rank attends to one shard at a
time and merges the results. The script compares both with attention in one process, forward and backward.

The library does the same in `diffusers_attn/context_parallel/`, and more: uneven shards, masks, causality, transfers
that overlap with computation, and a ring whose backward fetches the shards again instead of keeping them in memory.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from diffusers_attn import attention_dispatch, attention_provider


class AllToAll(torch.autograd.Function):
    """Rank r sends row s of dimension 0 to rank s and receives row r of each. Its adjoint is the same exchange."""

    @staticmethod
    def forward(ctx, rows):  # type: ignore[no-untyped-def]
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, rows.contiguous())
        return received

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return AllToAll.apply(grad)


class Rotate(torch.autograd.Function):
    """Sends a tensor `step` ranks further around the ring and receives one. Its adjoint sends the gradient back."""

    @staticmethod
    def forward(ctx, tensor, step):  # type: ignore[no-untyped-def]
        ctx.step = step
        rank, ranks = dist.get_rank(), dist.get_world_size()
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        send = dist.P2POp(dist.isend, tensor, (rank + step) % ranks)
        receive = dist.P2POp(dist.irecv, received, (rank - step) % ranks)
        for request in dist.batch_isend_irecv([send, receive]):
            request.wait()
        return received

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return Rotate.apply(grad, -ctx.step), None


def tokens_to_heads(tensor: Tensor) -> Tensor:
    """From `[batch, all heads, this rank's tokens, head_dim]` to `[batch, this rank's heads, all tokens, head_dim]`."""
    rows = tensor.unflatten(1, (dist.get_world_size(), -1)).movedim(1, 0)  # [rank, batch, its heads, tokens, ...]
    return AllToAll.apply(rows).movedim(0, 2).flatten(2, 3)


def heads_to_tokens(tensor: Tensor) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    rows = tensor.unflatten(2, (dist.get_world_size(), -1)).movedim(2, 0)  # [rank, batch, heads, its tokens, ...]
    return AllToAll.apply(rows).movedim(0, 1).flatten(1, 2)


def ulysses_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks, `[batch, heads, this rank's tokens, head_dim]`.

    The number of heads must be a multiple of the number of ranks.
    """
    query, key, value = tokens_to_heads(query), tokens_to_heads(key), tokens_to_heads(value)
    return heads_to_tokens(attention_dispatch(query, key, value))


def partial_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output over these keys, and the lse: the log-sum-exp of each query's scores, `[batch, heads, query_len, 1]`.

    Written out, because `attention_dispatch` returns no lse, like `F.scaled_dot_product_attention`.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return (scores - lse).exp() @ value, lse


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges results over two sets of keys into the result over both: a mean, weighted by exp(lse)."""
    total = torch.logaddexp(lse, part_lse)
    return out * (lse - total).exp() + part_out * (part_lse - total).exp(), total


def ring_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks, `[batch, heads, this rank's tokens, head_dim]`."""
    out, lse = partial_attention(query, key, value)
    held = torch.stack((key, value))  # one message instead of two
    for _ in range(dist.get_world_size() - 1):
        held = Rotate.apply(held, 1)
        out, lse = merge(out, lse, *partial_attention(query, *held))
    return out


def largest_error(attention, inputs: list[Tensor], grad_out: Tensor) -> float:  # type: ignore[no-untyped-def]
    """The largest error of the output and gradients on any rank, relative to attention in one process."""

    def shard(tensor: Tensor) -> Tensor:
        return tensor.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]

    query, key, value = inputs
    expected_out = attention_dispatch(query, key, value)
    expected = (expected_out, *torch.autograd.grad(expected_out, inputs, grad_out))
    shards = [shard(tensor).detach().requires_grad_() for tensor in inputs]
    out = attention(*shards)
    found = (out, *torch.autograd.grad(out, shards, shard(grad_out)))
    error = torch.stack([(one - shard(other)).abs().max() for one, other in zip(found, expected)]).max()
    error = error.nan_to_num(nan=torch.inf)  # a maximum over ranks may pass a NaN over
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return error.item()


def main() -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks, random = dist.get_world_size(), torch.Generator().manual_seed(0)
    shape = (2, 2 * ranks, 16 * ranks, 8)  # batch, heads, tokens, head_dim
    query, key, value, grad_out = (torch.randn(shape, generator=random).double().to(device) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    failed = False
    for attention in (ulysses_attention, ring_attention):
        with attention_provider("native"):
            error = largest_error(attention, inputs, grad_out)
        failed |= not error < 1e-12
        if dist.get_rank() == 0:
            print(f"{attention.__name__} on {ranks} ranks: largest error of output and gradients {error:.0e}")
    dist.destroy_process_group()
    sys.exit("context parallelism and one process differ" if failed else 0)


if __name__ == "__main__":
    main()
