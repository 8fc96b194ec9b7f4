"""`benchmarks/rivals.py` at a size that CPUs do: what it measures, variants that fail, and its tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import launching
from .documents import ROOT

BENCHMARKS = ROOT / "benchmarks"


class Alone:
    """One process as the ranks of a benchmark."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Fails:
    """An object whose methods fail in different ways. It is called in another process."""

    def refuse(self, what: str) -> None:
        raise ValueError(f"no {what}\nand a second line")

    def end(self) -> None:
        sys.exit(3)

    def hang(self) -> None:
        torch.distributed.init_process_group("gloo", world_size=2, rank=0)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rivals

    yield rivals


@pytest.mark.slow
def test_a_variant_in_a_process_of_its_own(benchmark: Any) -> None:
    weights, expected = benchmark.references(benchmark.TINY["wan"], torch.device("cpu"))
    process = benchmark.Isolated(Alone(), benchmark.Served, launching.forkserver())
    process.ask(60, "receive", weights)
    [found] = process.ask(60, "prepare", "one-gpu-eager", "wan", torch.device("cpu"), True, expected)
    assert found["relative_error"] < 1e-6
    next(iter(weights.values())).zero_()  # the process has the same memory, not a copy of it
    [found] = process.ask(60, "prepare", "one-gpu-eager", "wan", torch.device("cpu"), True, expected)
    assert found["relative_error"] > 1e-3
    [steps] = process.ask(60, "turn", 2)
    assert len(steps) == 2 and min(steps) > 0
    process.close()
    assert not process.process.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "seconds", "says"),
    [
        (("refuse", "masks"), 60, "ValueError: no masks$"),
        (("end",), 60, "its process ended with exit code 3"),
        (("hang",), 2, r"no answer to 'hang' from ranks \[0\] in 2 s"),
    ],
)
def test_a_variant_that_fails_is_ended(benchmark: Any, call: tuple[str, ...], seconds: float, says: str) -> None:
    process = benchmark.Isolated(Alone(), Fails, launching.forkserver())
    with pytest.raises(benchmark.VariantError, match=says):
        process.ask(seconds, *call)
    assert not process.process.is_alive()


def report() -> dict[str, Any]:
    """The results of a run of three variants, of which one failed."""

    def result(variant: str, version: str, *turns: list[float]) -> dict[str, Any]:
        measured = {"turns": turns, "ms": turns[0][0], "relative_error": [1e-2, 2e-2], "note": ""}
        return {"variant": variant, "library": variant.partition("-")[0], "version": version, **measured}

    results = [
        result("one-gpu", "0.42.1", [130.0, 130.0]),
        result("diffusers-ring", "0.42.1", [100.0, 102.0], [110.0, 112.0]),
        result("ours", "0.1.0", [75.0], [76.0]),
        {"variant": "xdit-ulysses", "error": "ModuleNotFoundError: xfuser is not installed"},
    ]
    where = {"ranks": 2, "device": "H200", "host": "8 CPUs (slow)", "packages": {"torch": "2.11.0"}, "date": "today"}
    rows = [{"model": "Flux", "lines": "these", "needs": "", **each} for each in results]
    return {"environment": where | {"commit": "c0ffee", "command": "torchrun"}, "results": rows}


def test_the_tables_and_the_drawing_of_a_run(benchmark: Any) -> None:
    text = benchmark.markdown(report())
    assert text.startswith("2 x H200, 8 CPUs (slow); torch 2.11.0; today, commit c0ffee: `torchrun`\n")
    assert "| ours | ours 0.1.0 | 75.0 | 75.0 to 76.0 | 1.73x | 1.33x | 2.0e-02 | - |" in text
    assert "| diffusers-ring | diffusers 0.42.1 | 100.0 | 101.0 to 111.0 | 1.30x | 1.00x |" in text
    assert text.endswith("Failed:\n\n- Flux, xdit-ulysses: ModuleNotFoundError: xfuser is not installed\n")


def test_the_chart_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import charts

    drawing = charts.rivals("rivals-here", report())
    assert [drawing.count(f'fill="{color}"') for color in (charts.OURS, charts.THEIRS, charts.ONE)] == [1, 1, 1]
    assert "75.0 ms" in drawing and "Run: benchmarks/results/rivals-here.json" in drawing


@pytest.mark.thorough
def test_ranks_measure_all_variants_or_say_why_not(tmp_path: Path) -> None:
    variants = ["one-gpu-eager", "ours-eager", "diffusers-ulysses-eager", "diffusers-ring-eager", "xdit-ulysses-eager"]
    options = [
        "--device",
        "cpu",
        "--tiny",
        "--models",
        "flux",
        "--rounds",
        "2",
        "--steps",
        "2",
        "--variants",
        *variants,
    ]
    done = launching.run_ranks(2, BENCHMARKS / "rivals.py", *options, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = {each["variant"]: each for each in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert list(results) == variants
    assert "log-sum-exp" in (error := results.pop("diffusers-ring-eager")["error"]) or "return_lse" in error
    assert "xfuser is not installed" in results.pop("xdit-ulysses-eager").get("error", "xfuser is not installed")
    for name, result in results.items():
        assert [len(turn) for turn in result["turns"]] == [2, 2] and result["weights"] == "shared", name
        assert max(result["relative_error"]) < 1e-5, name
    assert "on 2 ranks" in results["ours-eager"]["note"]
