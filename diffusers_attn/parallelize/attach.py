"""Splits one model between ranks (`attach`), and undoes it (`detach`)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..context_parallel.comm import one_thread, rank_progress, shared_groups, stalls
from ..context_parallel.hooks import copies
from ..context_parallel.hooks.apply import apply_context_parallel, names_of_groups, remove_context_parallel
from ..context_parallel.mesh import ContextParallelMesh
from ..cp_plans.advanced import CPCache
from ..cp_plans.plan import ParamId, Plan, entries
from ..guidance.installed import uninstall, without_call
from ..processors.binding import attention_modules_of, change_processor, install, is_bound
from ..processors.bound import BoundProcessor, bind, obstacle, unbind
from ..runtime.cuda_graphs.apply import leave_ranks
from ..vae import split
from ..vae.split import VaeTarget
from .choices import Choices
from .fingerprint import fingerprint
from .forward_count import CountForward, Forwards
from .guidance import Guidance, attach_guidance
from .guidance import obstacle as guidance_obstacle
from .input_exchange import Links
from .input_sync import InputSync
from .targets import Target


class _Enabled(NamedTuple):
    """The changes made to one model. Holds no reference to the model, which would keep it alive."""

    hooks: list[RemovableHandle | stalls.Watch]
    leases: list[shared_groups.Lease]
    """Leases of the process groups that the model uses."""
    forwards: list[Forwards]
    processors: list[tuple[weakref.ref[nn.Module], Any]]
    """The modules that were bound, each with its former processor."""


_enabled: weakref.WeakKeyDictionary[nn.Module, _Enabled] = weakref.WeakKeyDictionary()


def attach(
    target: Target,
    sharing: ContextParallelMesh,
    lease: shared_groups.Lease,
    sharers: list[int],
    chosen: Choices,
    guidance: Guidance | None,
    pipeline: Callable[[], Any],
) -> None:
    """Changes one model. Each step is recorded as it is taken, so that `detach` can undo a half-done change.

    Args:
        target: the model and its plan.
        sharing: the ranks that share a sequence.
        lease: holds the process groups of `sharing`.
        sharers: numbers of these ranks in the job.
        chosen: the choices of all ranks.
        guidance: how guidance is divided; None if it is not.
        pipeline: returns the pipeline of the model, or None.
    """
    install()  # needed even if nothing is bound, so that enable_parallelism raises on a split model
    model = target.model
    enabled = _enabled[model] = _Enabled([], [lease.another()], [], [])
    apply_context_parallel(model, sharing, target.plan)
    hook: InputSync | None = None
    if chosen.inputs != "trust":
        links = Links.of(sharing, chosen.timeout)
        enabled.leases.append(links.lease)
        hook = InputSync(model, links, chosen.inputs, _caches(target.plan), target.name)
        enabled.forwards.append(hook.forwards)
        enabled.hooks.append(model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        enabled.hooks.append(model.register_state_dict_pre_hook(hook.forwards.adapters.may_have_changed))
    else:
        enabled.forwards.append(Forwards(model, target.name))
        enabled.hooks.append(model.register_forward_pre_hook(CountForward(enabled.forwards[0]), prepend=True))
    for _, module in attention_modules_of(model):
        processor = module.processor
        if obstacle(processor) is None and (chosen.rebind or not isinstance(processor, BoundProcessor)):
            enabled.processors.append((weakref.ref(module), processor))
            module.set_processor(chosen.request)
            copies.change_copies(
                module, functools.partial(change_processor, change=functools.partial(_as_before, before=processor))
            )
    if guidance is not None and guidance_obstacle(target, chosen.inputs) is None:
        attach_guidance(target, guidance, sharing, hook, enabled.leases, chosen.timeout, pipeline)
        copies.change_copies(model, without_call)
    enabled.hooks.append(stalls.Watch(sharers, chosen.timeout, ends_process=sharing.device_type == "cpu"))


def attach_vae(target: VaeTarget, sharing: ContextParallelMesh, lease: shared_groups.Lease, chosen: Choices) -> None:
    """Splits a VAE by rows between the ranks that share a sequence. `unsplit_vae` undoes it."""
    split.attach(
        target,
        [group for group in (sharing.ring, sharing.ulysses) if group.size > 1],
        lease,
        required=chosen.split_vae is True,
        broadcast=chosen.inputs == "broadcast",
        compare=fingerprint if chosen.inputs == "check" else None,
    )


def _caches(plan: Plan) -> list[str]:
    """Names of the model's arguments that the plan declares as caches (`CPCache`)."""
    specs = [spec for path, spec in entries(plan) if not path and isinstance(spec, Mapping)]
    keys = [key for spec in specs for key, word in spec.items() if isinstance(word, CPCache)]
    names = [key.name if isinstance(key, ParamId) else key for key in keys]
    return [name for name in names if isinstance(name, str)]


def detach(model: nn.Module) -> None:
    """Undoes `attach`. Does nothing if the model is not split.

    Raises:
        AttentionProviderError: the model is a shallow copy of a split model, or another thread runs its exchanges.
    """
    copies.check_not_shallow(model)
    enabled = _enabled.get(model)
    if enabled is None:
        return
    one_thread.check_idle([*names_of_groups(model), *(name for lease in enabled.leases for name in lease.names)], model)
    del _enabled[model]
    for forwards in enabled.forwards:
        rank_progress.note(f"disable_context_parallel, after {forwards.latest()}")
    for reference, before in enabled.processors:
        module: Any = reference()
        if module is not None:
            module.set_processor(_as_before(module.processor, before) if is_bound(module) else before)
    for hook in enabled.hooks:
        hook.remove()
    uninstall(model)
    remove_context_parallel(model)
    for reference, _ in enabled.processors:
        module = reference()
        if module is not None:
            copies.keep_hooks(module)
    leave_ranks(model)
    for lease in enabled.leases:
        lease.close()


def _as_before(now: Any, before: Any) -> Any:
    """The processor to restore: `before`, or, if diffusers has replaced it since (fused projections, IP-Adapters), the
    replacement with the binding of `before`."""
    by_diffusers = isinstance(now, BoundProcessor) or type(now).__module__.startswith("diffusers.")
    if unbind(now) is unbind(before) or not by_diffusers:
        return before
    return bind(now, before.choice) if isinstance(before, BoundProcessor) else unbind(now)
