"""The command `doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import exit_codes

VERSION = 1
"""Version of the JSON schema."""


def doctor(
    run: Annotated[
        bool,
        typer.Option("--run", help="Run every usable provider once: compare it with float64, and measure its time."),
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that the import of one package, or the run of one provider, may take before it counts as "
            "broken.",
            min=1,
        ),
    ] = 120.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Examine this machine: GPUs, packages, which providers are usable, and why others are not.

    Every package is imported in a process of its own, so that a broken one does no harm. The exit code is 1 if
    something that is installed does not work.
    """
    from ..output import console, write_json
    from .examine import examine

    err = console(stderr=True)
    with err.status("") as status:
        report = examine(timeout, run, status.update)
    if json:
        write_json("doctor", VERSION, as_json(report))
    else:
        show(report)
    if not report.ok:
        raise typer.Exit(exit_codes.FOUND)


def as_json(report: Any) -> dict[str, Any]:
    """The report as the documented JSON object."""
    import dataclasses

    return {
        "ok": report.ok,
        "machine": dataclasses.asdict(report.machine),
        "packages": {name: package.version for name, package in report.packages.items()},
        "torch": report.torch,
        "diffusers": report.diffusers,
        "providers": [dataclasses.asdict(each) for each in report.providers],
        "problems": [dataclasses.asdict(each) for each in report.problems],
        "runs": report.runs,
        "copies_bytes_per_second": report.copies_bytes_per_second,
        "strategies": report.strategies,
    }


def show(report: Any) -> None:
    """Prints the report for people."""
    from ..output import STYLES, digits, heading, say, table

    machine, torch = report.machine, report.torch
    say(f"{machine.system}, Python {machine.python} ({machine.executable})")
    if machine.driver:
        newest = f", CUDA up to {machine.driver_cuda}" if machine.driver_cuda else ""
        say(f"NVIDIA driver {machine.driver}{newest}; {'nvcc ' + machine.nvcc if machine.nvcc else 'no nvcc'}")
    else:
        say("no NVIDIA driver")
    if torch:
        parts = {"CUDA": torch["cuda"], "ROCm": torch["rocm"], "cuDNN": torch["cudnn"], "NCCL": torch["nccl"]}
        versions = ", ".join(f"{name} {version}" for name, version in parts.items() if version)
        say(f"PyTorch {torch['version']}, {versions or 'a build for the CPU'}")
        for index, gpu in enumerate(torch["gpus"]):
            say(
                f"GPU {index}: {gpu['name']}, compute capability {gpu['compute_capability']}, "
                f"{gpu['memory_bytes'] / 2**30:.0f} GiB ({gpu['free_bytes'] / 2**30:.0f} free)"
            )
        if torch["connection"]:
            links = torch["connection"].replace("nvlink", "NVLink").replace("pcie", "PCIe")
            say(f"The GPUs are connected by {links}. `diffusers-attn advise MODEL` predicts a model's steps.")
    say("Packages: " + ", ".join(f"{name} {each.version}" for name, each in report.packages.items()))
    if report.providers:
        heading("Providers")
        rows = [
            (
                each.name + ("" if each.exact else " (lossy)"),
                "yes" if each.available else "no",
                each.version or "" if each.available else each.reason,
                each.fix,
            )
            for each in report.providers
        ]
        table(("provider", "usable", "version, or why not", "command"), rows)
    if report.runs:
        heading("Runs")
        rows = [
            (
                name,
                f"{each['device']}, {each['dtype']}",
                *(
                    (digits(each["ms"]), digits(each["tflops"]), f"{each['error']:.1e}")
                    if each["ms"] is not None
                    else ("", "", each["problem"])
                ),
            )
            for name, each in report.runs.items()
        ]
        table(("provider", "on", "ms", "TFLOP/s", "error"), rows, numbers=("ms", "TFLOP/s"))
    if report.copies_bytes_per_second:
        copies = ", ".join(f"GPU {i}: {digits(each / 1e9)}" for i, each in enumerate(report.copies_bytes_per_second))
        say(f"Copies to the next GPU, GB/s: {copies}")
    if report.strategies:
        speeds = "measured" if report.copies_bytes_per_second else "typical"
        heading(f"Strategies on {len(torch['gpus'])} GPUs, predicted from {speeds} speeds of links")
        for each in report.strategies:
            one, best = digits(each["one_gpu_seconds"] * 1e3), digits(each["seconds"] * 1e3)
            others = ", ".join(f"{digits(it['seconds'] * 1e3)} by {it['strategy']}" for it in each["others"])
            verdict = each["strategy"] if each["pays"] else f"one GPU; several do not pay, at best {each['strategy']}"
            say(
                f"{each['size']}, {each['tokens']:,} tokens: {verdict}. {best} ms of attention and exchanges in a "
                f"step; {one} on one GPU{', ' if others else ''}{others}.{' ' + each['why'] if each['pays'] else ''}"
            )
    heading("Problems" if report.problems else "No problems")
    for each in report.problems:
        say(f"{each.level}: {each.text}", STYLES[each.level])
        if each.fix:
            say(f"  fix: {each.fix}")
    count = sum(each.level == "error" for each in report.problems)
    if report.problems:
        say(f"{count} error{'s' * (count != 1)}.")
