"""The log of the package: one logger, `diffusers_attn`, which is quiet unless the environment or the program says so.

`DIFFUSERS_ATTN_LOG=debug` (or `info`, `warning`, `error`) prints messages from this level on to stderr. Messages below
warnings come from rank 0 only; `debug-all-ranks` prints those of all ranks. Without the variable, Python prints
warnings, and a program may set levels and handlers of the logger itself.

Each module logs to a child of the logger: `logging.getLogger(__name__)`.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist

from .errors import AttentionProviderError

VARIABLE = "DIFFUSERS_ATTN_LOG"
ALL_RANKS = "-all-ranks"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

logger = logging.getLogger(__package__)


class _Handler(logging.StreamHandler):
    """Prints messages to stderr; those below warnings on rank 0 only, unless `all_ranks` is True."""

    def __init__(self, all_ranks: bool) -> None:
        super().__init__()
        self.all_ranks = all_ranks

    def filter(self, record: logging.LogRecord) -> bool:
        vars(record)["rank"] = rank = _rank()
        return (self.all_ranks or rank == 0 or record.levelno >= logging.WARNING) and bool(super().filter(record))


def set_up(setting: str) -> None:
    """Sets level and handler of the logger. An empty setting changes nothing.

    Args:
        setting: a name in `LEVELS`, for rank 0, or with the suffix "-all-ranks" for all ranks.

    Raises:
        AttentionProviderError: there is no such level.
    """
    if not setting:
        return
    level = setting.lower().removesuffix(ALL_RANKS)
    if level not in LEVELS:
        raise AttentionProviderError(
            f"the environment has {VARIABLE}={setting}; accepted are {', '.join(LEVELS)}, and each with {ALL_RANKS} "
            f"for the messages of all ranks, such as debug{ALL_RANKS}."
        )
    handler = _Handler(setting.lower().endswith(ALL_RANKS))
    handler.setFormatter(logging.Formatter("diffusers_attn [rank %(rank)s] %(levelname)s: %(message)s"))
    for each in [each for each in logger.handlers if isinstance(each, _Handler)]:
        logger.removeHandler(each)
    logger.addHandler(handler)
    logger.setLevel(LEVELS[level])
    logger.propagate = False  # handlers of the program would print everything again


# A graph contains no message: Dynamo calls this while it traces, and takes the result as a constant.
@torch._dynamo.assume_constant_result
def debugging() -> bool:
    """Whether messages of level "debug" are wanted."""
    return logger.isEnabledFor(logging.DEBUG)


def _rank() -> int:
    """The rank of this process in its job; 0 for a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


set_up(os.environ.get(VARIABLE, ""))
