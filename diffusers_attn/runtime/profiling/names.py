"""Recognises attention and exchanges by the names of operators and kernels, where nothing else names them.

Compiled graphs show operators, and recorded CUDA graphs show kernels alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ...spans import ATTENTION, BETWEEN_GROUPS, EXCHANGE, PREFIX, SEPARATOR

OTHER, IDLE = "other", "waiting for the host"


class Label(NamedTuple):
    """What a part of the time is spent on."""

    kind: str
    """"attention", "exchange", "other", or "waiting for the host" while a GPU has nothing to do."""
    provider: str = ""
    """Provider of the attention; or the operator or kernel, where only that is visible."""
    strategy: str = ""
    """Strategy of an attention call over several ranks, and of its exchanges; "one rank" for other calls, and "groups
    of ranks" for exchanges of branches of guidance or samples of a batch."""


_OPERATORS: tuple[tuple[str, Label], ...] = (
    (r"(_c10d_functional(_autograd)?|c10d)::", Label(EXCHANGE)),
    (r"diffusers_attn::(symmetric_gather_(start|finish)|agree)$", Label(EXCHANGE)),
    (r"diffusers_attn::(flash_4|sage_3|sage|xformers)(_varlen|_backward)?$", Label(ATTENTION)),
    (r"diffusers_attn::\w*(cudnn|efficient|flash|math)\w*(forward|backward)$", Label(ATTENTION)),
    (r"aten::_?scaled_dot_product_\w*attention\w*$", Label(ATTENTION)),
    (r"\w*(flash_attn|sage_?attention|xformers)\w*::", Label(ATTENTION)),
)
_KERNELS: tuple[tuple[str, Label], ...] = (
    (r"nccl|Memcpy PtoP", Label(EXCHANGE)),
    (r"cudnn\w*sdpa|sdpa\w*cudnn", Label(ATTENTION, "cuDNN")),
    (r"fmha|AttentionKernel", Label(ATTENTION, "memory-efficient")),
    (r"(?i)flash\w*(fwd|bwd|attn|attention)|(?i:flash_fwd|flash_bwd)|FlashAttn", Label(ATTENTION, "flash")),
    (r"(?i)qk_int|sageattn|sv_f8|sv_f16|pv_f8|pv_f16", Label(ATTENTION, "sage")),
    (r"triton_\w*flex_attention", Label(ATTENTION, "flex")),
)


def of_span(name: str) -> Label | None:
    """The label of a name that `spans.span` made; None for all other names, and for components."""
    prefix, _, rest = name.partition(SEPARATOR)
    kind, *words = rest.split(SEPARATOR)
    if prefix != PREFIX or kind not in (ATTENTION, EXCHANGE):
        return None
    return (
        Label(kind, *words) if kind == ATTENTION else Label(kind, "", BETWEEN_GROUPS if BETWEEN_GROUPS in words else "")
    )


def of_operator(name: str) -> Label | None:
    """The label of an operator; None if it is neither attention nor an exchange."""
    found = next((label for pattern, label in _OPERATORS if re.match(pattern, name)), None)
    return found._replace(provider=name) if found is not None and found.kind == ATTENTION else found


def of_kernel(name: str) -> Label | None:
    """The label of a kernel; None if it is neither attention nor an exchange."""
    return next((label for pattern, label in _KERNELS if re.search(pattern, name)), None)
