"""A process that `verify_cp_plan` starts: python -m diffusers_attn.verify_plan.rank FOLDER RANK.

It reads its job from the folder, and writes a file of results for each strategy there, so that a failure loses no
earlier results.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import multiprocessing.spawn
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..atomic_files import write_atomically
from ..context_parallel.hooks.apply import apply_context_parallel, remove_context_parallel
from ..context_parallel.hooks.submodules import submodules
from ..context_parallel.mesh import ContextParallelMesh
from ..context_parallel.sequences.sharding import Shards, gather
from ..cp_plans.plan import CPAttention, Plan, entries
from ..dispatch import attention_dispatch
from ..errors import AttentionProviderError
from ..nested import all_tensors_in
from ..parent_process import end_with_parent
from ..scope import attention_provider
from .compare import compare, relative_error
from .module_calls import record
from .report import StrategyReport

STRATEGIES = {"ulysses": ("ulysses", "allgather"), "gather": ("ring", "allgather"), "ring": ("ring", "alltoall")}
"""Dimension of the mesh and rotate_method of each strategy."""
UNEXCHANGED = "unexchanged"
"""Name of the run in which attention exchanges nothing between ranks."""
IN_RANK = "DIFFUSERS_ATTN_VERIFYING"
"""Environment variable set in these processes. They run the user's script again if it defines the model's class."""


class Job(NamedTuple):
    """The work of all ranks."""

    plan: Plan
    world_size: int
    strategies: tuple[str, ...]
    provider: str
    replace_sdpa: bool
    gradients: bool
    tolerance: float
    timeout: float
    main: str | None
    """Path of the script that defines the model's class, if the class is in `__main__`."""


def _inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = copy.deepcopy(inputs)
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})


def _forward(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = _inputs(inputs)
    torch.manual_seed(0)
    return all_tensors_in(model(*args, **kwargs))


def _gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss that depends on every element of the outputs, by parameter."""
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    loss = torch.stack([output.square().mean() for output in outputs if output.is_floating_point()]).sum()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named.items(), grads)
    }


@contextlib.contextmanager
def _routed(job: Job) -> Iterator[None]:
    functional = torch.nn.functional
    local = functional.scaled_dot_product_attention
    if job.replace_sdpa:
        functional.scaled_dot_product_attention = attention_dispatch
    try:
        with attention_provider(job.provider):
            yield
    finally:
        functional.scaled_dot_product_attention = local


def _bind(model: nn.Module, provider: str) -> None:
    """Binds the attention of `model` if possible. Other models must call attention_dispatch, or the check fails."""
    from ..processors import set_attention_provider

    with contextlib.suppress(AttentionProviderError):
        set_attention_provider(model, provider)


def attention_names(model: nn.Module, plan: Plan) -> frozenset[str]:
    """Names of the attention modules: those with a processor, and those that the plan names in a `CPAttention`."""
    attention = {id(module) for module in model.modules() if hasattr(module, "processor")}
    for path, spec in entries(plan):
        if isinstance(spec, CPAttention):
            attention |= {id(module) for module in submodules(model, path)}
    return frozenset(name for name, module in model.named_modules() if id(module) in attention)


def work(
    job: Job, model: nn.Module, inputs: Any, rank: int, folder: Path, mesh_of: Callable[..., ContextParallelMesh]
) -> None:
    """Runs all strategies, and then the first one without exchange.

    Args:
        job: the work.
        model: the model.
        inputs: arguments of its forward.
        rank: number of this process.
        folder: folder for results.
        mesh_of: makes a mesh of all ranks, given ring, ulysses and rotate_method.
    """
    grad = contextlib.nullcontext() if job.gradients else torch.no_grad()
    with grad:
        alone, expected = record(model, lambda: _forward(model, inputs))
    expected_grads = _gradients(model, expected) if job.gradients else {}
    expected = [each.detach() for each in expected]
    _bind(model, job.provider)
    names = attention_names(model, job.plan)
    for name in (*job.strategies, UNEXCHANGED):
        axis, method = STRATEGIES[job.strategies[0] if name == UNEXCHANGED else name]
        degrees = {"ring": 1, "ulysses": 1, axis: job.world_size}
        mesh = mesh_of(**degrees, rotate_method=method)
        tracker = apply_context_parallel(model, mesh, job.plan)
        tracker.strict = False  # the first difference tells more than an error
        if name == UNEXCHANGED:
            tracker.attention = lambda query_len, key_len: None  # type: ignore[method-assign]
            tracker.gathers_others = False
            try:
                with _routed(job), torch.no_grad():
                    error = _error(_forward(model, inputs), expected)
            except Exception:
                error = float("inf")
            _write(folder, name, rank, error)
            remove_context_parallel(model)
            return
        with _routed(job), torch.no_grad() if not job.gradients else contextlib.nullcontext():
            outputs, difference, raised = compare(
                model, lambda: _forward(model, inputs), alone, tracker, names, job.tolerance
            )
        found = StrategyReport(name, difference=None if difference is None else difference[1])
        order = difference[0] if difference is not None else 0
        if raised is not None:
            if difference is None:
                found = StrategyReport(name, failure="".join(traceback.format_exception_only(raised)).strip())
            _write(folder, name, rank, (order, found))
            return  # the other ranks may be waiting for this one, so no further exchange is possible
        error, gradient_error, gradient = _error(outputs, expected), None, ""
        if job.gradients and error <= job.tolerance:
            gradient_error, gradient = _gradient_error(_gradients(model, outputs), expected_grads, mesh)
        found = StrategyReport(
            name, error, gradient_error, gradient, None if error <= job.tolerance else found.difference
        )
        _write(folder, name, rank, (order, found))
        remove_context_parallel(model)


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    return max((relative_error(one, other) for one, other in zip(found, expected)), default=0.0)


def _gradient_error(
    found: dict[str, Tensor], expected: dict[str, Tensor], mesh: ContextParallelMesh
) -> tuple[float, str]:
    """The largest error of a gradient averaged over the ranks, and the parameter's name.

    The error is relative to the norm of the parameter's own gradient, or to a thousandth of the average norm if that is
    larger.
    """
    each = Shards.contiguous(mesh.size, mesh.size)
    found = {name: gather(grad[None], each, 0, mesh).mean(dim=0) for name, grad in found.items()}
    average = sum(grad.double().norm().item() for grad in expected.values()) / max(len(expected), 1)
    errors = {
        name: ((found[name] - grad).double().norm() / max(grad.double().norm().item(), 1e-3 * average)).item()
        for name, grad in expected.items()
    }
    worst = max(errors, key=errors.__getitem__, default="")
    return errors.get(worst, 0.0), worst


def _write(folder: Path, name: str, rank: int, value: Any) -> None:
    """Writes a file atomically, because the starting process polls for it."""
    write_atomically(folder / f"{name}-{rank}", lambda path: path.write_bytes(pickle.dumps(value)))


@functools.cache
def _groups(axis: str, world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=(axis,))


def _mesh(ring: int, ulysses: int, rotate_method: str) -> ContextParallelMesh:
    axis = "ring" if ring > 1 else "ulysses"
    return ContextParallelMesh.from_mesh(_groups(axis, ring * ulysses), rotate_method=rotate_method)


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    end_with_parent(folder)
    job: Job = pickle.loads((folder / "job").read_bytes())
    try:
        if job.main is not None:  # as multiprocessing does for spawned processes
            multiprocessing.spawn._fixup_main_from_path(job.main)  # type: ignore[attr-defined]
        model, inputs = torch.load(folder / "model", weights_only=False)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.world_size))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=job.world_size,
            timeout=datetime.timedelta(seconds=job.timeout),
        )
        work(job, model, inputs, rank, folder, _mesh)
        code = 0
    except BaseException as error:
        for_user = isinstance(error, AttentionProviderError)  # a traceback would not help the user
        _write(folder, "crash", rank, f"{type(error).__name__}: {error}" if for_user else traceback.format_exc())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Does not destroy process groups, since the ranks would wait for each other.
    os._exit(code)


if __name__ == "__main__":
    main()
