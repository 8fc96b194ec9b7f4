"""Exact attention for some of the queries, and its gradients, to compare providers with.

Gradients are those of a loss in which only these queries take part: the gradients of keys and values then need no other
queries either, so that long sequences cost little.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

ROWS = 128
"""Number of queries that are compared, spread over the sequence."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The exact results for some queries."""

    rows: Tensor
    """The queries: indices, `[rows]`."""
    out: Tensor
    """Output of these queries, `[batch, heads, rows, head_dim]`."""
    grad_out: Tensor
    """Gradient of the output of all queries, `[batch, heads, length, head_dim]`, in the dtype of the inputs: zero
    outside of `rows`."""
    grads: tuple[Tensor, Tensor, Tensor] | None
    """Gradients of these queries, and of all keys and values; None if they were not asked for."""

    def error(self, out: Tensor) -> float:
        """Relative error (Euclidean norm) of a provider's output, `[batch, heads, length, head_dim]`."""
        return _relative(out[:, :, self.rows], self.out)

    def gradient_error(self, grads: tuple[Tensor, ...]) -> float:
        """The largest relative error of a provider's gradients of query, key and value."""
        assert self.grads is not None
        query, key, value = grads
        found = (query[:, :, self.rows], key, value)
        return max(_relative(one, other) for one, other in zip(found, self.grads))


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, backward: bool
) -> Reference:
    """Attention in float64 (float32 where the device has no other), one head at a time.

    Args:
        query: `[batch, heads, length, head_dim]`, like key and value.
        mask: as for `attention_dispatch`; None for none.
        causal: whether a query sees only the keys up to its own position.
        backward: whether to compute gradients.
    """
    batch, heads, length, _ = query.shape
    exact = torch.float32 if query.device.type == "mps" else torch.float64
    rows = torch.linspace(0, length - 1, min(ROWS, length), device=query.device).round().long().unique()
    generator = torch.Generator(query.device).manual_seed(1)
    some = torch.randn(batch, heads, len(rows), query.shape[-1], generator=generator, device=query.device)
    grad_out = torch.zeros_like(query)
    grad_out[:, :, rows] = some.to(query.dtype)
    out = torch.empty(batch, heads, len(rows), value.shape[-1], dtype=exact, device=query.device)
    grads = [torch.empty(each.shape, dtype=exact, device=query.device) for each in (out, key, value)]
    seen = torch.arange(length, device=query.device) <= rows[:, None]
    for b in range(batch):
        for h in range(heads):
            inputs = [
                each.detach().to(exact).requires_grad_(backward) for each in (query[b, h, rows], key[b, h], value[b, h])
            ]
            with torch.set_grad_enabled(backward):
                scores = inputs[0] @ inputs[1].T * inputs[0].shape[-1] ** -0.5
                if mask is not None:
                    part = mask.expand(batch, heads, *(mask.shape[2:]))[b, h]
                    part = part[rows] if part.shape[0] > 1 else part
                    scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
                if causal:
                    scores = scores.masked_fill(~seen, -torch.inf)
                result = scores.softmax(dim=-1) @ inputs[2]
            out[b, h] = result.detach()
            if backward:
                found = torch.autograd.grad(result, inputs, grad_out[b, h, rows].to(exact))
                for grad, of_head in zip(grads, found):
                    grad[b, h] = of_head
    return Reference(rows, out, grad_out, (grads[0], grads[1], grads[2]) if backward else None)


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.to(expected.dtype) - expected).norm() / expected.norm()).item()
