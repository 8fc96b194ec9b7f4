"""`bench` on all ranks of a job: measures strategies of context parallelism, and prints their results."""

from __future__ import annotations

import dataclasses
import os
import sys

import torch.distributed as dist

from ...context_parallel import job
from .. import exit_codes
from ..output import digits, heading, say, table, write_json
from .measure import Setting
from .report import environment
from .strategies import ONE_RANK, StrategyResult, all_strategies, measure_strategies, strategy_of


def measure_on_ranks(
    settings: list[tuple[str, Setting]], providers: list[str], strategies: str | None, json: bool, version: int
) -> None:
    """Measures strategies on all ranks of the job, prints on rank 0, and ends the process.

    Args:
        settings: what to measure, by name.
        strategies: names separated by commas; None is all that the ranks can use.
        json: whether to print one JSON object, of the schema `version`.
    """
    on = settings[0][1].device
    job.join(on.type)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    named = None if strategies is None else [strategy_of(each, ranks) for each in strategies.split(",")]
    runs, failed = [], False
    for name, setting in settings:
        found = named or all_strategies(ranks, on.type, setting.shape.heads, job.ranks_per_node())
        results = measure_strategies(found, providers, setting)
        failed |= any(each.wrong for each in results)
        runs.append(
            {
                "workload": name,
                "shape": setting.shape._asdict(),
                "mask": setting.mask,
                "backward": setting.backward,
                "results": [dataclasses.asdict(each) for each in results],
            }
        )
        if rank == 0 and not json:
            _show(name, setting, results, ranks)
    if rank == 0 and json:
        write_json("bench", version, {"environment": environment(settings[0][1]), "ranks": ranks, "runs": runs})
    sys.stdout.flush()
    dist.barrier()
    os._exit(exit_codes.FOUND if failed else 0)  # the threads of gloo may abort a process that ends in the usual way


def _show(name: str, setting: Setting, results: list[StrategyResult], ranks: int) -> None:
    where = environment(setting)
    backward = ", forward and backward" if setting.backward else ""
    heading(f"{name} on {ranks} ranks: {setting.shape}, {where['dtype']}, mask: {setting.mask}{backward}")
    say(where["device"])
    alone = {each.provider: each.ms for each in results if each.strategy == ONE_RANK and each.ms is not None}
    rows = [
        (
            each.provider + ("" if each.exact else " (lossy)"),
            each.strategy,
            digits(each.ms),
            f"{alone[each.provider] / each.ms:.2f}" if each.provider in alone else "",
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
