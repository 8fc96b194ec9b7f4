"""What was found on each device: `outcomes/cpu.json` and others, by provider, strategy, feature and pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers_attn.providers.catalog import SPECS

from .cell import Outcome
from .features import FEATURES, PASSES
from .over_ranks import STRATEGIES
from .statements import NONE

FOLDER = Path(__file__).with_name("outcomes")
OPEN: dict[tuple[str, str, str, str, str], str] = {}
"""Faults that are not understood, by file, provider, strategy, feature and pass. docs/trust.md names them."""
NOTES = {
    "cpu": "Compiled calls over `gather` and `unified` are of commit 957c5b3.",
    "h200": "This run is not complete: flex is of commit 1f8815a, without compiled calls; 6 compiled calls of xformers "
    "were not reached; flash-attn was built without head_dims of 65 to 96 and above 128, softcap and window.",
}
"""What the versions and commit of a run do not say, by file."""
Found = dict[str, dict[str, dict[str, dict[str, Outcome]]]]


def read(path: Path) -> dict[str, Any]:
    """A run: device, versions and commit; "seconds" by strategy and pass; "missing", providers that were not there and
    why; and "cells", see `Found`."""
    return json.loads(path.read_text()) if path.exists() else {"seconds": {}, "missing": {}, "cells": {}}


def _sorted(cells: Found) -> Found:
    """In the order of the tables, whatever ended first."""
    orders = ["auto", *SPECS], [NONE, *STRATEGIES], list(FEATURES), list(PASSES)

    def ordered(found: Any, level: int) -> Any:
        if level == len(orders):
            return found
        return {name: ordered(found[name], level + 1) for name in orders[level] if name in found}

    return ordered(cells, 0)


def write(path: Path, run: dict[str, Any]) -> None:
    """One line for each feature, so that a change is seen where it is."""
    cells = _sorted(run["cells"])
    rows = [
        f"  {json.dumps(provider)}: {{\n"
        + ",\n".join(
            f"   {json.dumps(strategy)}: {{\n"
            + ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in features.items())
            + "\n   }"
            for strategy, features in strategies.items()
        )
        + "\n  }"
        for provider, strategies in cells.items()
    ]
    head = json.dumps(run | {"cells": None}, indent=1, ensure_ascii=False)
    path.parent.mkdir(exist_ok=True)
    path.write_text(head.replace('"cells": null', '"cells": {\n' + ",\n".join(rows) + "\n }") + "\n")
