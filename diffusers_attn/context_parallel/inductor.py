"""What PyTorch's compiler is told where it compiles exchanges. This is private to Inductor, and touched here alone.

Inductor leaves gaps between the rows of a tensor on a GPU where that makes them begin at round addresses
(`comprehensive_padding`). Before PyTorch 2.13, where a tensor with gaps is read by a concatenation (as in the backward
of rotary embeddings) and its order in memory is then decided by what it was computed from (as gradients of attention
are, heads first), the one assumes another order than the other takes: gradients are wrong, without a word. There the
gaps are turned off, for this process.
"""

from __future__ import annotations

import functools
import logging

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)
ORDERS_AGREE = Version("2.13")


@torch._dynamo.assume_constant_result
def prepare_for_exchanges() -> bool:
    """To be called where an exchange is traced, which is before Inductor sees it."""
    return _prepare()


@functools.cache
def _prepare() -> bool:
    if Version(torch.__version__) >= ORDERS_AGREE:
        return True
    from torch._inductor import config  # slow to import, and needed by compilers only

    if config.comprehensive_padding:
        config.comprehensive_padding = False
        logger.info(
            "torch._inductor.config.comprehensive_padding is off from here on: with it, PyTorch %s computes wrong "
            "gradients of compiled blocks under context parallelism",
            torch.__version__,
        )
    return True
