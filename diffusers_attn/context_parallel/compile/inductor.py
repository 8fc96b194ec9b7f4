"""Settings of Inductor for graphs with exchanges. They are private to Inductor, and set only in this file.

On a GPU, Inductor may leave gaps between the rows of a tensor so that they begin at aligned addresses
(`comprehensive_padding`). Before PyTorch 2.13 this silently gives wrong gradients when a concatenation reads a tensor
with gaps (as in the backward of rotary embeddings) and the memory layout of the tensor follows from its inputs (as for
gradients of attention, heads first): the two assume different layouts. For these versions the gaps are turned off in
this process.

Inductor also runs `overlap_pass.begin_early` on each graph, which does not change graphs without our exchanges. A pass
that is already set runs before it.

docs/design.md, "What changes for the whole process", explains why both are set for the process and not for one model.
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
    """Called where an exchange is traced, which is before Inductor receives the graph."""
    return _prepare()


@functools.cache
def _prepare() -> bool:
    from torch._inductor import config  # slow to import, and needed only for compilation

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
    """`begin_early` as a pass of Inductor that first runs `others`: None, a pass, or several."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    passes = others if isinstance(others, (list, tuple)) else [] if others is None else [others]

    class BeginEarly(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for other in passes:
                other(graph)
            begin_early(graph)

        def uuid(self) -> Any:
            """Key of the pass in Inductor's cache. None disables caching, for example if another pass has no key."""
            known = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in passes]
            return None if None in known else (*known, get_hash_for_files((overlap_pass.__file__,)))

        def __reduce__(self) -> Any:
            """PyTorch 2.11 pickles the pass for its cache."""
            return _make_pass, (others,)

    return BeginEarly()
