"""Runs cells of the matrix and writes their outcomes: `python -m tests.compatibility [PART OF A FEATURE'S NAME ...]`.

Cells whose outcome is a fault are printed and not written. With `--device cuda` these are the cells on GPUs; those over
several need several.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ..conftest import torch  # its settings
from ..context_parallel.pool import Pool
from ..gpu.several import SIZE, TIMEOUT, work
from .cell import ALL_WAYS, is_sound, on_all_ranks
from .features import FEATURES
from .on_gpus import GPU_CELLS
from .outcomes import FILE, ON_GPUS, Outcome, expected_outcomes, merged, write
from .ways import WAYS


def _short(outcome: Any) -> str:
    return re.sub(r"\s+", " ", str(outcome))[:1000]


def _sound(pool: Any, name: str, way: str) -> Outcome | None:
    """The outcome of a cell, which is printed; None for a fault."""
    start = time.monotonic()
    try:
        outcome = merged(on_all_ranks(pool, name, way))
    except Exception:
        outcome = traceback.format_exc().strip().splitlines()[-1]
    print(f"{name} · {way} · {time.monotonic() - start:.1f} s: {_short(outcome)}", flush=True)
    each = [outcome] if isinstance(outcome, str) else outcome.values()
    return outcome if all(map(is_sound, each)) else None


def _run(pool: Any, cells: list[tuple[str, str]], file: Path) -> int:
    """Runs cells and writes their outcomes. Returns the number of faults."""
    faults, found = 0, expected_outcomes(file)
    for name, way in cells:
        outcome = _sound(pool, name, way)
        if outcome is None:
            faults += 1
        else:
            found.setdefault(name, {})[way] = outcome
        write({name: found[name] for name in FEATURES if name in found}, file)
    return faults


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    on_gpus = words[:2] == ["--device", "cuda"]
    words = words[2:] if on_gpus else words
    ways = [each.removeprefix("way=") for each in words if each.startswith("way=")] or list(ALL_WAYS)
    names = [each for each in words if not each.startswith("way=")]
    cells = [(name, way) for name, feature in FEATURES.items() for way in WAYS if way not in feature.not_under]
    cells = [
        (name, way)
        for name, way in (GPU_CELLS if on_gpus else cells)
        if way in ways and not FEATURES[name].missing and (not names or any(part in name for part in names))
    ]
    if on_gpus:
        cells = [(name, way) for name, way in cells if ALL_WAYS[way].ranks <= SIZE]
    pool = Pool(work, SIZE, TIMEOUT) if on_gpus else Pool()
    faults = _run(pool, cells, ON_GPUS if on_gpus else FILE)
    pool.close()
    return faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
