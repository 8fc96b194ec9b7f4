"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import exit_codes
from .workloads import DTYPES, MASKS, WORKLOADS

VERSION = 1
"""Version of the JSON schema."""


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORKLOAD",
            help=f"Shapes of real models: {', '.join(WORKLOADS)}. Default: flux-1024 on a GPU, tiny on a CPU.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Further shape as batch,heads,length,head_dim: 1,24,4608,128. May be repeated."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Provider to measure, or auto. May be repeated. Default: all that are usable here."),
    ] = None,
    mask: Annotated[
        str, typer.Option(help=f"Mask: {'; '.join(f'{name} ({text})' for name, (text, _) in MASKS.items())}.")
    ] = "none",
    backward: Annotated[bool, typer.Option("--backward", help="Measure a forward and its backward together.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Type of the tensors: {', '.join(DTYPES)}. Default: bfloat16 on a GPU, float32 on a CPU."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device, such as cuda:1 or cpu. Default: the first GPU, or the CPU without one.")
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Under accelerate launch or torchrun: strategies of context parallelism, separated by commas: gather, "
            "ring, ulysses, or with degrees ulysses2-gather4. Default: all that these GPUs can use."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds to measure each provider at each shape.", min=0)] = 1.0,
    save: Annotated[
        Path | None,
        typer.Option(
            help="File to add the speeds to, on a GPU. Where the environment variable DIFFUSERS_ATTN_SPEEDS names it, "
            "auto chooses by them. Default: none."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture to draw the speeds into, such as speeds.png. Needs matplotlib. Default: none."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Measure providers: error against float64, milliseconds, TFLOP/s and the share of the speed of matrix products.

    Inputs are random numbers. TFLOP/s count 4 operations per pair of query and key and per head_dim in a forward, 14
    with the backward; of causal attention half of the pairs. The exit code is 1 if a provider fails, or if the error of
    an exact one is larger than rounding explains.

    Started on several ranks (accelerate launch --num_processes 4 -m diffusers_attn bench), it measures each strategy of
    context parallelism beside one rank: milliseconds of the slowest rank, and the error of the joined output.
    """
    import dataclasses
    import functools
    import os

    from ...errors import AttentionProviderError
    from ...providers import speeds_file
    from ..output import console, say, write_json
    from .measure import measure
    from .plot import check_plottable, draw
    from .report import environment, show, title
    from .save import check_savable, speeds_of
    from .settings import device_of_rank, settings_of
    from .timing import matmul_tflops

    on_ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if on_ranks:
        if save is not None or plot is not None:
            raise AttentionProviderError("--save and --plot are for one process; leave them out on several ranks.")
        device = device or device_of_rank()
        provider = provider or ["auto" if device else "native"]
    elif strategies is not None:
        raise AttentionProviderError(
            "--strategies needs several ranks: `accelerate launch --num_processes 2 -m diffusers_attn bench` or "
            "`torchrun --nproc_per_node 2 -m diffusers_attn bench`."
        )
    settings, providers = settings_of(workloads, shape, provider, mask, backward, dtype, device, seconds)
    if on_ranks:
        from .on_ranks import measure_on_ranks

        measure_on_ranks(settings, providers, strategies, json, VERSION)
        return
    first = settings[0][1]
    if save is not None:
        check_savable(first)
    if plot is not None:
        check_plottable(plot)
    measured = []
    with console(stderr=True).status("matrix products") as status:
        peak = matmul_tflops(first.device, first.dtype)
        for name, setting in settings:
            results = measure(providers, setting, functools.partial(_update, status, name))
            measured.append((name, setting, results))
            if not json:
                status.stop()
                show(name, setting, results, peak)
                status.start()
    if json:
        runs = [
            {
                "workload": name,
                "shape": setting.shape._asdict(),
                "mask": mask,
                "backward": backward,
                "results": [
                    {**dataclasses.asdict(each), "share_of_matmul": each.tflops and each.tflops / peak}
                    for each in results
                ],
            }
            for name, setting, results in measured
        ]
        write_json("bench", VERSION, {"environment": environment(first), "matmul_tflops": peak, "runs": runs})
    if save is not None:
        speeds_file.write(save, speeds_of([(setting, results) for _, setting, results in measured]), environment(first))
        if not json:
            say(f"saved {save}; export {speeds_file.SETTING}={save} makes auto choose by it")
    if plot is not None:
        draw(plot, [(name, results) for name, _, results in measured], title(first), peak)
        if not json:
            say(f"saved {plot}")
    failed = [
        each for _, _, results in measured for each in results if each.wrong or (each.problem and not each.refused)
    ]
    if failed:
        raise typer.Exit(exit_codes.FOUND)


def _update(status: Any, name: str, text: str) -> None:
    status.update(f"{name}: {text}")
