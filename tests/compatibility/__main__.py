"""Runs cells of the matrix and writes their outcomes: `python -m tests.compatibility [PART OF A FEATURE'S NAME ...]`.

Cells whose outcome is a fault are printed and not written.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from typing import Any

from ..conftest import torch  # its settings
from ..context_parallel.pool import Pool
from .cell import is_sound, on_all_ranks
from .features import FEATURES
from .outcomes import expected_outcomes, merged, write
from .ways import WAYS


def _short(outcome: Any) -> str:
    return re.sub(r"\s+", " ", str(outcome))[:1000]


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    pool, faults = Pool(), 0
    found = expected_outcomes()
    ways = [each.removeprefix("way=") for each in names if each.startswith("way=")] or list(WAYS)
    names = [each for each in names if not each.startswith("way=")]
    for name, feature in FEATURES.items():
        if feature.missing or (names and not any(part in name for part in names)):
            continue
        row = found.setdefault(name, {})
        for way in WAYS:
            if way in feature.not_under:
                row.pop(way, None)
            elif way in ways:
                start = time.monotonic()
                try:
                    outcome = merged(on_all_ranks(pool, name, way))
                except Exception:
                    outcome = traceback.format_exc().strip().splitlines()[-1]
                print(f"{name} · {way} · {time.monotonic() - start:.1f} s: {_short(outcome)}", flush=True)
                each = [outcome] if isinstance(outcome, str) else outcome.values()
                if all(map(is_sound, each)):
                    row[way] = outcome
                else:
                    faults += 1
        write({name: found[name] for name in FEATURES if name in found})
    pool.close()
    return faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
