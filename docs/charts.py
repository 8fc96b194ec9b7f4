"""The charts of README.md and docs/performance.md, from the recorded runs in benchmarks/results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from svg import GREY, INK, LINE, Picture

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
OURS, THEIRS, ONE = "#2f6fde", "#c3c8d4", "#e4e7ee"


class Bar(NamedTuple):
    label: str
    value: float
    colour: str


class Group(NamedTuple):
    """Bars that share a scale: the longest fills the width."""

    title: str
    bars: list[Bar]


def results(run: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{run}.json").read_text())["results"]


def bars(title: str, groups: list[Group], unit: str, note: str, digits: int = 2) -> str:
    """Horizontal bars with their values, in groups."""
    left, right, step, head = 205, 120, 24, 34
    width = 760
    height = 58 + sum(head + step * len(group.bars) for group in groups) + 30
    picture = Picture(width, height, title)
    picture.text(20, 32, title, 16, weight="600")
    y = 48
    for group in groups:
        picture.text(20, y + 20, group.title, 13, GREY)
        y += head
        longest = max(bar.value for bar in group.bars)
        for bar in group.bars:
            length = (width - left - right) * bar.value / longest
            mine = bar.colour == OURS
            picture.text(left - 10, y + 13, bar.label, 13, INK, "end", "600" if mine else "normal")
            picture.box(left, y, length, step - 7, bar.colour)
            picture.text(
                left + length + 8, y + 13, f"{bar.value:.{digits}f} {unit}", 13, INK, weight="600" if mine else "normal"
            )
            y += step
    picture.line([(20, y + 10), (width - 20, y + 10)], LINE)
    picture.text(20, y + 30, note, 12, GREY)
    return str(picture)


def _median(run: str, variant: str) -> float:
    (found,) = [each["median_s"] for each in results(run) if each["variant"] == variant]
    return found


def _fastest_of_diffusers(run: str, eager: bool) -> Bar:
    theirs = [
        each
        for each in results(run)
        if each["variant"].startswith("diffusers-") and each["variant"].endswith("-eager") == eager
    ]
    best = min(theirs, key=lambda each: each["median_s"])
    name = "Ulysses" if "ulysses" in best["variant"] else "ring"
    return Bar(f"2 GPUs, diffusers' {name}", best["median_s"], THEIRS)


def pipelines() -> str:
    """Whole calls of pipelines on one and two GPUs."""
    flux, flux2, wan = "pipelines-flux-h200", "pipelines-flux-h200x2", "pipelines-wan-guidance-h200x2"
    wan4 = "pipelines-wan-guidance-50-h200x4"

    def group(title: str, one: Bar, run: str, eager: bool) -> Group:
        ours = Bar("2 GPUs, this library", _median(run, "ours-eager" if eager else "ours"), OURS)
        return Group(title, [one, _fastest_of_diffusers(run, eager), ours])

    return bars(
        "Seconds of a pipeline call, on one GPU and on several",
        [
            group("Flux 1024², 28 steps, blocks compiled", Bar("1 GPU", _median(flux, "diffusers"), ONE), flux2, False),
            group(
                "Flux 1024², 28 steps, not compiled", Bar("1 GPU", _median(flux, "diffusers-eager"), ONE), flux2, True
            ),
            group(
                "Wan 2.1 1.3B, 480p, 81 frames, guidance, 8 steps, blocks compiled",
                Bar("1 GPU", _median(wan, "ours-alone"), ONE),
                wan,
                False,
            ),
            Group(
                "The same with 50 steps",
                [
                    Bar("1 GPU", _median(wan4, "ours-alone"), ONE),
                    Bar("4 GPUs, this library", _median(wan4, "ours"), OURS),
                ],
            ),
        ],
        "s",
        "NVIDIA H200, hosts with slow CPUs. Shorter is better. Runs: benchmarks/results/pipelines-*.json",
    )


def rivals(name: str, run: dict[str, Any]) -> str:
    """Steps of this library and of others, from the recorded run `name` of benchmarks/rivals.py."""
    where, measured = run["environment"], [each for each in run["results"] if "error" not in each]
    colours = {"ours": OURS, "one": ONE}
    groups = [
        Group(
            title,
            [
                Bar(each["variant"], each["ms"], colours.get(each["variant"].partition("-")[0], THEIRS))
                for each in measured
                if each["model"] == title
            ],
        )
        for title in dict.fromkeys(each["model"] for each in measured)
    ]
    note = (
        f"{where['ranks']} x {where['device']}, {where['host']}. Shorter is better. Run: benchmarks/results/{name}.json"
    )
    return bars("Milliseconds of a step, beside other libraries", groups, "ms", note, 1)


def kernels() -> str:
    """Speeds of the exact kernels and the fastest lossy one."""
    groups = []
    for shape, title in (
        ("Flux 1024²", "Flux 1024²: 4,608 tokens"),
        ("Wan 1.3B 480p, 81 frames", "Wan 2.1 1.3B 480p, 81 frames: 32,760 tokens"),
    ):
        of_shape = {
            each["provider"]: each["forward_tflops"]
            for each in results("providers-h200")
            if each["shape"] == shape and "forward_tflops" in each
        }
        named = ("sage", "flash_4", "_native_cudnn", "flash", "xformers", "flex", "_native_efficient")
        shown = [
            Bar(f"{name}, lossy" if name == "sage" else name, of_shape[name], THEIRS if name == "sage" else OURS)
            for name in named
        ]
        groups.append(Group(title, sorted(shown, key=lambda bar: -bar.value)))
    return bars(
        "Speed of attention kernels, forward in bfloat16",
        groups,
        "TFLOP/s",
        "NVIDIA H200. Longer is better. Run: benchmarks/results/providers-h200.json",
        0,
    )


def _step(run: str, strategy: str, provider: str = "_native_cudnn") -> float:
    (found,) = [each["ms"] for each in results(run) if each["strategy"] == strategy and each["provider"] == provider]
    return found


def steps() -> str:
    """Steps of a transformer on one, two and four GPUs."""
    flux, four, wan = (
        "context_parallel-flux-by-default-h200x2",
        "context_parallel-flux-by-default-h200x4",
        "context_parallel-wan-by-default-cudnn-h200x2",
    )
    wan4 = "context_parallel-wan-by-default-cudnn-h200x4"
    return bars(
        "Milliseconds of a transformer step, blocks compiled, attention by cuDNN",
        [
            Group(
                "Flux 1024²",
                [
                    Bar("1 GPU", _step(flux, "single"), ONE),
                    Bar("2 GPUs, diffusers' ring", _step(flux, "diffusers-ring"), THEIRS),
                    Bar("2 GPUs, this library", _step(flux, "defaults"), OURS),
                    Bar("4 GPUs, diffusers' ring", _step(four, "diffusers-ring"), THEIRS),
                    Bar("4 GPUs, this library", _step(four, "defaults"), OURS),
                ],
            ),
            Group(
                "Wan 2.1 1.3B 480p, 81 frames",
                [
                    Bar("1 GPU", _step(wan, "single"), ONE),
                    Bar("2 GPUs, diffusers' Ulysses", _step(wan, "diffusers-ulysses"), THEIRS),
                    Bar("2 GPUs, this library", _step(wan, "defaults"), OURS),
                    Bar("4 GPUs, diffusers' Ulysses", _step(wan4, "diffusers-ulysses"), THEIRS),
                    Bar("4 GPUs, this library", _step(wan4, "defaults"), OURS),
                ],
            ),
        ],
        "ms",
        "NVIDIA H200, hosts with slow CPUs. Shorter is better. Runs: benchmarks/results/*-by-default-*.json",
        1,
    )


def training() -> str:
    """A step of LoRA training on one and two GPUs."""
    found = {(each["strategy"], each["provider"]): each for each in results("training-wan-h200x2") if "seconds" in each}

    def bar(label: str, strategy: str, provider: str, colour: str) -> Bar:
        return Bar(label, found[strategy, provider]["seconds"], colour)

    return bars(
        "Seconds of a step of LoRA training: Wan 2.1 1.3B, 480p, 81 frames",
        [
            Group(
                "Rank 32, blocks checkpointed and compiled",
                [
                    bar("1 GPU, cuDNN", "single", "_native_cudnn", ONE),
                    bar("1 GPU, flash_4", "single", "flash_4", ONE),
                    bar("2 GPUs, diffusers' ring", "diffusers-ring", "_native_cudnn", THEIRS),
                    bar("2 GPUs, cuDNN", "gather", "_native_cudnn", OURS),
                    bar("2 GPUs, flash_4", "gather", "flash_4", OURS),
                ],
            )
        ],
        "s",
        "NVIDIA H200. Shorter is better. Run: benchmarks/results/training-wan-h200x2.json",
    )


def trainers() -> str:
    """A step of LoRA training on one GPU, by this trainer and by others."""

    def group(title: str, name: str, *shown: tuple[str, str, str]) -> Group:
        run = json.loads((RESULTS / f"trainers-{name}-h200.json").read_text())
        warm_up = run["settings"]["warm_up"]

        def seconds(variant: str) -> float:
            turns = [each["seconds"][warm_up:] for each in run["turns"] if each["variant"] == variant]
            return statistics.median(statistics.median(each) for each in turns)

        return Group(title, [Bar(label, seconds(variant), colour) for label, variant, colour in shown])

    return bars(
        "Seconds of a step of LoRA training on one GPU",
        [
            group(
                "Flux.1 dev, 1024 x 1024",
                "flux",
                ("diffusers, flash-attn", "diffusers, flash", THEIRS),
                ("diffusers_attn, eager", "ours", OURS),
                ("diffusers_attn", "ours, compiled", OURS),
            ),
            group(
                "Wan 2.1 1.3B, 480 x 832, 81 frames",
                "wan",
                ("musubi-tuner, flash-attn", "musubi-tuner, flash_attn, compiled", THEIRS),
                ("musubi-tuner, sdpa", "musubi-tuner, sdpa, compiled", THEIRS),
                ("diffusers_attn", "ours", OURS),
            ),
        ],
        "s",
        "NVIDIA H200, rank 16, batch 1. musubi-tuner is compiled. Shorter is better. Runs: trainers-*-h200.json",
    )


CHARTS = {"pipelines": pipelines, "kernels": kernels, "steps": steps, "training": training, "trainers": trainers}
