"""`GuidedCall` replaces the call of a model whose guidance is divided among groups of ranks."""

from __future__ import annotations

import enum
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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
from . import batch
from .branches import Kind, Step, shape_of
from .groups import Groups
from .inputs import Arguments, StepInputs
from .pending import Arrival, PendingTensor, known

_CALL = "_call_impl"  # what nn.Module's `__call__` runs, with all hooks, unless the module is compiled as a whole


class GuidedCall:
    """The call of one model. All ranks make the same calls.

    Args:
        model: a model that is split over all ranks.
        inputs: keeps its inputs equal.
        ranks: number of ranks.
        degree: number of groups; None: as many as divide the ranks and the branches (or samples).
        divide: makes that many groups. All ranks call it together, once for each number.
        expects_branches: whether the pipeline is about to make one call per branch, as far as is known before.
        divides_batch: whether samples of a batch may be computed apart.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: StepInputs,
        ranks: int,
        degree: int | None,
        divide: Callable[[int], Groups],
        expects_branches: Callable[[], bool],
        divides_batch: bool,
    ) -> None:
        self._model = weakref.ref(model)
        self._inputs = inputs
        self._ranks = ranks
        self._degree = degree
        self._divide = divide
        self._expects_branches = expects_branches
        self._divides_batch = divides_batch
        self._first = next(iter(inspect.signature(type(model).forward.__get__(model)).parameters))
        self._made: dict[int, Groups] = {}
        self._kinds: dict[Any, Kind] = {}
        self._step: _Plan | None = None
        self.computed = 0
        """Number of calls that this rank has computed, alone or with others."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError("the model whose call this is does not exist any more")
        if torch.compiler.is_compiling():
            return nn.Module._call_impl(model, *args, **kwargs)
        args, kwargs = known((args, kwargs))
        if not _is_divisible(model, (args, kwargs)):
            return nn.Module._call_impl(model, *args, **kwargs)
        latents = args[0] if args else kwargs.get(self._first)
        if self._step is None or not self._step.step.continues_with(latents):
            self._step = self._begin(latents)
        plan, number = self._step, self._step.step.calls
        plan.step.calls += 1
        if plan.arrival is not None and plan.arrival.is_over and number < plan.branches:
            plan.step.was_interrupted = True
        samples = batch.samples_of(latents)
        if plan.groups is None or number >= plan.branches > 1:
            return self._whole(model, plan, number, args, kwargs)
        if plan.by_batch:
            return self._by_batch(model, plan.groups, samples, args, kwargs)
        return self._by_branch(model, plan, plan.groups, number, latents, args, kwargs)

    def _begin(self, latents: Any) -> _Plan:
        """Plans a new step."""
        if self._step is not None:
            self._step.step.end()
        kind = self._kinds.setdefault(shape_of(latents), Kind())
        by_batch = self._count(batch.samples_of(latents)) if self._divides_batch else 1
        branches = 1 if kind.one_by_one or kind.branches is None else kind.branches
        by_branch = self._count(branches)
        step = Step(latents, kind)
        if by_batch >= by_branch and by_batch > 1:
            return _Plan(step, self._groups(by_batch), 1, by_batch=True)
        if by_branch > 1:
            return _Plan(step, self._groups(by_branch), branches)
        plan = _Plan(step, None, 1)
        if kind.branches is None and self._count(2) > 1 and self._expects_branches():
            plan.alone = self._groups(self._count(2))  # so that blocks are compiled for these groups alone
        return plan

    def _count(self, parts: int) -> int:
        """Number of groups for so many branches or samples."""
        most = math.gcd(parts, self._ranks)
        return most if self._degree is None else self._degree if most % self._degree == 0 else 1

    def _groups(self, count: int) -> Groups:
        if count not in self._made:
            model = self._model()
            assert model is not None
            self._made[count] = self._divide(count)
            add_mesh(model, self._made[count].mesh)
        return self._made[count]

    def _whole(self, model: nn.Module, plan: _Plan, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that all ranks compute, with its sequence split over them, and the first time by each group alone."""
        self.computed += 1
        mesh = _mesh(model) if plan.alone is None else plan.alone.mesh
        args, kwargs = self._inputs.exchanged(args, kwargs)
        with using_mesh(model, mesh), self._inputs.as_given():
            output = nn.Module._call_impl(model, *args, **kwargs)
        plan.step.kind.outputs[number, _plain(args, kwargs)] = mapped(output, _like)
        return output

    def _by_batch(
        self, model: nn.Module, groups: Groups, samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.computed += 1
        args, kwargs = self._inputs.exchanged(args, kwargs)
        count = samples // groups.count
        args, kwargs = batch.part_of((args, kwargs), samples, groups.index * count, count)
        one_thread.take(names_of_groups(model), model)
        with using_mesh(model, groups.mesh), self._inputs.as_given():
            output = nn.Module._call_impl(model, *args, **kwargs)
        return batch.joined(output, samples, groups)

    def _by_branch(
        self,
        model: nn.Module,
        plan: _Plan,
        groups: Groups,
        number: int,
        latents: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        expected = plan.step.kind.outputs.get((number, _plain(args, kwargs)))
        if expected is None:  # a call of a new kind: its output is not known yet
            return self._whole(model, plan, number, args, kwargs)
        given = args, kwargs
        if number == 0:
            args, kwargs = self._inputs.exchanged(args, kwargs)
            plan.arrival = Arrival(functools.partial(self._exchange, plan))
            one_thread.take(names_of_groups(model), model)
        else:
            args, kwargs = self._inputs.later(args, kwargs)
        arrival = plan.arrival
        assert arrival is not None
        owner = number % groups.count
        values: list[Tensor] | None = None
        if owner == groups.index:
            self.computed += 1
            with using_mesh(model, groups.mesh), self._inputs.as_given():
                if number:
                    args, kwargs = self._inputs.within(groups, args, kwargs)
                output = nn.Module._call_impl(model, *args, **kwargs)
            _check(model, output, expected)
            values = tensors_in(output)
        device = tensors_in(latents)[0].device
        pending: list[PendingTensor] = []

        def promise(like: Tensor) -> PendingTensor:
            pending.append(PendingTensor(like, device, arrival))
            return pending[-1]

        outputs = mapped(expected, promise)
        plan.outputs.append(_Output(number, given, owner, pending, values))
        if arrival.is_over:  # outputs were needed before this call
            self._exchange(plan)
        elif number == plan.branches - 1:
            arrival.finish()
        return known(outputs) if arrival.is_over else outputs

    def _exchange(self, plan: _Plan) -> None:
        """Sets the values of the step's pending outputs. All ranks call this at the same place of the pipeline."""
        model, outputs = self._model(), plan.outputs
        assert model is not None and plan.groups is not None
        plan.outputs = []
        self._keep_pace(model, plan.groups, outputs)
        _exchange(plan.groups, outputs)
        if not self._inputs.confirm():
            for each in outputs:
                if each.number:  # the inputs of the first call were exchanged before it
                    again = self._whole(model, plan, each.number, *each.given)
                    for pending, value in zip(each.pending, tensors_in(again), strict=True):
                        pending.value = value

    def _keep_pace(self, model: nn.Module, groups: Groups, outputs: list[_Output]) -> None:
        """Where a step ended early, a group may have computed fewer calls. FSDP gathers weights from all ranks in every
        forward, so then it computes a call again that another group waits in."""
        calls = [sum(each.owner == group for each in outputs) for group in range(groups.count)]
        missing = max(calls) - calls[groups.index]
        if missing and any(isinstance(each, DTensor) for each in model.parameters()):
            args, kwargs = outputs[0].given
            for _ in range(missing):
                with using_mesh(model, groups.mesh), self._inputs.as_given():
                    nn.Module._call_impl(model, *args, **kwargs)


class _Plan:
    """How the calls of one step are computed.

    Args:
        step: the step.
        groups: the groups that divide it; None: all ranks compute each call together.
        branches: number of calls that it should have.
        by_batch: whether the groups divide the batch of each call.
    """

    def __init__(self, step: Step, groups: Groups | None, branches: int, by_batch: bool = False) -> None:
        self.step = step
        self.groups = groups
        self.branches = branches
        self.by_batch = by_batch
        self.alone: Groups | None = None
        """Groups that each compute all of an unknown step, without an exchange."""
        self.arrival: Arrival | None = None
        self.outputs: list[_Output] = []
        """Outputs that were not exchanged yet."""


class _Output(NamedTuple):
    """The output of one call of a step."""

    number: int
    """Number of the call in its step."""
    given: Arguments
    """Arguments of the call on this rank."""
    owner: int
    """The group that computes it."""
    pending: list[PendingTensor]
    values: list[Tensor] | None
    """The values in that group; None in others."""


def _exchange(groups: Groups, outputs: list[_Output]) -> None:
    """Sets the values of pending tensors on all ranks."""
    every = [each for output in outputs for each in output.pending]
    for dtype in dict.fromkeys(each.dtype for each in every):
        theirs: list[list[PendingTensor]] = [[] for _ in range(groups.count)]
        mine: list[Tensor] = []
        for output in outputs:
            theirs[output.owner] += [each for each in output.pending if each.dtype == dtype]
            mine += [each.flatten() for each in output.values or () if each.dtype == dtype]
        sizes = [sum(each.numel() for each in group) for group in theirs]
        device = next(each.device for each in every if each.dtype == dtype)
        rows = groups.gather(torch.cat(mine) if mine else torch.empty(0, dtype=dtype, device=device), sizes)
        ordered = [each for group in theirs for each in group]
        for tensor, value in zip(ordered, rows.split([each.numel() for each in ordered])):
            tensor.value = value.view(tensor.shape)


def _mesh(model: nn.Module) -> ContextParallelMesh:
    """All ranks, over which the model is split."""
    tracker = applied_tracker(model)
    assert tracker is not None
    return tracker.mesh


def _is_divisible(model: nn.Module, arguments: Any) -> bool:
    """Whether a call depends on nothing but its arguments, so that not every rank has to make it."""
    if torch.is_grad_enabled() or model.training:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # into a user's CUDA graph
        return False
    # Caches of diffusers keep results of this rank's tokens from one step to the next.
    return not diffusers_hooks.fingerprint(model) and _is_value(arguments)


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


def install(model: nn.Module, call: GuidedCall) -> None:
    """Replaces the call of `model`."""
    vars(model)[_CALL] = call


def uninstall(model: nn.Module) -> None:
    """Undoes `install`. Does nothing if it was not called."""
    vars(model).pop(_CALL, None)


def guided_call(model: nn.Module) -> GuidedCall | None:
    """The call that replaces the model's; None if there is none."""
    found = vars(model).get(_CALL)
    return found if isinstance(found, GuidedCall) else None


def without_call(state: dict[str, Any]) -> None:
    """Removes the call from the state of a copy of a model."""
    state.pop(_CALL, None)
