"""Applies a plan to a model, and removes it.

Splits and gathers are forward hooks (`plan_entry`) on the modules that the plan names. If a module is replaced later,
as LoRA replaces layers, its hooks move to the new module when the next forward starts.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from ...cp_plans.plan import CPAttention, Plan
from ...cp_plans.plan import entries as entries_of
from ...cp_plans.registry import get_cp_plan
from ...errors import AttentionProviderError
from ...recompute import install, keep_for_recomputation
from ...tracing.errors import raise_error
from ...tracing.export import refuse_export
from ..comm import one_thread, rank_progress, shared_groups
from ..comm.symmetric_gather import SymmetricGather
from ..comm.transport import Transport, choose_transport
from ..compile.own_forward import OwnForwards
from ..mesh import ContextParallelMesh
from ..sequences.active import keep_active
from ..sequences.tracker import SequenceTracker
from . import copies, diffusers_hooks, within
from .attention_modules import attention_elsewhere, is_attention
from .dynamic_sizes import DynamicSizes
from .new_attention import KnownAttention
from .plan_entry import hooks_of
from .plan_words import attends
from .submodules import original, submodules
from .words.base import SetHook


class _Entry:
    """One entry of a plan and its hooks."""

    def __init__(
        self,
        path: str,
        spec: Any,
        modules: list[nn.Module],
        tracker: SequenceTracker,
        names: Mapping[int, str],
        hooks_of: Callable[..., Iterable[SetHook]] = hooks_of,
    ) -> None:
        self.path = path
        self.spec = spec
        self.tracker = tracker
        self.hooks_of = hooks_of
        self.handles: list[RemovableHandle] = []
        # Adapters replace layers. They replace neither blocks nor attention modules, of which there are many.
        self._is_followed = bool(path) and (
            "*" not in path or not (path.endswith("*") or spec is None or isinstance(spec, CPAttention))
        )
        self._find(modules, names)

    def _find(self, modules: list[nn.Module], names: Mapping[int, str]) -> None:
        self.modules = [weakref.ref(module) for module in modules]
        self.hooks = [
            hook
            for module in modules
            for hook in self.hooks_of(module, self.path, self.spec, self.tracker, names.get(id(module), self.path))
        ]

    def set(self, forwards: OwnForwards) -> None:
        self.handles = [set_hook() for set_hook in self.hooks]
        for module in self._existing_modules():
            copies.leave_hooks_out(module)
            forwards.give(module)
        self.hooks = []  # they reference the modules, and would keep the model alive

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for module in self._existing_modules():
            copies.keep_hooks(module)

    def _existing_modules(self) -> list[nn.Module]:
        return [module for module in (then() for then in self.modules) if module is not None]

    def refresh(self, model: nn.Module, forwards: OwnForwards) -> None:
        """Moves the hooks if modules were replaced, as by adapters (LoRA) that were added or unloaded."""
        if self._is_followed:
            modules = list(submodules(model, self.path))
            if any(original(now) is not original(then()) for now, then in zip(modules, self.modules)):
                self.remove()
                self._find(modules, {})
                self.set(forwards)


class _Applied(NamedTuple):
    """A model's applied plan."""

    tracker: SequenceTracker
    ends: tuple[RemovableHandle, RemovableHandle]
    """The hooks at the start and the end of a forward of the model."""
    entries: list[_Entry]
    transports: dict[ContextParallelMesh, tuple[Transport, SymmetricGather | None]]
    """For each mesh, how keys and values travel, with the owner of that memory; None if collectives send them."""
    dynamic: DynamicSizes
    attention: KnownAttention
    forwards: OwnForwards


_applied: weakref.WeakKeyDictionary[nn.Module, _Applied] = weakref.WeakKeyDictionary()


def apply_context_parallel(
    module: nn.Module, mesh: DeviceMesh | ContextParallelMesh, plan: Plan | None = None
) -> SequenceTracker:
    """Splits and gathers tensors of `module` over the ranks of `mesh`, as `plan` says.

    On GPUs all ranks of the mesh must call this, each with its GPU as the current device, because they test whether
    they can access each other's memory. A compiled model is compiled again at its next call, and other models keep
    their graphs.

    Args:
        module: a model. Every rank must run it with the same inputs.
        mesh: a DeviceMesh with one dimension, or with dimensions named "ring" and "ulysses"; or a ContextParallelMesh.
        plan: see `diffusers_attn.cp_plans.plan`. None uses the plan registered for the module's class.

    Returns:
        The tracker of the sequences that are split.

    Raises:
        AttentionProviderError: a plan is applied already, or this one does not fit the module. Nothing has changed.
    """
    if module in _applied:
        raise AttentionProviderError(
            f"context parallelism is applied to this {type(module).__name__} already; call "
            "remove_context_parallel(module) first."
        )
    copies.check_not_split(module)
    if isinstance(mesh, DeviceMesh):
        mesh = ContextParallelMesh.from_mesh(mesh)
    tracker = SequenceTracker(mesh)
    tracker.model = type(module).__name__
    names = {id(each): name for name, each in module.named_modules()}
    # The whole plan is read before the first hook is set.
    plan = get_cp_plan(module) if plan is None else plan
    entries = [_Entry(path, spec, list(submodules(module, path)), tracker, names) for path, spec in entries_of(plan)]
    diffusers_hooks.check(module, plan)
    # Attention modules that the plan does not name are watched too.
    of_attention = [entry for entry in entries if attends(entry.spec)]
    named = {id(then()) for entry in of_attention for then in entry.modules}
    others = [each for each in module.modules() if id(each) not in named and is_attention(each)]
    entries += [_Entry("", None, [each], tracker, names) for each in others]
    if all(each() is module for entry in entries for each in entry.modules):
        parts = [each for each in module.modules() if each is not module]
        entries += [_Entry("", None, [each], tracker, names, within.hooks_of) for each in parts]
    tracker.transport, gather = choose_transport(mesh.ring, mesh.device_type)
    transports = {mesh: (tracker.transport, gather)}
    install()
    dynamic = DynamicSizes(module, tracker)
    one_thread.register(_names(tracker), module)
    begin = module.register_forward_pre_hook(_Begin(tracker))
    copies.leave_hooks_out(module)
    forwards = OwnForwards(module)
    for entry in entries:
        entry.set(forwards)
    for each in _parents(module, entries):
        copies.leave_hooks_out(each)
        forwards.give(each)
    end = module.register_forward_hook(_End(tracker), always_call=True)  # after the plan's own hooks on the model
    _applied[module] = _Applied(tracker, (begin, end), entries, transports, dynamic, KnownAttention(module), forwards)
    diffusers_hooks.watch(module, plan, tracker)
    return tracker


def remove_context_parallel(module: nn.Module) -> None:
    """Removes what `apply_context_parallel` has set. Does nothing if no plan is applied.

    Raises:
        AttentionProviderError: `module` is a shallow copy of a split model. Pass the original.
    """
    copies.check_not_shallow(module)
    if module in _applied:
        applied = _applied.pop(module)
        applied.dynamic.unwatch()
        diffusers_hooks.unwatch(module)
        for entry in applied.entries:
            entry.remove()
        for handle in applied.ends:
            handle.remove()
        for each in (*applied.forwards.remove(), module):
            copies.keep_hooks(each)


def _parents(model: nn.Module, entries: Iterable[_Entry]) -> Iterator[nn.Module]:
    """The modules within `model` that call a module with hooks."""
    hooked = {id(each()) for entry in entries for each in entry.modules}
    for each in model.modules():
        if each is not model and id(each) not in hooked and not isinstance(each, (nn.ModuleList, nn.ModuleDict)):
            if any(id(part) in hooked for part in each.modules()):
                yield each


def applied_tracker(module: nn.Module) -> SequenceTracker | None:
    """What `apply_context_parallel` returned for `module`; None if no plan is applied."""
    return _applied[module].tracker if module in _applied else None


def names_of_groups(module: nn.Module) -> list[str]:
    """Names of the groups of ranks that share the sequences of `module`. Empty if no plan is applied."""
    return _names(_applied[module].tracker) if module in _applied else []


def applied_gather(module: nn.Module) -> SymmetricGather | None:
    """The symmetric gather of this module's keys and values; None if collectives send them."""
    return _applied[module].transports[_applied[module].tracker.mesh][1] if module in _applied else None


def add_mesh(module: nn.Module, mesh: ContextParallelMesh) -> None:
    """Prepares a split module for forwards over another mesh, see `using_mesh`. All ranks of `mesh` must call this."""
    applied = _applied[module]
    if mesh not in applied.transports:
        applied.transports[mesh] = choose_transport(mesh.ring, mesh.device_type)
        one_thread.register(_names_of(mesh), module)


@contextlib.contextmanager
def using_mesh(module: nn.Module, mesh: ContextParallelMesh) -> Iterator[None]:
    """Splits forwards of `module` over the ranks of `mesh`, to which `add_mesh` was applied. A mesh of one rank splits
    nothing."""
    tracker, transports = _applied[module].tracker, _applied[module].transports
    before = tracker.mesh
    tracker.use(mesh)
    tracker.transport = transports[mesh][0]
    try:
        yield
    finally:
        tracker.use(before)
        tracker.transport = transports[before][0]


keep_for_recomputation(keep_active)


def _names(tracker: SequenceTracker) -> list[str]:
    """Names of the groups of ranks that share a model's sequences."""
    return _names_of(tracker.mesh)


def _names_of(mesh: ContextParallelMesh) -> list[str]:
    return [group.name for group in (mesh.ring, mesh.ulysses) if group.size > 1]


class _Begin:
    """A forward pre-hook that begins a forward of the model."""

    def __init__(self, tracker: SequenceTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        refuse_export(
            f"this {self.tracker.model}",
            "its sequences are split",
            "Call disable_context_parallel (or remove_context_parallel)",
        )
        if not torch.compiler.is_compiling():
            groups = _names(self.tracker)
            one_thread.take(groups, module)
            if self.tracker.mesh.device_type == "cuda":
                shared_groups.keep_if_captured(groups)
        self.tracker.begin_forward(None if torch.compiler.is_compiling() else sys._getframe(1))
        if not torch.compiler.is_compiling() and module in _applied:
            applied = _applied[module]
            for entry in applied.entries:
                entry.refresh(module, applied.forwards)
            applied.attention.check(module)
            applied.dynamic.watch()


class _End:
    """A forward hook that ends it, also after an error. Otherwise the thread's next attention would count as this
    model's.

    It is set on the model only. Dynamo guards on hooks that are always called, so that one on each block would give a
    graph for each block.
    """

    def __init__(self, tracker: SequenceTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tracker = self.tracker
        # A call that was refused because of another thread's forward has begun none.
        if torch.compiler.is_compiling() or tracker.is_running:
            tracker.end_forward()
        if not torch.compiler.is_compiling():
            error = sys.exc_info()[1] if output is None else None
            if error is None:
                rank_progress.note_end()
            else:
                rank_progress.note_failure(error, _names(tracker))
        # Without an output, the forward has failed.
        if output is not None and tracker.is_split and not tracker.reached and tracker.strict:
            raise_error(attention_elsewhere, module)
