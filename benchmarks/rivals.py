"""Milliseconds of one transformer step on several GPUs: this library and others, in one run.

    torchrun --nproc_per_node 2 benchmarks/rivals.py --models flux wan --output rivals.json
    torchrun --nproc_per_node 2 benchmarks/rivals.py --device cpu --tiny --variants one-gpu-eager ours-eager
    python benchmarks/rivals.py --markdown rivals.json                       # prints the tables of a run

`libraries.py` has the variants. "ours" is what the README's lines give, with every default; the others are what their
libraries document. Libraries are optional: if one is not installed, or refuses, its row says why.

Every variant has processes of its own, one per rank, since some libraries change diffusers' classes for the entire
process (`isolated.py`). All share one copy of the weights on each GPU; if the system cannot share them, a variant has
its own copy. Variants take turns in rounds, in alternating order. A turn is one untimed step and several timed ones,
queued without waiting in between. The time of a step is that of its slowest rank. Reported are the median of all steps,
and the smallest and largest median of a turn. Errors are relative to an unmodified, uncompiled model of the same dtype
on one GPU. Memory is what the variant's process reserves in a step beyond the weights, and what is used outside
PyTorch's allocator, such as NCCL's buffers.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from isolated import Isolated, one_line
from libraries import LIBRARIES, Setting, version_of
from measuring import MIB, Report, memory_taken, step_milliseconds
from options import add_models, add_options, heading, parse
from ranks import Ranks, VariantError
from real_shapes import REAL, TINY, RealModel
from versions import host, installed

USUAL = [name for name, each in LIBRARIES.items() if each.compiled] + ["ours-eager", "diffusers-ring-eager"]
PACKAGES = ("transformers", "accelerate", "cache-dit", "xfuser", "yunchang", "einops")
WARM_UP = 3
"""Untimed steps at the start: the first compiles, and a later one records CUDA graphs."""


PREPARING = 0.85
"""Share of `--seconds` in which variants are prepared. The rest is for the rounds."""


SECONDS_TO_START = 10
"""A variant is not started if less time is left."""


class Served:
    """A variant in its own process, whose methods `rivals.py` calls through `Isolated`."""

    weights: dict[str, Tensor] | None = None

    def receive(self, weights: dict[str, Tensor]) -> None:
        """Takes the weights to use. Without this call, the model makes its own."""
        self.weights = weights

    @torch.no_grad()
    def prepare(self, variant: str, model: str, device: torch.device, tiny: bool, expected: Tensor) -> dict[str, Any]:
        """Makes and compiles the model, and runs the first steps. Returns this rank's measurements."""
        diffusers.utils.logging.set_verbosity_error()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        real, library = (TINY if tiny else REAL)[model], LIBRARIES[variant]
        self.device, self.inputs = device, real.inputs(device)
        reserved, outside = _reserved(device)
        began = time.perf_counter()
        setting = Setting(model, real, self.weights, self.inputs, device, library.compiled)
        self.model, note = library.prepare(setting)
        for _ in range(WARM_UP):
            out = self.step()
        error = ((out.float().cpu() - expected).norm() / expected.norm()).item()
        found = {"note": note, "relative_error": error, "prepare_seconds": round(time.perf_counter() - began, 1)}
        del out
        if device.type == "cuda":
            memory_taken(device)  # frees what the first steps needed only
            torch.cuda.reset_peak_memory_stats()
            self.step()
            torch.cuda.synchronize()
            weights = 0 if self.weights else sum(each.numel() * each.element_size() for each in self.model.parameters())
            found["peak_mib"] = round((torch.cuda.max_memory_reserved() - reserved - weights) / MIB)
            found["outside_allocator_mib"] = round((_reserved(device)[1] - outside) / MIB)
        return found

    def step(self) -> Tensor:
        return self.model(**self.inputs)[0]

    @torch.no_grad()
    def turn(self, steps: int) -> list[float]:
        """Milliseconds of several steps, after an untimed one."""
        return step_milliseconds(self.step, steps, self.device)


def _reserved(device: torch.device) -> tuple[int, int]:
    """Bytes that this process has reserved for tensors, and bytes of the device in use outside of that."""
    return (torch.cuda.memory_reserved() if device.type == "cuda" else 0), memory_taken(device)[1]


class Variant:
    """A row of the results, and its process on this rank."""

    def __init__(self, name: str, key: str, real: RealModel, ranks: Ranks, args: argparse.Namespace) -> None:
        self.name, self.key, self.ranks, self.args = name, key, ranks, args
        library = LIBRARIES[name]
        self.result: dict[str, Any] = {"model": real.title, "variant": name, "library": library.distribution}
        self.result |= {"lines": library.lines, "needs": library.needs}
        self.turns: list[list[float]] = []

    def prepare(self, device: torch.device, weights: dict[str, Tensor], expected: Tensor, limit: float) -> None:
        """Starts the process and prepares the variant, each within `limit` seconds.

        Raises:
            VariantError: this failed, on any rank.
        """
        try:
            self.result["version"] = version_of(LIBRARIES[self.name])
        except ModuleNotFoundError as failure:
            raise VariantError(one_line(failure)) from None
        self.process = Isolated(self.ranks, Served)
        arguments = (self.name, self.key, device, self.args.tiny, expected)
        try:
            self.process.ask(limit, "receive", weights)
            self.result["weights"] = "shared"
        except VariantError as failure:
            self.result["weights"] = f"a copy: {failure}"
            self.process = Isolated(self.ranks, Served)
        own = self.process.ask(limit, "prepare", *arguments)
        self.result["note"] = own[0].pop("note")
        self.result |= {name: [each[name] for each in own] for name in own[0] if name != "note"}

    def turn(self) -> None:
        """Times several steps.

        Raises:
            VariantError: this failed, on any rank.
        """
        self.ranks.gather(None)  # they start together
        own = self.process.ask(self.args.timeout, "turn", self.args.steps)
        self.turns.append([max(times) for times in zip(*own)])
        steps = [ms for turn in self.turns for ms in turn]
        self.result["turns"] = [[round(ms, 3) for ms in turn] for turn in self.turns]
        self.result["ms"] = round(statistics.median(steps), 3)


def references(real: RealModel, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of the unmodified, uncompiled model on one GPU, and what it returns."""
    model = real.make(device)
    with torch.no_grad():
        expected = model(**real.inputs(device))[0].float().cpu()
    return model.state_dict(), expected


def bench(key: str, args: argparse.Namespace, ranks: Ranks, device: torch.device, report: Report) -> None:
    """Measures all variants of a model."""
    real, began = (TINY if args.tiny else REAL)[key], time.monotonic()
    weights, expected = references(real, device)
    ready: list[Variant] = []

    def left(share: float = 1.0) -> float:
        """Seconds that are left of this share of `--seconds`, equal on all ranks."""
        limit = math.inf if args.seconds is None else share * args.seconds
        return ranks.gather(limit - (time.monotonic() - began))[0]

    def attempt(variant: Variant, work: Any, *arguments: Any) -> bool:
        try:
            work(variant, *arguments)
        except VariantError as failure:
            variant.result["error"] = str(failure)
        report.write()
        return "error" not in variant.result

    for name in args.variants:
        variant = Variant(name, key, real, ranks, args)
        report.variants.append(variant)
        limit = min(args.prepare_timeout, left(PREPARING))
        if limit < SECONDS_TO_START:
            variant.result["error"] = f"not started, so that --seconds {args.seconds:g} are enough for the rounds"
            continue
        prepared = attempt(variant, Variant.prepare, device, weights, expected, limit)
        if prepared and attempt(variant, Variant.turn):
            ready.append(variant)
        if ranks.rank == 0:
            print(line(variant.result), file=sys.stderr, flush=True)
    for turn in range(1, args.rounds):
        if left() <= 0:
            break
        for variant in list(ready)[:: 1 if turn % 2 == 0 else -1]:
            if not attempt(variant, Variant.turn):
                ready.remove(variant)
    for variant in ready:
        variant.process.close()


def line(result: dict[str, Any]) -> str:
    """A result in one line."""
    found = result.get("error") or f"{result['ms']:.1f} ms, prepared in {max(result['prepare_seconds'])} s"
    return f"{result['model']}, {result['variant']}: {found}"


def of_model(results: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """The results of a model that were measured."""
    return [each for each in results if each["model"] == title and "error" not in each]


def _compiled(result: dict[str, Any]) -> bool:
    return LIBRARIES[result["variant"]].compiled


def spread(result: dict[str, Any]) -> tuple[float, float]:
    """The smallest and the largest median of a turn, in milliseconds."""
    medians = [statistics.median(turn) for turn in result["turns"]]
    return min(medians), max(medians)


def markdown(report: dict[str, Any]) -> str:
    """Tables, one for each model, with what each library needed and what failed."""
    where, results = report["environment"], report["results"]
    lines = [heading(where, where["host"])]
    for title in dict.fromkeys(each["model"] for each in results):
        these = of_model(results, title)
        lines += [
            "",
            f"**{title}**",
            "",
            "| variant | library | ms per step | turns | of one GPU | of diffusers' best | relative error | peak MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for each in these:
            low, high = spread(each)
            alike = [other for other in these if _compiled(other) == _compiled(each)]
            alone = [other["ms"] for other in alike if other["variant"].startswith("one-gpu")]
            theirs = [other["ms"] for other in alike if other["variant"].startswith("diffusers")]
            memory = f"{max(each['peak_mib'])} + {max(each['outside_allocator_mib'])}" if "peak_mib" in each else "-"
            cells = [
                each["variant"],
                f"{each['library']} {each['version'].replace('0+unknown', where['commit'])}",
                f"{each['ms']:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{alone[0] / each['ms']:.2f}x" if alone else "-",
                f"{min(theirs) / each['ms']:.2f}x" if theirs else "-",
                f"{max(each['relative_error']):.1e}",
                memory,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    variants = {each["variant"]: each for each in results if "error" not in each}
    lines.append("")
    lines += [
        f"- {name}: {each['lines']}" + (f"; it needed {each['needs']}" if each["needs"] else "")
        for name, each in variants.items()
    ]
    notes = [f"- {each['variant']}, {each['model']}: {each['note']}" for each in results if each.get("note")]
    failed = [f"- {line(each)}" for each in results if "error" in each]
    return "\n".join([*lines, "", *notes, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=LIBRARIES,
        default=USUAL,
        metavar="VARIANT",
        help=f"variants to run, of {', '.join(LIBRARIES)} (default: {' '.join(USUAL)})",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="seconds for each model; a variant that is not ready after 85 %% of them is left out, and no round starts "
        "after all of them (default: no limit)",
    )
    parser.add_argument(
        "--prepare_timeout",
        type=float,
        default=300.0,
        help="seconds that a variant may take to start and compile (default: %(default)s)",
    )
    add_options(parser, rounds=4, steps=4)
    args = parse(parser, markdown)
    args.compile = True
    return args


def main() -> None:
    args = parse_arguments()
    ranks = Ranks("cpu", args.timeout)  # gloo: only the variants' processes use the GPUs together
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    ranks.device = device
    report = Report(args.output, ranks, args)
    report.environment["host"] = host()
    report.environment["packages"] |= installed(PACKAGES)

    def measure() -> None:
        for key in args.models:
            bench(key, args, ranks, device, report)
            memory_taken(device)

    ranks.run(measure, report, markdown)


if __name__ == "__main__":
    main()
