"""Attention and its gradients by the definition, in float64: what the kernels of this folder compute with."""

import math

import torch


def scores(q, k, scale, causal):
    """`[batch, heads, query_len, key_len]`, from `[batch, length, heads, head_dim]`."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    result = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    if causal:
        result = result.masked_fill(torch.ones(result.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return result


def forward(q, k, v, scale, causal):
    """The output in the query's dtype, and the lse, float32 `[batch, heads, query_len]`."""
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).double()
    weights = scores(q, k, scale, causal)
    lse = weights.logsumexp(dim=-1)
    weights = (weights - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype), lse.float()


def backward(dout, q, k, v, out, lse, scale, causal):
    """The gradients of query, key and value."""
    kv_heads, groups = k.shape[2], q.shape[2] // k.shape[2]
    weights = (scores(q, k, scale, causal) - lse.double().unsqueeze(-1)).exp()
    dout, out = dout.double(), out.double()
    k, v = (each.repeat_interleave(groups, dim=2).double() for each in (k, v))
    delta = (dout * out).sum(dim=-1).transpose(1, 2).unsqueeze(-1)
    slope = weights * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta) * scale
    dq = torch.einsum("bhqk,bkhd->bqhd", slope, k)
    dk = torch.einsum("bhqk,bqhd->bkhd", slope, q.double()).unflatten(2, (kv_heads, groups)).sum(dim=3)
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, dout).unflatten(2, (kv_heads, groups)).sum(dim=3)
    return dq, dk, dv


def packed(cu_seqlens):
    """The positions of each sequence in a packed tensor."""
    return [slice(*each) for each in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]


def packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal):
    """The output, and the lse, float32 `[heads, total]`."""
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])
    for query, key in zip(packed(cu_seqlens_q), packed(cu_seqlens_k)):
        part, part_lse = forward(q[None, query], k[None, key], v[None, key], scale, causal)
        out[query], lse[:, query] = part[0], part_lse[0]
    return out, lse


def packed_backward(dout, q, k, v, out, lse, grads, cu_seqlens_q, cu_seqlens_k, scale, causal):
    """Writes the gradients of query, key and value at the positions of the sequences."""
    for query, key in zip(packed(cu_seqlens_q), packed(cu_seqlens_k)):
        inputs = dout[None, query], q[None, query], k[None, key], v[None, key], out[None, query], lse[None, :, query]
        for grad, part, where in zip(grads, backward(*inputs, scale, causal), (query, key, key)):
            grad[where] = part[0]
