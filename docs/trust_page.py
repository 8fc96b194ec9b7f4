"""The tables of docs/trust.md, from what the numeric matrix, the mutants and other people's tests found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.numeric import tolerances
from tests.numeric.cell import FAULT, REFUSED
from tests.numeric.features import FEATURES
from tests.numeric.outcomes import FOLDER, NOTES, OPEN, read
from tests.numeric.over_ranks import STRATEGIES
from tests.numeric.statements import NONE, dtype_of

ROOT = Path(__file__).resolve().parent.parent


def numeric() -> str:
    """A section for each device."""
    return "\n\n".join(_run(path) for path in sorted(FOLDER.glob("*.json")))


def _run(path: Path) -> str:
    run, cells = read(path), read(path)["cells"]
    outcomes = [outcome for *_, outcome in _each(cells)]
    within = sum(isinstance(outcome, dict) for outcome in outcomes)
    refused = sum(str(outcome).startswith(REFUSED) for outcome in outcomes)
    unexplained = {cell[1:]: reason for cell, reason in OPEN.items() if cell[0] == path.stem}
    device = "a CPU" if path.stem == "cpu" else run["device"]
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    seconds = ", ".join(f"{where} {each:,.0f}" for where, each in run["seconds"].items())
    note = f"{NOTES[path.stem]} " if path.stem in NOTES else ""
    spent = f" Seconds of one process, by strategy and pass: {seconds}." if seconds else ""
    parts = [
        f"### On {device}",
        f"{note}{len(outcomes):,} cells: {within:,} within their tolerance, {refused:,} refused as stated, "
        f"{len(unexplained)} not understood. "
        f"Python {run['python']}, {packages}, commit {run['commit']}."
        f"{spent}",
    ]
    if run["missing"]:
        parts.append("Not there: " + "; ".join(f"`{name}` ({why})" for name, why in run["missing"].items()) + ".")
    for (provider, strategy, feature, name), reason in unexplained.items():
        where = "" if strategy == NONE else f" over {strategy}"
        parts.append(f"Not understood: `{provider}`{where}, {feature}, {name}: {reason}.")
    notes: dict[str, int] = {}
    of_one = {name: strategies[NONE] for name, strategies in cells.items() if NONE in strategies}
    parts.append(_table("call", {f"`{name}`": rows for name, rows in of_one.items()}, notes))
    native = {name: rows for name, rows in cells.get("native", {}).items() if name in STRATEGIES}
    if native:
        parts.append("`native` over several ranks:")
        parts.append(_table("call", native, notes))
    parts.append("\n".join(f"{number}. {reason}" for reason, number in notes.items()))
    parts.append("The largest errors, and in brackets the tolerances:")
    parts.append(_errors(cells, path.stem))
    return "\n\n".join(parts)


def _each(cells: dict[str, Any]) -> Iterator[tuple[str, str, str, str, Any]]:
    """Provider, strategy, feature, pass and outcome."""
    for provider, strategies in cells.items():
        for strategy, features in strategies.items():
            for feature, passes in features.items():
                for name, outcome in passes.items():
                    yield provider, strategy, feature, name, outcome


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def _table(what: str, columns: dict[str, dict[str, Any]], notes: dict[str, int]) -> str:
    rows = [
        [feature, *(_sign(found.get(feature, {}), notes) for found in columns.values())]
        for feature in FEATURES
        if any(feature in found for found in columns.values())
    ]
    return _markdown([what, *columns], rows)


def _sign(passes: dict[str, Any], notes: dict[str, int]) -> str:
    """A sign for the passes of a cell; those that differ by their names."""
    kinds: dict[str, list[str]] = {}
    for name, outcome in passes.items():
        if isinstance(outcome, dict):
            kind = "✓"
        elif outcome.startswith(FAULT):
            kind = "a fault"
        else:
            kind = f"✗ ({notes.setdefault(outcome.removeprefix(REFUSED), len(notes) + 1)})"
        kinds.setdefault(kind, []).append(name)
    if len(kinds) < 2:
        return next(iter(kinds), "")
    usual = max(kinds, key=lambda kind: len(kinds[kind]))
    return ", ".join([usual, *(f"{kind} {' and '.join(names)}" for kind, names in kinds.items() if kind != usual)])


def _errors(cells: dict[str, Any], device: str) -> str:
    where = "cpu" if device == "cpu" else "cuda"
    worst: dict[tuple[str, str], dict[str, float]] = {}
    limits: dict[tuple[str, str], dict[str, float]] = {}
    for provider, _, feature, _, outcome in _each(cells):
        if isinstance(outcome, dict):
            dtype = dtype_of(provider, FEATURES[feature], where)
            row = provider, str(dtype).removeprefix("torch.")
            limits[row] = {
                "out": tolerances.output(provider, dtype, where), "grad": tolerances.gradient(dtype, where)
            }  # fmt: skip
            for name, error in outcome.items():
                kept = worst.setdefault(row, {})
                kept[name] = max(kept.get(name, 0.0), error)
    return _markdown(
        ["provider", "dtype", "output", "gradients"],
        [
            [
                f"`{row[0]}`",
                row[1],
                *(f"{each[name]:.0e} ({limits[row][name]:.0e})" if name in each else "" for name in ("out", "grad")),
            ]
            for row, each in worst.items()
        ],
    )


def mutants() -> str:
    """A row for each module that was mutated, and the survivors."""
    path = ROOT / "tests/mutants/outcomes.json"
    run = json.loads(path.read_text())
    modules = run["modules"]
    killed, sample = (sum(row[key] for row in modules.values()) for key in ("killed", "sample"))
    rows = [
        [
            f"`{name}`",
            str(row["mutants"]),
            str(row["sample"]),
            f"{row['killed']}",
            f"{row['killed'] / row['sample']:.0%}",
        ]
        for name, row in modules.items()
    ]
    seeds = sorted({row["seed"] for row in modules.values()})
    survivors = [f"- `{name}`, {each}" for name, row in modules.items() for each in row["survivors"]]
    parts = [
        f"{killed} of {sample} noticed, {killed / sample:.0%}. Random samples (seed {', '.join(map(str, seeds))}), "
        f"torch {run['torch']}, Python {run['python']}.",
        _markdown(["module", "mutants", "in the sample", "noticed", ""], rows),
    ]
    return "\n\n".join([*parts, *(["Not noticed:", "\n".join(survivors)] if survivors else [])])


def peers() -> str:
    """The counts of diffusers' tests and of PyTorch's samples."""
    run = json.loads((ROOT / "tests/peers/outcomes.json").read_text())
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    rows = [
        [f"`{path}`", *(str(row[key]) for key in ("without", "with", "failed without", "skipped", "models bound"))]
        for path, row in run["files"].items()
        if row["without"]
    ]
    not_here = [f"`{path}`" for path, row in run["files"].items() if not row["without"]]
    regressions = [f"- `{name}`" for row in run["files"].values() for name in row["regressions"]]
    samples = [
        [f"`{name}`", *(str(row["counts"].get(key, 0)) for key in ("passed", "refused", "failed"))]
        for name, row in run["sdpa"].items()
    ]
    parts = [
        f"diffusers' tests at commit {run['tests']} of its repository, with {packages}:",
        _markdown(["file", "passed without", "passed with", "failed without", "skipped without", "models bound"], rows),
        *([f"No test of {', '.join(not_here)} runs without the Hub."] if not_here else []),
        *(["Passed without and not with:", "\n".join(regressions)] if regressions else []),
        "PyTorch's samples, in float64, float32, bfloat16 and float16:",
        _markdown(["provider", "passed", "refused", "failed"], samples),
    ]
    return "\n\n".join(parts)
