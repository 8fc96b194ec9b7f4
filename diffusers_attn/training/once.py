"""A message on the terminal, printed by one process of a job."""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
from typing import Any

_SECONDS = 10.0


def print_once(message: str, key: str | None = None) -> None:
    """Prints to stderr, unless another process of the job has printed the same message.

    Args:
        message: the text.
        key: messages with equal keys count as the same. None: the text is the key.
    """
    store = _store()
    if store is None:
        _print(message)
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    entry = f"diffusers_attn/printed/{attempt}/{hashlib.sha256((key or message).encode()).hexdigest()}"
    try:
        if store.add(entry, 1) > 1:
            # A launcher ends all processes when one ends, so wait until the message is printed.
            store.wait([f"{entry}/done"], datetime.timedelta(seconds=_SECONDS))
            return
        _print(message)
        store.set(f"{entry}/done", "1")
    except RuntimeError:  # the store is gone; printing twice is better than not at all
        _print(message)


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _store() -> Any:
    """The launcher's key-value store, which works before process groups exist; None for a single process or without
    such a store."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_PORT" not in os.environ:
        return None
    try:
        from torch.distributed import TCPStore

        return TCPStore(
            os.environ.get("MASTER_ADDR", "localhost"),
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=_SECONDS),
            wait_for_workers=False,
        )
    except (ImportError, RuntimeError, ValueError, OSError):
        return None
