"""Settings in the words of the command line, for messages."""

from __future__ import annotations

from typing import Any


def option(name: str, value: Any) -> str:
    """A setting as it is given to `examples/train_lora.py`: "--learning_rate -1", "--adam_betas 2 3", "--no-metrics".

    A setting that is None is not given at all: "no --shift".
    """
    if value is None:
        return f"no --{name}"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if isinstance(value, (list, tuple)):
        return " ".join([f"--{name}", *map(_word, value)])
    return f"--{name} {_word(value)}"


def _word(value: Any) -> str:
    text = str(value)
    return repr(text) if not text or set(text) & set(" \t\n\"'$*()|[]{}<>;&\\") else text
