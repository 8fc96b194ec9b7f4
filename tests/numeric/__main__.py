"""Runs cells of the numeric matrix and writes their outcomes; prints faults, and exits with their number.

python -m tests.numeric                                       # on the CPU: minutes
python -m tests.numeric --device cuda --part 1                # on a GPU: forward, backward, captured
python -m tests.numeric --device cuda --part 2                # compiled
python -m tests.numeric --providers flex --features causal GQA
"""

from __future__ import annotations

import argparse
import os

# Inductor would start as many compilers in each of the processes side by side, of which there are as many as cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..conftest import torch  # its settings
from ..context_parallel.pool import Pool
from ..documents import ROOT
from ..gpu.cases import BUILT_BY_FLASH_ATTN, BUILT_WITHOUT, SLOW_TO_COMPILE, build_lacks
from . import over_ranks
from .cell import FAULT, Outcome
from .features import FEATURES, PASSES, Feature
from .outcomes import FOLDER, read, write
from .statements import NONE
from .workers import Cell, cells_of, run

from diffusers_attn.providers.catalog import SPECS  # isort: skip
from diffusers_attn.providers.registry import provider_status  # isort: skip

sys.path.insert(0, str(ROOT / "benchmarks"))
from versions import versions

PARTS = {1: ("forward", "backward", "captured"), 2: ("compiled",)}
TOGETHER = 12
"""Cells over ranks in one job."""


def main() -> int:
    args = _arguments()
    output = args.output or FOLDER / f"{args.device}.json"
    names = args.providers or ["auto", *SPECS]
    missing = {name: provider_status(name).reason for name in names if not provider_status(name).available}
    found = read(output)
    found |= versions(args.device, args.commit) | {"missing": found["missing"] | missing}
    cells = [
        cell
        for cell in cells_of([name for name in names if name not in missing], args.strategies, args.device)
        if (not args.features or cell.feature in args.features)
        and not _lacks(cell.provider, FEATURES[cell.feature])
        and cell.name in PARTS.get(args.part, PASSES)
    ]
    start, done, faults = time.monotonic(), 0, 0
    spent: dict[str, float] = {}
    for cell, outcome, seconds in _run(cells, args):
        done += 1
        if isinstance(outcome, str) and outcome.startswith(FAULT):
            faults += 1
            print(" · ".join(cell), f"· {outcome}", flush=True)
        row = found["cells"].setdefault(cell.provider, {}).setdefault(cell.strategy, {}).setdefault(cell.feature, {})
        row[cell.name] = outcome
        where = f"{cell.strategy}, {cell.name}"
        spent[where] = spent.get(where, 0.0) + seconds
        if done % 100 == 0:
            print(f"{done} of {len(cells)} cells, {time.monotonic() - start:.0f} s", flush=True)
            write(output, found)
    if not args.features and not args.providers:
        found["seconds"] |= {where: round(each, 1) for where, each in spent.items()}
    write(output, found)
    print(f"{done} of {len(cells)} cells in {time.monotonic() - start:.0f} s, {faults} faults: {output}")
    return min(faults, 100)


def _run(cells: list[Cell], args: argparse.Namespace) -> Iterator[tuple[Cell, Outcome, float]]:
    until = time.monotonic() + args.seconds
    of_one = [cell for cell in cells if cell.strategy == NONE]
    # What takes seconds comes last: a run that has to end early has most of the cells.
    of_one.sort(key=lambda cell: (cell.name == "compiled", cell.provider in SLOW_TO_COMPILE))
    yield from run(of_one, args.device, args.workers, args.seconds)
    gpus = min(torch.cuda.device_count(), 4) if args.device == "cuda" else 0
    over = [cell for cell in cells if cell.strategy != NONE]
    if not over or gpus == 1:
        return
    pool = Pool(over_ranks.work_on_gpu, gpus) if gpus else Pool()
    for provider, strategy in dict.fromkeys((cell.provider, cell.strategy) for cell in over):
        ring, ulysses = over_ranks.degrees_of(strategy, gpus)
        if ring * ulysses < 2 or min(ring, ulysses) < 1:
            continue
        group = [cell for cell in over if (cell.provider, cell.strategy) == (provider, strategy)]
        for at in range(0, len(group), TOGETHER):
            if time.monotonic() > until:
                break
            part, start = group[at : at + TOGETHER], time.monotonic()
            yield from zip(part, _over_ranks(pool, part, gpus, ring * ulysses), _share(part, start))
    pool.close()


def _over_ranks(pool: Pool, part: list[Cell], gpus: int, ranks: int) -> Iterator[Outcome]:
    """The outcomes of cells. If a rank fails in one, they run one by one, to name it."""
    try:
        yield from _of_ranks(pool, part, gpus, ranks)
    except Exception as error:
        if len(part) == 1:
            yield f"{FAULT}{type(error).__name__}: {str(error)[-600:]}"
        else:
            for cell in part:
                yield from _over_ranks(pool, [cell], gpus, ranks)


def _of_ranks(pool: Pool, part: list[Cell], gpus: int, ranks: int) -> list[Outcome]:
    cells = [(cell.feature, cell.name) for cell in part]
    given = {"provider": part[0].provider, "strategy": part[0].strategy, "cells": cells, "gpus": gpus}
    return over_ranks.together(pool.run(ranks, over_ranks.outcomes, **given))


def _share(part: list[Cell], start: float) -> Iterator[float]:
    """The seconds of each cell, of those of the job."""
    for _ in part:
        yield (time.monotonic() - start) / len(part)


def _lacks(provider: str, call: Feature) -> bool:
    """Whether a build of flash-attn was compiled without what the call needs, see tests/gpu/cases.py. `auto` may choose
    it."""
    options = {"window_size": "window", "softcap": "softcap"}
    kernel = "flash" if provider == "auto" else provider
    without = any(options[name] in BUILT_WITHOUT for name, _ in call.options) and kernel in BUILT_BY_FLASH_ATTN
    return without or build_lacks(kernel, max(call.head_dim, call.value_head_dim))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--part", type=int, choices=PARTS, help="of two that each take less than ten minutes on a GPU")
    parser.add_argument("--providers", nargs="+")
    parser.add_argument("--strategies", nargs="+", default=[NONE, *over_ranks.STRATEGIES])
    parser.add_argument("--features", nargs="+")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=min(cores, 14), help="processes side by side")
    parser.add_argument("--seconds", type=float, default=3600.0, help="when they have passed, no cell starts")
    parser.add_argument("--output", type=Path, help="a file with earlier outcomes is added to")
    parser.add_argument("--commit", help="where there is no git repository")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
