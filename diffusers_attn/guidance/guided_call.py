"""`GuidedCall` replaces the call of a model whose guidance is divided among groups of ranks."""

from __future__ import annotations

import enum
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..context_parallel.comm import one_thread
from ..context_parallel.hooks import diffusers_hooks
from ..context_parallel.hooks.apply import add_mesh, applied_tracker, names_of_groups, using_mesh
from ..context_parallel.mesh import ContextParallelMesh
from ..errors import AttentionProviderError
from ..nested import mapped, tensors_in
from ..tracing.errors import raise_error
from .batch import Batch
from .branches import GuidedStep, StepKind, shape_of
from .cached_run import CachedRun
from .division import Divider, Division
from .groups import Groups
from .inputs import StepInputs
from .pending import Arrival, PendingTensor, known
from .step_in_progress import Output, StepInProgress, exchange_outputs


class GuidedCall:
    """The call of one model. All ranks make the same calls.

    Args:
        model: a model that is split over all ranks.
        inputs: keeps its inputs equal.
        divider: decides among how many groups a step is divided.
        divide: makes that many groups. All ranks call it together, once for each number.
        guides: whether the pipeline uses guidance in its running call, as far as is known before.
        divides_batch: whether samples of a batch may be computed apart.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: StepInputs,
        divider: Divider,
        divide: Callable[[int], Groups],
        guides: Callable[[], bool],
        divides_batch: bool,
    ) -> None:
        self._model = weakref.ref(model)
        self._inputs = inputs
        self._divider = divider
        self._divide = divide
        self._guides = guides
        self._divides_batch = divides_batch
        self._first = next(iter(inspect.signature(type(model).forward.__get__(model)).parameters))
        self._made: dict[int, Groups] = {}
        self._kinds: dict[Any, StepKind] = {}
        self._step: StepInProgress | None = None
        self.computed = 0
        """Number of calls that this rank has computed, alone or with others."""
        self.run: Callable[..., Any] | None = None
        """What the model's callers would call without this."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError("the model whose call this is does not exist any more")
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():  # which a hook within the call refuses
                raise_error(self._refuse_tracing)
            return nn.Module._call_impl(model, *args, **kwargs)
        args, kwargs = known((args, kwargs))
        if not _is_divisible(model, (args, kwargs)):
            return self._run(*args, **kwargs)
        run, branch = _cached_run(model)
        if run is _NOT_BY_BRANCH:
            return self._run(*args, **kwargs)
        latents = args[0] if args else kwargs.get(self._first)
        if self._step is None or not self._step.step.continues_with(latents):
            self._step = self._begin(latents, run, branch is not None)
        current, number = self._step, self._step.step.calls
        current.step.calls += 1
        if current.arrival is not None and current.arrival.is_over and number < current.branches:
            current.step.was_interrupted = True
        if run is not None and (run.groups is None or branch is None):
            return self._on_all_ranks(model, current, number, args, kwargs)
        if run is not None and branch is not None and run.groups is not None:
            return self._of_run(model, current, run, run.groups, branch, number, latents, args, kwargs)
        if current.groups is None or number >= current.branches:
            return self._on_all_ranks(model, current, number, args, kwargs)
        owner = number % current.division.owners
        return self._by_branch(model, current, current.groups, number, owner, latents, args, kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        assert self.run is not None
        return self.run(*args, **kwargs)

    def _refuse_tracing(self) -> AttentionProviderError | None:
        """The error for a call within compiled code, which would not be divided although it could be."""
        if self._divider.data_degree is None and not self._guides():
            return None
        return AttentionProviderError(
            f"torch.compile was called after enable_context_parallel, and compiles the calls of this "
            f"{type(self._model()).__name__}: compiled code cannot divide guidance, or a batch, among groups of ranks. "
            "Call torch.compile before enable_context_parallel, or compile the transformer in its place, "
            "pipe.transformer.compile(), or its blocks, apply_compile(pipe.transformer). Or have sequences split "
            "alone: enable_context_parallel(pipe, guidance_degree=1)."
        )

    def _begin(self, latents: Any, run: CachedRun | None, has_name: bool) -> StepInProgress:
        """Plans a new step.

        Args:
            latents: of its first call.
            run: the run of a cache; None without a cache.
            has_name: whether the pipeline names the branch that it calls.
        """
        if self._step is not None:
            self._step.step.end()
        kind = self._kinds.setdefault(shape_of(latents), StepKind())
        batch, guides = Batch.of(latents), self._guides()
        samples = batch.samples if self._divides_batch and run is None else 1
        branches = 1 if kind.one_by_one or kind.branches is None else kind.branches
        if run is not None and not run.has_begun and not kind.one_by_one:
            branches = kind.most_branches  # guidance may have stopped at the end of the run before
        division = self._divider.division(samples, branches, guides)
        groups = self._groups(division.groups) if division.owners > 1 else None
        alone: Groups | None = None
        is_unknown = kind.branches is None and (run is None or batch.samples == 1)  # two samples may be two branches
        if groups is None and division.parts == 1 and is_unknown and guides:
            owners = self._divider.division(1, 2, guides).owners
            alone = self._groups(owners) if owners > 1 else None
        if run is not None:
            run.begin((groups or alone) if has_name else None)
            groups = run.groups
            division = Division(1, 1 if groups is None else groups.count)
        current = StepInProgress(GuidedStep(latents, kind), batch, division, branches)
        current.groups = groups
        current.alone = alone if run is None else run.groups
        return current

    def _groups(self, count: int) -> Groups:
        if count not in self._made:
            model = self._model()
            assert model is not None
            self._made[count] = self._divide(count)
            add_mesh(model, self._made[count].mesh)
        return self._made[count]

    def _on_all_ranks(
        self, model: nn.Module, current: StepInProgress, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that all ranks compute. Groups divide its batch, if the step is divided so; otherwise its sequence is
        split over all ranks, and the first time over those of each group alone."""
        self.computed += 1
        args, kwargs = self._inputs.exchanged(args, kwargs)
        plain = _plain(args, kwargs)
        parts, groups = current.division.parts, current.alone
        if parts > 1:
            groups = self._groups(parts)
            args, kwargs = current.batch.part_of((args, kwargs), groups.index, parts)
            one_thread.take(names_of_groups(model), model)
        with using_mesh(model, _mesh(model) if groups is None else groups.mesh), self._inputs.as_given():
            output = self._run(*args, **kwargs)
        if parts > 1 and groups is not None:
            output = current.batch.joined(output, groups)
        current.step.kind.outputs[number, plain] = mapped(output, _like)
        return output

    def _of_run(
        self,
        model: nn.Module,
        current: StepInProgress,
        run: CachedRun,
        groups: Groups,
        branch: str,
        number: int,
        latents: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call under a cache. The group that computes a branch is the same in the whole run. In the first step, whose
        outputs are not known, every group computes every branch by itself."""
        is_new = branch not in run.owners
        owner = run.owners.setdefault(branch, number % groups.count)
        if is_new and (number, _plain(args, kwargs)) not in current.step.kind.outputs:
            return self._on_all_ranks(model, current, number, args, kwargs)
        return self._by_branch(model, current, groups, number, owner, latents, args, kwargs, may_be_together=False)

    def _by_branch(
        self,
        model: nn.Module,
        current: StepInProgress,
        groups: Groups,
        number: int,
        owner: int,
        latents: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        may_be_together: bool = True,
    ) -> Any:
        """A call that the group `owner` computes.

        Args:
            may_be_together: whether all ranks may compute it instead, if its output is not known from an earlier step.
                Otherwise it must be like that of another call.
        """
        outputs_before = current.step.kind.outputs
        expected = outputs_before.get((number, _plain(args, kwargs)))
        if expected is None and may_be_together:  # a call of a new kind
            return self._on_all_ranks(model, current, number, args, kwargs)
        if expected is None and not outputs_before:
            raise AttentionProviderError(
                f"{type(model).__name__} has a cache of diffusers, and the shape of its latents changed while the "
                "cache had states of another one. Reset it before (model._reset_stateful_cache()), or call "
                "enable_context_parallel(pipe, guidance_degree=1)."
            )
        expected = next(iter(outputs_before.values())) if expected is None else expected
        given = args, kwargs
        is_exchanged = current.arrival is None or not (may_be_together or self._inputs.knows(args, kwargs))
        if is_exchanged:
            args, kwargs = self._inputs.exchanged(args, kwargs)
        if current.arrival is None:
            current.arrival = Arrival(functools.partial(self._exchange, current))
            one_thread.take(names_of_groups(model), model)
        if not is_exchanged:
            args, kwargs = self._inputs.later(args, kwargs)
        arrival = current.arrival
        assert arrival is not None
        division = current.division
        part, mine = division.place(groups.index)
        parts = [current.batch.part_of(expected, each, division.parts) for each in range(division.parts)]
        values: list[Tensor] | None = None
        if owner == mine:
            self.computed += 1
            with using_mesh(model, groups.mesh), self._inputs.as_given():
                if not is_exchanged:
                    args, kwargs = self._inputs.within(groups, args, kwargs)
                args, kwargs = current.batch.part_of((args, kwargs), part, division.parts)
                output = self._run(*args, **kwargs)
            _check(model, output, parts[part])
            values = tensors_in(output)
        device = tensors_in(latents)[0].device
        pending: list[PendingTensor] = []

        def promise(like: Tensor) -> PendingTensor:
            pending.append(PendingTensor(like, device, arrival))
            return pending[-1]

        outputs = mapped(expected, promise)
        current.outputs.append(Output(number, given, is_exchanged, owner, expected, parts, pending, values))
        if arrival.is_over:  # outputs were needed before this call
            self._exchange(current)
        elif number == current.branches - 1:
            arrival.finish()
        return known(outputs) if arrival.is_over else outputs

    def _exchange(self, current: StepInProgress) -> None:
        """Sets the values of the step's pending outputs. All ranks call this at the same place of the pipeline."""
        model, outputs = self._model(), current.outputs
        assert model is not None and current.groups is not None
        current.outputs = []
        self._keep_pace(model, current, current.groups, outputs)
        exchange_outputs(current, current.groups, outputs)
        if not self._inputs.confirm():
            for each in outputs:
                if not each.is_exchanged:
                    again = self._on_all_ranks(model, current, each.number, *each.given)
                    for pending, value in zip(each.pending, tensors_in(again), strict=True):
                        pending.value = value

    def _keep_pace(self, model: nn.Module, current: StepInProgress, groups: Groups, outputs: list[Output]) -> None:
        """Where a step ended early, a group may have computed fewer calls. FSDP gathers weights from all ranks in every
        forward, so then it computes a call again that another group waits in."""
        part, mine = current.division.place(groups.index)
        calls = [sum(each.owner == owner for each in outputs) for owner in range(current.division.owners)]
        missing = max(calls) - calls[mine]
        if missing and any(isinstance(each, DTensor) for each in model.parameters()):
            args, kwargs = current.batch.part_of(outputs[0].given, part, current.division.parts)
            for _ in range(missing):
                with using_mesh(model, groups.mesh), self._inputs.as_given():
                    self._run(*args, **kwargs)


def _mesh(model: nn.Module) -> ContextParallelMesh:
    """All ranks, over which the model is split."""
    tracker = applied_tracker(model)
    assert tracker is not None
    return tracker.mesh


_NOT_BY_BRANCH = CachedRun()
"""Stands for caches whose states do not belong to single branches."""


def _cached_run(model: nn.Module) -> tuple[CachedRun | None, str | None]:
    """The run of a model's cache, and the name of the branch that is called; None without hooks that keep a state."""
    if not diffusers_hooks.keeps_state(model):
        return None, None
    manager = diffusers_hooks.cache_by_branch(model)
    # With sharded weights, ranks may have to repeat a call to keep pace, which would change the states.
    if manager is None or any(isinstance(each, DTensor) for each in model.parameters()):
        return _NOT_BY_BRANCH, None
    return diffusers_hooks.state_of_run(manager, CachedRun), diffusers_hooks.branch_of(manager)


def _is_divisible(model: nn.Module, arguments: Any) -> bool:
    """Whether a call depends on nothing but its arguments and a cache, so that not every rank has to make it."""
    if torch.is_grad_enabled() or model.training:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # into a user's CUDA graph
        return False
    return _is_value(arguments)


_VALUES = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum, np.generic, np.ndarray)


def _is_value(argument: Any) -> bool:
    """Whether an argument is a nest of plain values. Into another object, such as a cache, the model may write."""
    if isinstance(argument, Mapping):
        return all(map(_is_value, argument.values()))
    if isinstance(argument, (list, tuple)):
        return all(map(_is_value, argument))
    return isinstance(argument, _VALUES)


def _plain(args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
    """The flags among the arguments, on which the kind of output depends. Hashable."""
    found = [(name, value) for name, value in sorted(kwargs.items()) if isinstance(value, _FLAGS)]
    return tuple(found), tuple(value for value in args if isinstance(value, _FLAGS))


_FLAGS = (bool, str, type(None))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _check(model: nn.Module, output: Any, expected: Any) -> None:
    """Raises AttentionProviderError if an output is not like that of the earlier step: other ranks expect that."""
    found = [(tuple(each.shape), each.dtype) for each in tensors_in(output)]
    before = [(tuple(each.shape), each.dtype) for each in tensors_in(expected)]
    if found != before:
        raise AttentionProviderError(
            f"{type(model).__name__} returned {found}, and {before} in an earlier call with latents of the same shape. "
            "Ranks that did not compute this call expect that. Call enable_context_parallel(pipe, guidance_degree=1)."
        )
