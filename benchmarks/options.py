"""Command-line options that several benchmarks have, and checks of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import real_shapes
import torch


def add_options(
    parser: argparse.ArgumentParser, *, rounds: int, steps: int | None = None, tiny: bool = True, timeout: float = 90.0
) -> None:
    """Adds the options of a benchmark of several ranks.

    Args:
        rounds: default of `--rounds`.
        steps: default of `--steps`; None leaves the option out.
        tiny: whether there is a `--tiny`.
        timeout: default of `--timeout`, in seconds.
    """
    if steps is not None:
        parser.add_argument(
            "--steps", type=int, default=steps, help="number of timed steps per turn (default: %(default)s)"
        )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="number of turns of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=timeout,
        help="seconds that a rank waits for the others in an exchange (default: %(default)s)",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device to measure (default: %(default)s)"
    )
    if tiny:
        parser.add_argument(
            "--tiny", action="store_true", help="use tiny models of the same classes, to try this out (default: off)"
        )
    add_results(parser)


def add_results(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the file of results."""
    parser.add_argument("--output", type=Path, help="JSON file for the results, rewritten after each change")
    parser.add_argument(
        "--markdown",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="print the tables of these earlier results, and run nothing",
    )
    parser.add_argument("--commit", help="commit to record in the results (default: the one that git reports)")


def add_models(parser: argparse.ArgumentParser) -> None:
    """Adds `--models`, of those in `real_shapes`."""
    parser.add_argument(
        "--models",
        nargs="+",
        choices=real_shapes.REAL,
        default=real_shapes.USUAL,
        help=f"models to run (default: {' '.join(real_shapes.USUAL)})",
    )


def parse(
    parser: argparse.ArgumentParser, markdown: Callable[[dict[str, Any]], str], least: int = 2
) -> argparse.Namespace:
    """The arguments of the script. Ends the program after the tables of `--markdown`, and where they cannot be run.

    Args:
        markdown: the tables of a report, from the content of its file.
        least: number of ranks that the script needs.
    """
    args = parser.parse_args()
    if args.markdown is not None:
        print_tables(args.markdown, markdown)
        sys.exit()
    if int(os.environ.get("WORLD_SIZE", "0")) < least:
        parser.error(f"start this with torchrun: torchrun --nproc_per_node 2 benchmarks/{Path(sys.argv[0]).name} ...")
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if args.device == "cuda" and torch.cuda.device_count() < processes:
        parser.error(
            f"{processes} processes, and PyTorch sees {torch.cuda.device_count()} CUDA devices. Start fewer, or try "
            "the script out on CPUs with a tiny model (see --help)."
        )
    return args


def print_tables(paths: list[Path], markdown: Callable[[dict[str, Any]], str]) -> None:
    """Prints the tables of earlier results."""
    print("\n".join(markdown(json.loads(path.read_text())) for path in paths), end="")


def heading(where: dict[str, Any], *extra: str) -> str:
    """The line above the table of a run: its devices, versions, date, commit and command.

    Args:
        where: environment of the run, as `measuring.Report` records it.
        extra: what to say of the run beside its devices, such as "eager".
    """
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    devices = ", ".join([f"{where['ranks']} x {where['device']}", *extra])
    return f"{devices}; {packages}; {where['date']}, commit {where['commit']}: `{where['command']}`"
