"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import exit_codes
from .workloads import MASKS, WORKLOADS

VERSION = 1
"""Version of the JSON schema."""
DTYPES = ("bfloat16", "float16", "float32", "float64")


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
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _on_ranks(workloads, shape, provider, mask, backward, dtype, device, strategies, seconds, save, plot, json)
        return
    if strategies is not None:
        from ...errors import AttentionProviderError

        raise AttentionProviderError(
            "--strategies needs several ranks: `accelerate launch --num_processes 2 -m diffusers_attn bench` or "
            "`torchrun --nproc_per_node 2 -m diffusers_attn bench`."
        )
    import dataclasses

    from ...providers import speeds_file
    from ..output import console, say, write_json
    from .measure import measure
    from .plot import check_plottable, draw
    from .save import check_savable, speeds_of
    from .timing import matmul_tflops

    settings, providers = _settings(workloads, shape, provider, mask, backward, dtype, device, seconds)
    first = settings[0][1]
    if save is not None:
        check_savable(first)
    if plot is not None:
        check_plottable(plot)
    measured = []
    with console(stderr=True).status("matrix products") as status:
        peak = matmul_tflops(first.device, first.dtype)
        for name, setting in settings:
            results = measure(providers, setting, lambda text, name=name: status.update(f"{name}: {text}"))  # type: ignore[misc]
            measured.append((name, setting, results))
            if not json:
                status.stop()
                _show(name, setting, results, peak)
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
        write_json("bench", VERSION, {"environment": _environment(first), "matmul_tflops": peak, "runs": runs})
    if save is not None:
        speeds_file.write(
            save, speeds_of([(setting, results) for _, setting, results in measured]), _environment(first)
        )
        if not json:
            say(f"saved {save}; export {speeds_file.SETTING}={save} makes auto choose by it")
    if plot is not None:
        draw(plot, [(name, results) for name, _, results in measured], _title(first), peak)
        if not json:
            say(f"saved {plot}")
    failed = [
        each for _, _, results in measured for each in results if each.wrong or (each.problem and not each.refused)
    ]
    if failed:
        raise typer.Exit(exit_codes.FOUND)


def _on_ranks(
    workloads: list[str] | None,
    shapes: list[str] | None,
    providers: list[str] | None,
    mask: str,
    backward: bool,
    dtype: str | None,
    device: str | None,
    strategies: str | None,
    seconds: float,
    save: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    """Measures strategies on all ranks of the job, prints on rank 0, and ends the process."""
    import dataclasses
    import os
    import sys

    import torch
    import torch.distributed as dist

    from ...context_parallel import job
    from ...errors import AttentionProviderError
    from ..output import write_json
    from .strategies import all_strategies, measure_strategies, strategy_of

    if save is not None or plot is not None:
        raise AttentionProviderError("--save and --plot are for one process; leave them out on several ranks.")
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    chosen = providers or ["auto" if device else "native"]
    settings, names = _settings(workloads, shapes, chosen, mask, backward, dtype, device, seconds)
    on = settings[0][1].device
    job.join(on.type)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    named = None if strategies is None else [strategy_of(each, ranks) for each in strategies.split(",")]
    runs, failed = [], False
    for name, setting in settings:
        found = named or all_strategies(ranks, on.type, setting.shape.heads, job.ranks_per_node())
        results = measure_strategies(found, names, setting)
        failed |= any(each.wrong for each in results)
        runs.append(
            {
                "workload": name,
                "shape": setting.shape._asdict(),
                "mask": mask,
                "backward": backward,
                "results": [dataclasses.asdict(each) for each in results],
            }
        )
        if rank == 0 and not json:
            _show_strategies(name, setting, results, ranks)
    if rank == 0 and json:
        write_json("bench", VERSION, {"environment": _environment(settings[0][1]), "ranks": ranks, "runs": runs})
    sys.stdout.flush()
    dist.barrier()
    os._exit(exit_codes.FOUND if failed else 0)  # the threads of gloo may abort a process that ends in the usual way


def _show_strategies(name: str, setting: Any, results: list[Any], ranks: int) -> None:
    from ..output import digits, heading, say, table
    from .strategies import ONE_RANK

    where = _environment(setting)
    backward = ", forward and backward" if setting.backward else ""
    heading(f"{name} on {ranks} ranks: {setting.shape}, {where['dtype']}, mask: {setting.mask}{backward}")
    say(where["device"])
    alone = {each.provider: each.ms for each in results if each.strategy == ONE_RANK}
    rows = [
        (
            each.provider + ("" if each.exact else " (lossy)"),
            each.strategy,
            digits(each.ms),
            f"{alone[each.provider] / each.ms:.2f}" if alone.get(each.provider) else "",
            f"{each.error:.1e}",
            *([f"{each.gradient_error:.1e}"] if setting.backward else []),
            each.transport,
            "wrong" if each.wrong else "",
        )
        for each in results
        if each.ms is not None
    ]
    errors = ("error", *(["gradient error"] if setting.backward else []))
    header = ("provider", "strategy", "ms", "times as fast", *errors, "transport", "")
    table(header, rows, numbers=header[2 : 4 + len(errors)])
    for each in results:
        if each.problem:
            say(f"{each.provider}, {each.strategy}: not measured: {each.problem}")


def _settings(
    workloads: list[str] | None,
    shapes: list[str] | None,
    providers: list[str] | None,
    mask: str,
    backward: bool,
    dtype: str | None,
    device: str | None,
    seconds: float,
) -> tuple[list[tuple[str, Any]], list[str]]:
    """The named settings and the providers, checked before anything runs."""
    import torch

    from ...errors import AttentionProviderError
    from ...providers.registry import list_providers, provider_name, provider_status, unavailable
    from .measure import Setting
    from .workloads import shape_of, workload_shape

    on = _device(device)
    if mask not in MASKS:
        raise AttentionProviderError(f"--mask {mask}: accepted are {', '.join(MASKS)}.")
    if dtype not in (None, *DTYPES):
        raise AttentionProviderError(f"--dtype {dtype}: accepted are {', '.join(DTYPES)}.")
    kind = getattr(torch, dtype or ("float32" if on.type == "cpu" else "bfloat16"))
    names = list(workloads or ()) or ([] if shapes else ["tiny" if on.type == "cpu" else "flux-1024"])
    named = [(name, workload_shape(name)) for name in names] + [(text, shape_of(text)) for text in shapes or ()]
    chosen = [provider_name(each) for each in providers or ()]
    for name in chosen:
        status = provider_status(name)
        if not status.available:
            raise unavailable(status)
    chosen = chosen or [each.name for each in list_providers() if each.available]
    return [(name, Setting(shape, mask, kind, on, backward, seconds)) for name, shape in named], chosen


def _device(name: str | None) -> Any:
    import torch

    from ...errors import AttentionProviderError

    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).partition("\n")[0]
        raise AttentionProviderError(
            f"--device {name}: {problem}. Accepted is a device that PyTorch can use here, such as cpu or cuda:0."
        ) from error
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _environment(setting: Any) -> dict[str, Any]:
    """What the figures were measured with."""
    import torch

    from ..doctor.installed import installed

    device = setting.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU (threads: {torch.get_num_threads()})",
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else None,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "cuda": torch.version.cuda,
        "packages": {name: each.version for name, each in installed().items()},
    }


def _title(setting: Any) -> str:
    where = _environment(setting)
    backward = ", forward and backward" if setting.backward else ""
    return f"Attention on {where['device']}, {where['dtype']}, mask: {setting.mask}{backward}"


def _show(name: str, setting: Any, results: list[Any], peak: float) -> None:
    from ..output import STYLES, digits, heading, say, table

    where = _environment(setting)
    backward = ", forward and backward" if setting.backward else ""
    heading(f"{name}: {setting.shape}, {where['dtype']}, mask: {setting.mask}{backward}")
    say(f"{where['device']}; matrix products: {digits(peak)} TFLOP/s")
    rows = [
        (
            each.provider + ("" if each.exact else " (lossy)"),
            digits(each.ms),
            digits(each.tflops),
            f"{each.tflops / peak:.0%}",
            f"{each.error:.1e}",
            *([f"{each.gradient_error:.1e}"] if setting.backward else []),
            "wrong" if each.wrong else "",
        )
        for each in sorted(results, key=lambda each: each.ms or 0)
        if each.ms is not None
    ]
    errors = ("error", *(["gradient error"] if setting.backward else []))
    header = ("provider", "ms", "TFLOP/s", "of matmul", *errors, "")
    if rows:
        table(header, rows, numbers=header[1:-1])
    for each in results:
        if each.problem:
            say(f"{each.provider}: {'not measured' if each.refused else 'failed'}: {each.problem}",
                "" if each.refused else STYLES["error"])  # fmt: skip
