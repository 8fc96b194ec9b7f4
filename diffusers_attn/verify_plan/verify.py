"""Runs a model under a plan on several CPU processes, and compares it with one process."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..context_parallel.comm.group import ALONE
from ..context_parallel.config import ContextParallelConfig
from ..context_parallel.hooks.apply import applied_tracker
from ..context_parallel.hooks.plan_entry import hooks_of
from ..context_parallel.hooks.submodules import submodules
from ..context_parallel.mesh import ContextParallelMesh
from ..context_parallel.sequences.tracker import SequenceTracker
from ..cp_plans.plan import Plan, entries
from ..cp_plans.plan_check import check_sequences
from ..cp_plans.registry import get_cp_plan
from ..errors import AttentionProviderError
from ..parallelize.targets import unwrapped
from ..providers.catalog import AttentionProvider
from ..providers.registry import provider_name
from .rank import IN_RANK, STRATEGIES, UNEXCHANGED, Job
from .report import CPPlanReport, StrategyReport

_GRACE = 10.0
"""Seconds that the other ranks get to end by themselves when one has ended early."""


def verify_cp_plan(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    plan: Plan | None = None,
    world_size: int = 2,
    *,
    gradients: bool = False,
    provider: str | AttentionProvider = "native",
    replace_sdpa: bool = False,
    strategies: Sequence[str] = tuple(STRATEGIES),
    tolerance: float = 1e-4,
    timeout: float = 600.0,
) -> CPPlanReport:
    """Compares a model under a plan on several CPU processes with one process, and names the first module that differs.

    Works in scripts and interactive sessions. `model` is not changed: copies of it run, in float32 and eval mode. Use a
    small model of the class with random, nonzero weights. Inputs reveal most errors if `world_size` does not divide
    their lengths, texts are padded, and the batch has two samples.

    Args:
        model: any module that can be pickled and has no plan applied.
        inputs: arguments of its forward, by name or in order: tensors and other objects that can be pickled.
        plan: see `diffusers_attn.cp_plans.plan`. None: the plan registered for the model's class.
        world_size: number of processes among which the sequences are split; 2 or more.
        gradients: compares the gradients, averaged over the processes, as well.
        provider: name of the provider for all attention modules that can be bound, and for the model's own calls of
            `attention_dispatch`. It must run on a CPU in float32.
        replace_sdpa: replaces F.scaled_dot_product_attention by `attention_dispatch`, for a model that calls it
            without processors.
        strategies: some of "ulysses", "gather" (a ring with rotate_method="allgather") and "ring" (with "alltoall").
        tolerance: largest relative error (Euclidean norm) at which results count as equal.
        timeout: seconds after which all processes are ended.

    Returns:
        A report to print, with the attributes `ok`, `difference` and `strategies`, and `raise_if_wrong()`.

    Raises:
        AttentionProviderError: the model has no plan, has one applied, or cannot be pickled; the plan does not fit the
            model; or an argument is not accepted. No process has started then.
    """
    if IN_RANK in os.environ:
        raise AttentionProviderError(
            "verify_cp_plan was called in a process that it had started itself and that runs your script for the "
            "model's class. Put the call under `if __name__ == '__main__':`, or the class into a module of its own."
        )
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown or not strategies or world_size < 2:
        raise AttentionProviderError(
            f"strategies={tuple(strategies)!r}, world_size={world_size}: accepted are one or more of "
            f"{', '.join(map(repr, STRATEGIES))}, on at least two processes."
        )
    model = unwrapped(model)
    if applied_tracker(model) is not None:
        raise AttentionProviderError(
            f"a plan is applied to this {type(model).__name__} already. Call remove_context_parallel (or "
            "disable_context_parallel) first."
        )
    plan = get_cp_plan(model) if plan is None else plan
    _check_plan(model, plan)  # before any process starts, so that an error is one line
    # nn.Module.to, since the method of diffusers' models logs warnings.
    copied = nn.Module.to(copy.deepcopy(model), "cpu", torch.float32).eval()
    with tempfile.TemporaryDirectory(prefix="verify_cp_plan-") as name:
        folder = Path(name)
        main = _save(folder / "model", copied, _on_cpu(inputs if isinstance(inputs, Mapping) else tuple(inputs)))
        job = Job(
            plan, world_size, tuple(strategies), provider_name(provider), replace_sdpa, gradients, tolerance, timeout,
            main,
        )  # fmt: skip
        (folder / "job").write_bytes(pickle.dumps(job))
        ended = _run(folder, job)
        return _report(folder, job, type(model).__name__, ended)


def _check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises AttentionProviderError if `plan` names modules or arguments that the model lacks, names sequences that
    nothing splits, or contains an object that is not a plan entry."""
    if not isinstance(plan, Mapping):
        raise AttentionProviderError(
            f"plan is a {type(plan).__name__}; a dict is accepted, from names of modules to what happens there: "
            '{"blocks.0": {ParamId("hidden_states"): CPInput(1)}, "proj_out": CPOutput(1)}.'
        )
    tracker = SequenceTracker(ContextParallelMesh(ContextParallelConfig(), ALONE, ALONE))
    for path, spec in entries(plan):
        for module in submodules(model, path):
            list(hooks_of(module, path, spec, tracker))  # functions that would set hooks; making them reads the plan
    check_sequences(plan)


def _on_cpu(value: Any) -> Any:
    """The inputs on the CPU, with floating-point tensors in float32."""
    if isinstance(value, torch.Tensor):
        low = value.dtype in (torch.float16, torch.bfloat16, torch.float64)
        return value.detach().to("cpu", torch.float32 if low else value.dtype)
    if isinstance(value, Mapping):
        return {name: _on_cpu(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_on_cpu(each) for each in value)
    return value


def _save(path: Path, model: nn.Module, inputs: Any) -> str | None:
    """Writes model and inputs. Returns the script that the reading processes must run first, if the model uses a class
    defined in `__main__`; None if they need none."""
    try:
        torch.save((model, inputs), path)
    except Exception as error:
        by_value = _by_value()
        if by_value is None:
            raise _unsendable(model, f"it cannot be pickled: {error}") from error
        torch.save((model, inputs), path, pickle_module=by_value)
        return None
    if not _mentions_main(path):
        return None
    by_value = _by_value()
    if by_value is not None:
        torch.save((model, inputs), path, pickle_module=by_value)
        return None
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or not os.path.exists(script):
        raise _unsendable(model, "its class, or one that it uses, was defined in an interactive session")
    return os.path.abspath(script)


def _by_value() -> ModuleType | None:
    """cloudpickle, which stores the code of classes that cannot be imported; None if it is not installed."""
    return importlib.import_module("cloudpickle") if importlib.util.find_spec("cloudpickle") else None


def _mentions_main(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(b"__main__" in archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _unsendable(model: nn.Module, why: str) -> AttentionProviderError:
    return AttentionProviderError(
        f"{type(model).__name__} cannot be sent to other processes: {why}. Put the class into a module that can be "
        "imported, or `pip install cloudpickle`."
    )


def _run(folder: Path, job: Job) -> list[int | None]:
    """Starts the ranks, and waits until all have ended, until `_GRACE` seconds after the first one, or for the timeout.

    Returns:
        The exit code of each rank; None for ranks that were killed.
    """
    environment = {
        **os.environ, IN_RANK: "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)
    }  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    codes: list[int | None] = []
    try:
        for rank in range(job.world_size):
            with open(folder / f"log-{rank}", "wb") as log:
                command = [sys.executable, "-m", f"{__package__}.rank", str(folder), str(rank)]
                processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
                )
        until = time.monotonic() + job.timeout
        while time.monotonic() < until:
            codes = [process.poll() for process in processes]
            if None not in codes:
                break
            if any(code is not None for code in codes):
                until = min(until, time.monotonic() + _GRACE)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()  # waits, and closes the pipe by which the process detects the end of this one
    return codes


def _report(folder: Path, job: Job, model: str, codes: list[int | None]) -> CPPlanReport:
    strategies: list[StrategyReport] = []
    for name in job.strategies:
        found = _answers(folder, name, job.world_size)
        strategies.append(_combined(name, list(found.values()), len(found) == job.world_size))
        if strategies[-1].error is None:
            died = any(codes[rank] not in (None, 0) for rank in range(job.world_size) if rank not in found)
            # After a rank has died, the errors of the others are about the lost connection.
            difference = None if died else strategies[-1].difference
            failure = "" if difference else (not died and strategies[-1].failure) or _why(folder, job, codes)
            strategies[-1] = StrategyReport(name, difference=difference, failure=failure)
            strategies += [
                StrategyReport(other, failure="not run after this failure")
                for other in job.strategies[job.strategies.index(name) + 1 :]
            ]
            break
    unexchanged = _answers(folder, UNEXCHANGED, job.world_size)
    sensitive = min(unexchanged.values()) if unexchanged else None
    return CPPlanReport(model, job.world_size, job.tolerance, tuple(strategies), sensitive)


def _answers(folder: Path, name: str, ranks: int) -> dict[int, Any]:
    paths = {rank: folder / f"{name}-{rank}" for rank in range(ranks)}
    return {rank: pickle.loads(path.read_bytes()) for rank, path in paths.items() if path.exists()}


def _combined(name: str, found: list[tuple[int, StrategyReport]], complete: bool) -> StrategyReport:
    """Combines the ranks' results: the largest errors, and the earliest difference."""
    strategies = [strategy for _, strategy in found]
    differing = [(order, i) for i, (order, strategy) in enumerate(found) if strategy.difference is not None]
    difference = strategies[min(differing)[1]].difference if differing else None
    failure = next((strategy.failure for strategy in strategies if strategy.failure), "")
    if not complete or any(strategy.error is None for strategy in strategies):
        return StrategyReport(name, difference=difference, failure=failure)
    error = max(strategy.error for strategy in strategies if strategy.error is not None)
    worst = max(strategies, key=lambda each: each.gradient_error or 0.0)
    return StrategyReport(name, error, worst.gradient_error, worst.gradient, difference)


def _why(folder: Path, job: Job, codes: list[int | None]) -> str:
    """Explains why ranks ended without a result: a traceback, exit codes, or the timeout."""
    crashes = _answers(folder, "crash", job.world_size)
    if crashes:
        rank, text = min(crashes.items())
        return f"rank {rank} ended with\n{text.strip()}"
    logs = [(folder / f"log-{rank}").read_text(errors="replace").strip() for rank in range(job.world_size)]
    output = "\n".join(f"rank {rank}: {log[-1000:]}" for rank, log in enumerate(logs) if log)
    if any(code not in (None, 0) for code in codes):
        return f"processes ended with exit codes {codes}. {output}"
    return f"some ranks did not finish within {job.timeout:.0f} s. {output}"
