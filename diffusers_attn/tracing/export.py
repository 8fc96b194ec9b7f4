"""Refuses `torch.export` of a model that is divided among ranks.

An exported program is one process's: it is saved, and run elsewhere. That of such a model would have this job's process
groups and this rank's share of the tokens in it, and nothing of what compares the ranks' calls.
"""

from __future__ import annotations

import torch

from ..errors import AttentionProviderError
from .errors import raise_error


def refuse_export(model: str, divided: str, remedy: str) -> None:
    """Raises AttentionProviderError if `torch.export`, or something that uses it, traces this call.

    Args:
        model: what is exported, for the message: "this FluxTransformer2DModel".
        divided: what ranks share, for the message: "its sequences are split".
        remedy: what undoes it.
    """
    if torch.compiler.is_exporting():
        raise_error(_refusal, model, divided, remedy)


def _refusal(model: str, divided: str, remedy: str) -> AttentionProviderError:
    return AttentionProviderError(
        f"torch.export of {model} is not possible while {divided} between ranks: the program would depend on this "
        f"job and on this rank. {remedy} on all ranks, and export it then."
    )
