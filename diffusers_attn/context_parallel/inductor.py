"""What PyTorch's compiler is told of exchanges. This is private to Inductor, and touched here alone.

On a GPU, Inductor leaves gaps between the rows of a tensor where that makes them begin at round addresses. Of what a
collective sends it keeps the order of the strides, and so may give it a tensor with gaps where one without is meant:
the collective sends memory as it lies there, gaps and all. So Inductor is told that what an exchange sends has the
strides of a contiguous tensor.
"""

from __future__ import annotations

import functools

import torch


@torch._dynamo.assume_constant_result
def let_exchanges_be_dense() -> bool:
    """To be called where an exchange is traced, which is before Inductor sees it."""
    return _tell()


@functools.cache
def _tell() -> bool:
    from torch._inductor import lowering  # slow to import, and needed by compilers only

    exchange = torch.ops._c10d_functional.all_to_all_single.default
    lowering.add_layout_constraint(exchange, lowering.require_contiguous_strides)
    return True
