"""What autograd.Functions need between eager mode and compilers."""

from __future__ import annotations

import torch
from torch import Tensor


def result(tensor: Tensor) -> Tensor:
    """`tensor`, to be returned by the forward of an autograd.Function.

    Dynamo before PyTorch 2.13 gives no gradient, without a word, to a result on which `.to` or `.contiguous` was called
    last and had nothing to do. A view has a gradient.
    """
    return tensor.view_as(tensor) if torch.compiler.is_compiling() else tensor


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, without gaps in memory, its dimensions in the order in which `like` has them there."""
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(like.ndim)])


class GradientLaidOutAsOutput(torch.autograd.Function):
    """The identity, whose gradient is in memory as what it was given is."""

    @staticmethod
    def forward(ctx, out):  # type: ignore[no-untyped-def]
        ctx.order = sorted(range(out.ndim), key=out.stride, reverse=True)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        order = ctx.order
        return grad_out.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


class GradientLaidOutUnderTransforms(torch.autograd.Function):
    """`GradientLaidOutAsOutput` where torch.func or forward-mode differentiation goes through it."""

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
