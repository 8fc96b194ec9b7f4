"""What goes wrong, told to those who started training from a command line: in its words, and once for all processes."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import hashlib
import logging
import os
import re
import sys
import traceback
from typing import Any

from ..errors import AttentionProviderError
from .data.decode import MissingDecoderError
from .data.disk import WritingError
from .data.errors import TrainingDataError
from .data.ranks import OtherRankError
from .errors import TrainingError
from .flag_names import option

EXPECTED = (TrainingError, TrainingDataError, AttentionProviderError, WritingError, MissingDecoderError)
"""errors whose message says all; a traceback would only hide it."""

OTHER_NAMES = {
    "frames": "num_frames",
    "pick": "frame_pick",
    "incomplete": "incomplete_batches",
    "micro_batch_size": "batch_size",
    "provider": "attn_provider",
}
"""what functions of the library call a setting that has another name on the command line."""

_SECONDS = 10.0
_VALUE = r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)|\.\.\.|-?\d[\w.+-]*\w|-?\d|True|False|None"


def in_words(message: str) -> str:
    """A message of the library in the words of the command line: `on_bad_data='skip'` becomes "--on_bad_data skip", and
    the name of a setting alone, in backticks or with an underscore in it, "--max_upscale"."""
    with_value, alone = _patterns()
    message = with_value.sub(lambda found: _given(found[1], found[2]), message)
    return alone.sub(lambda found: f"--{_setting(found[1] or found[2])}", message)


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    from .config import TrainConfig

    names = {field.name for field in dataclasses.fields(TrainConfig)} | set(OTHER_NAMES)
    every, long = "|".join(sorted(names)), "|".join(sorted(each for each in names if "_" in each))
    before = r"(?<![\w.\-/`'\"])"  # no part of a path, of another word, of an option or of what someone wrote
    return (
        re.compile(rf"{before}`?({every})=({_VALUE})`?"),
        re.compile(rf"`({every})`|{before}({long})(?![\w/=`'\"]|\.\w)"),
    )


def _setting(name: str) -> str:
    return OTHER_NAMES.get(name, name)


def _given(name: str, value: str) -> str:
    if value == "...":
        return f"--{_setting(name)} ..."
    try:
        return option(_setting(name), ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return f"--{_setting(name)} {value}"


class _Words(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return in_words(super().format(record))


def log_in_words() -> None:
    """Shows warnings of this process, in the words of the command line and apart from a bar."""
    handler = _BesideBars()
    handler.setFormatter(_Words("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


class _BesideBars(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):  # takes bars away, and draws them again
            super().emit(record)


def report(error: BaseException, program: str) -> None:
    """Prints what ended a run.

    What all processes found is printed by the first of them, and what one of them found by that one; the others, which
    only know that another process failed, say nothing.

    Args:
        program: its name, before the message.
    """
    if isinstance(error, OtherRankError):
        return
    if isinstance(error, EXPECTED):
        say_once(f"{program}: {in_words(str(error))}")
    else:
        say_once("".join(traceback.format_exception(error)).rstrip(), about=f"{type(error).__name__}: {error}")


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
