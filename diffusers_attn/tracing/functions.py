"""Helpers for an autograd.Function that runs eagerly and under compilers."""

from __future__ import annotations

import torch
from torch import Tensor


def result(tensor: Tensor) -> Tensor:
    """`tensor` in the form in which the forward of an autograd.Function must return it.

    Before PyTorch 2.13, Dynamo silently drops the gradient of a result whose last operation was a `.to` or
    `.contiguous` without effect. A view keeps its gradient.
    """
    return tensor.view_as(tensor) if torch.compiler.is_compiling() else tensor


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A dense copy of `tensor` with the memory order of the dimensions of `like`; `tensor` itself if it has it."""
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(like.ndim)])


class GradientLaidOutAsOutput(torch.autograd.Function):
    """The identity. Its gradient has the memory layout of its input."""

    @staticmethod
    def forward(ctx, out):  # type: ignore[no-untyped-def]
        ctx.order = sorted(range(out.ndim), key=out.stride, reverse=True)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        order = ctx.order
        return grad_out.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


class GradientLaidOutUnderTransforms(torch.autograd.Function):
    """`GradientLaidOutAsOutput` for transforms of torch.func and forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out):  # type: ignore[no-untyped-def]
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        (out,) = inputs
        ctx.order = sorted(range(out.ndim), key=out.stride, reverse=True)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        return GradientLaidOutAsOutput.backward(ctx, grad_out)

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        return tangent.view_as(tangent)
