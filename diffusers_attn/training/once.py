"""A message on the terminal, printed by one process of a job."""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
from typing import Any

_SECONDS = 10.0


def say_once(message: str, about: str | None = None) -> None:
    """Prints to stderr, unless another process of the job has said the same.

    Args:
        about: what makes two messages the same, if it is not their text.
    """
    store = _store()
    if store is None:
        _say(message)
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"diffusers_attn/said/{attempt}/{hashlib.sha256((about or message).encode()).hexdigest()}"
    try:
        if store.add(key, 1) > 1:
            # A launcher ends all processes when the first one ends: not before the message is out.
            store.wait([f"{key}/out"], datetime.timedelta(seconds=_SECONDS))
            return
        _say(message)
        store.set(f"{key}/out", "1")
    except RuntimeError:  # the store went away; better twice than not at all
        _say(message)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _store() -> Any:
    """Where processes of a job can leave notes for each other, before they are connected as well; None for a single
    one, or where a launcher offers none."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_PORT" not in os.environ:
        return None
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        return TCPStore(
            os.environ.get("MASTER_ADDR", "localhost"),
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=_SECONDS),
            wait_for_workers=False,
        )
    except (ImportError, RuntimeError, ValueError, OSError):
        return None
