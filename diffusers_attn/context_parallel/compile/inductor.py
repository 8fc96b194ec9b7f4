"""What PyTorch's compiler is told where it compiles exchanges. This is private to Inductor, and touched here alone.

Inductor leaves gaps between the rows of a tensor on a GPU where that makes them begin at round addresses
(`comprehensive_padding`). Before PyTorch 2.13, where a tensor with gaps is read by a concatenation (as in the backward
of rotary embeddings) and its order in memory is then decided by what it was computed from (as gradients of attention
are, heads first), the one assumes another order than the other takes: gradients are wrong, without a word. There the
gaps are turned off, for this process.

And Inductor runs `overlap_pass.begin_early` over what it is given, which does nothing to graphs without an exchange of
ours. A pass that somebody else has set runs before it.

Why both are set for the whole process, and not for one model: docs/design.md, "What changes for the whole process".
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from packaging.version import Version
from torch.fx import Graph

from . import overlap_pass
from .overlap_pass import begin_early

logger = logging.getLogger(__name__)
ORDERS_AGREE = Version("2.13")


@torch._dynamo.assume_constant_result
def prepare_for_exchanges() -> bool:
    """To be called where an exchange is traced, which is before Inductor sees it."""
    return _prepare()


@functools.cache
def _prepare() -> bool:
    from torch._inductor import config  # slow to import, and needed by compilers only

    config.pre_grad_custom_pass = _make_pass(config.pre_grad_custom_pass)
    if Version(torch.__version__) < ORDERS_AGREE and config.comprehensive_padding:
        config.comprehensive_padding = False
        logger.info(
            "torch._inductor.config.comprehensive_padding is off from here on: with it, PyTorch %s computes wrong "
            "gradients of compiled blocks under context parallelism",
            torch.__version__,
        )
    return True


def _make_pass(others: Any) -> Any:
    """`begin_early` as a pass of Inductor, behind what is set there already: None, a pass, or several."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    passes = others if isinstance(others, (list, tuple)) else [] if others is None else [others]

    class BeginEarly(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for other in passes:
                other(graph)
            begin_early(graph)

        def uuid(self) -> Any:
            """Inductor's cache keeps graphs by it; None is not to keep them, as where another pass has none."""
            known = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in passes]
            return None if None in known else (*known, get_hash_for_files((overlap_pass.__file__,)))

        def __reduce__(self) -> Any:
            """PyTorch 2.11 pickles it for its cache."""
            return _make_pass, (others,)

    return BeginEarly()
