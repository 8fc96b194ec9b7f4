"""The command line: its commands, and what all of them do about errors."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import AttentionProviderError
from . import exit_codes
from .advise.command import advise
from .bench.command import bench
from .doctor.command import doctor
from .models.command import models
from .run.command import run
from .train.command import SETTINGS, train
from .verify.command import verify


class _Group(TyperGroup):
    """Turns exceptions into exit codes. Those of typer and of click, which it contains, pass: typer handles them."""

    def invoke(self, ctx: Any) -> Any:
        from .output import complain

        try:
            return super().invoke(ctx)
        except AttentionProviderError as error:
            complain("\n".join([str(error), *error.__notes__]))
            raise typer.Exit(exit_codes.USAGE) from error
        except ImportError as error:
            complain(
                f"{type(error).__name__}: {error}. This command needs a package that is missing or broken here. "
                "`diffusers-attn doctor` says which, and how to install it."
            )
            raise typer.Exit(exit_codes.CANNOT) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click") or isinstance(error, BrokenPipeError):
                raise
            traceback.print_exc()
            raise typer.Exit(exit_codes.CANNOT) from error


app = typer.Typer(
    name="diffusers-attn",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout is not None and sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 nothing wrong, 1 something wrong was found, 2 an argument is not accepted, "
    "3 the command could not run.",
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"diffusers-attn {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Attention kernels for diffusers models: examines this machine, measures kernels and shows plans."""


def _paragraphs(command: Callable[..., object]) -> str:
    """The docstring of a command with one line for each paragraph, which --help wraps to the width of the terminal."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


for each in (doctor, bench, models, verify, advise, run):
    app.command(help=_paragraphs(each))(each)
app.command(help=_paragraphs(train), context_settings=SETTINGS)(train)


def main() -> None:
    """Runs the command with the arguments of this process, and ends the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows another, instead of an error
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about vision packages
    app()
