"""The command `verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import exit_codes

VERSION = 1
"""Version of the JSON schema."""


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CLASS_OR_PATH",
            help="A model class, of which tiny models are verified; a folder with a small pipeline; or "
            "FILE.py:FUNCTION, where FUNCTION() returns (model, inputs) or (model, inputs, plan). Default for "
            "FUNCTION: case.",
        ),
    ],
    ranks: Annotated[int, typer.Option(help="Number of CPU processes that share the sequences.", min=2)] = 2,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Strategy to verify: ulysses, gather or ring. May be repeated. Default: all three."),
    ] = None,
    provider: Annotated[str, typer.Option(help="Attention provider, which must run on a CPU in float32.")] = "native",
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients as well.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest relative error at which results count as equal.", min=0)
    ] = 1e-4,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which the processes of a model are ended.", min=1)
    ] = 600,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for the call of a pipeline. Default: a cat.", show_default=False)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels for the call of a pipeline. Default: the pipeline's.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width in pixels for the call of a pipeline. Default: the pipeline's.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames for the call of a pipeline. Default: the pipeline's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Verify a plan: compare a model that is split between CPU processes with one process.

    Names the first module that differs. The exit code is 1 if a plan is wrong, or if the output hardly depends on
    attention, so that nothing is proved. Use small models: every process holds one in float32.
    """
    from ...verify_plan.rank import STRATEGIES
    from ...verify_plan.verify import verify_cp_plan
    from ..output import STYLES, console, say, write_json
    from .cases import cases_of

    given = {"prompt": prompt, "height": height, "width": width, "num_frames": frames}
    call = {name: value for name, value in given.items() if value is not None}
    reports = []
    for case in cases_of(target, call):
        with console(stderr=True).status(f"verifying {case.name} on {ranks} processes"):
            report = verify_cp_plan(
                case.model,
                case.inputs,
                case.plan,
                ranks,
                gradients=gradients,
                provider=provider,
                strategies=tuple(strategy or STRATEGIES),
                tolerance=tolerance,
                timeout=timeout,
            )
        reports.append((case.name, report))
        if not json:
            say(f"{case.name}:")
            say(str(report), "" if report.ok else STYLES["error"])
    ok = all(report.ok for _, report in reports)
    if json:
        write_json("verify", VERSION, {"ok": ok, "reports": [_as_json(name, report) for name, report in reports]})
    if not ok:
        raise typer.Exit(exit_codes.FOUND)


def _as_json(name: str, report: Any) -> dict[str, Any]:
    """A report as the documented JSON object."""
    import dataclasses

    return {
        "case": name,
        "ok": report.ok,
        "model": report.model,
        "ranks": report.world_size,
        "tolerance": report.tolerance,
        "strategies": [{**dataclasses.asdict(each), "right": report.right(each)} for each in report.strategies],
        "without_exchange": report.unexchanged,
        "insensitive": report.insensitive,
    }
