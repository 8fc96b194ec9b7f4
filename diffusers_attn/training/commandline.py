"""What goes wrong, told to those who started training from a command line: in its words, and once for all processes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import logging
import re
import sys
import traceback

from ..errors import AttentionProviderError
from .data.decode import MissingDecoderError
from .data.disk import WritingError
from .data.errors import TrainingDataError
from .data.ranks import OtherRankError
from .errors import TrainingError
from .flag_names import option
from .once import say_once

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
