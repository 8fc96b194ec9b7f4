"""Errors and warnings for users of the command line: settings appear as options, and one process prints a message."""

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
from .once import print_once
from .settings.flag_names import option

EXPECTED = (TrainingError, TrainingDataError, AttentionProviderError, WritingError, MissingDecoderError)
"""Errors with a message for users, which are printed without a traceback."""

OTHER_NAMES = {
    "frames": "num_frames",
    "pick": "frame_pick",
    "incomplete": "incomplete_batches",
    "micro_batch_size": "batch_size",
    "provider": "attn_provider",
}
"""Arguments of the library's functions whose setting has another name on the command line."""

_VALUE = r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)|\.\.\.|-?\d[\w.+-]*\w|-?\d|True|False|None"


def with_options(message: str) -> str:
    """Replaces settings in a message by their options: `on_bad_data='skip'` becomes "--on_bad_data skip".

    A name without a value, such as max_upscale, becomes "--max_upscale" if it is in backticks or has an underscore.
    """
    with_value, alone = _patterns()
    message = with_value.sub(lambda found: _given(found[1], found[2]), message)
    return alone.sub(lambda found: f"--{_setting(found[1] or found[2])}", message)


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    from .settings.config import TrainConfig

    names = {field.name for field in dataclasses.fields(TrainConfig)} | set(OTHER_NAMES)
    every, long = "|".join(sorted(names)), "|".join(sorted(each for each in names if "_" in each))
    before = r"(?<![\w.\-/`'\"])"  # excludes parts of paths, words and options, and quoted text
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


class _OptionsFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_options(super().format(record))


class _AboveBars(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):  # clears progress bars and draws them again
            super().emit(record)


def log_warnings() -> None:
    """Prints this process's warnings above progress bars, with settings as options."""
    handler = _AboveBars()
    handler.setFormatter(_OptionsFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def report(error: BaseException, program: str) -> None:
    """Prints the error that ended a run.

    An error of all processes is printed once. An error of one process is printed by that process; the others, which
    raise `OtherRankError`, print nothing.

    Args:
        error: the exception.
        program: name of the program, printed before the message.
    """
    if isinstance(error, OtherRankError):
        return
    if isinstance(error, EXPECTED):
        print_once(f"{program}: {with_options(str(error))}")
    else:
        print_once("".join(traceback.format_exception(error)).rstrip(), key=f"{type(error).__name__}: {error}")
