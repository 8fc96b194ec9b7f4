"""Applies FSDP2 to a model, and takes it off again, which FSDP2 itself cannot.

FSDP2 sets forward hooks on a unit, which gather its weights and free them. In a compiled block these hooks would be
traced and break its graph. So `_call` runs them around the whole call of the module, outside of anything compiled. Its
hooks on `state_dict` and `load_state_dict` are taken off too: they expect shards where adapters are loaded.

Private names of PyTorch, which only this file uses: `_get_fsdp_state` of `FSDPModule`; of this state `_pre_forward`,
`_post_forward`, `_lazy_init`, `_state_ctx`, `_comm_ctx`, `_training_state` and `_fsdp_param_group`; and
`_module_state_mapping`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ...errors import AttentionProviderError
from .sharded_module import class_for
from .units import Unit, adapter_weights, sharded_weights

_FOR_DYNAMO = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""Attributes by which Dynamo leaves out guards. Compiled blocks need them: adapters may be added."""


class _Before(NamedTuple):
    """What FSDP2 changed in a module."""

    module: weakref.ref[nn.Module]
    cls: type[nn.Module]
    added: tuple[str, ...]
    """Names of attributes that it added."""


class Sharded:
    """A model with FSDP2.

    Args:
        model: the model, with weights in any memory.
        found: its units.
        mesh: the ranks over which weights are sharded: one dimension, with the device type of the ranks.
        bring: brings these modules' weights and buffers to this rank's device. Called before a unit is sharded, so that
            the device holds one unit at a time in full; and for all other modules in the end.
    """

    def __init__(
        self, model: nn.Module, found: list[Unit], mesh: DeviceMesh, bring: Callable[[Iterable[nn.Module]], None]
    ) -> None:
        self.trained = {
            (id(module), name): weight.requires_grad
            for module in model.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        }
        """Whether each weight is trained. FSDP2 needs one dtype among trained weights of a unit, so shards are not."""
        attributes = {module: (type(module), set(vars(module))) for module in model.modules()}
        adapters = adapter_weights(model)
        for unit in found:
            homes = [(weight, weight.data) for weight in unit.weights()]
            bring(each for module in unit.modules for each in module.modules())
            weights = sharded_weights(unit, adapters)
            for weight in weights:
                weight.requires_grad_(False)
            chosen = {id(weight) for weight in weights}
            _shard(list(unit.modules), mesh, {each for each in unit.weights() if id(each) not in chosen})
            for weight, home in homes:  # what refers to a weight, such as a traceback, must not keep it on the device
                if id(weight) in chosen:
                    weight.data = home
        bring(model.modules())
        _shard([model], mesh, set(model.parameters()))
        root: Any = model
        root._get_fsdp_state()._lazy_init()  # else the first unit that is called by itself would become a root
        self.changed: list[_Before] = []
        for module, (cls, names) in attributes.items():
            for name in _FOR_DYNAMO:
                vars(module).pop(name, None)
            self.changed.append(_Before(weakref.ref(module), cls, tuple(set(vars(module)) - names)))
            _remove_hooks(module)
            if isinstance(module, FSDPModule):
                module.__class__ = class_for(type(module), cls, _call, module is model)  # type: ignore[assignment]
        by_path = {unit.path: unit.modules[0] for unit in found}
        for unit in found:
            if unit.next is not None:
                by_path[unit.path].set_modules_to_forward_prefetch([by_path[unit.next]])  # type: ignore[operator]

    def remove(self, model: nn.Module, home: torch.device) -> None:
        """Gathers every weight, one by one, and leaves a plain model on the device `home`. All ranks must call this."""
        full: dict[int, nn.Parameter] = {}
        for module in list(model.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and isinstance(weight.data, DTensor):
                    if id(weight) not in full:
                        full_weight = weight.data.full_tensor().to(home)
                        full[id(weight)] = nn.Parameter(full_weight, self.trained.get((id(module), name), False))
                    module._parameters[name] = full[id(weight)]
        for reference, cls, added in self.changed:
            changed = reference()
            if changed is not None:
                _clean(changed, cls, added)
        nn.Module.to(model, home)


def _shard(modules: list[nn.Module], mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    which: Any = modules if len(modules) > 1 else modules[0]
    fully_shard(which, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)


def _call(module: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a module with its weights gathered. The module receives its own arguments: FSDP2 would move them to the
    device, and copy the lists and dicts that a model may write into."""
    state = module._get_fsdp_state()
    in_backward = state._training_state.name == "PRE_BACKWARD"  # a recomputation, which checkpoints end by an exception
    state._pre_forward(module, _NO_ARGUMENTS, {})
    try:
        output = plain(module, *args, **kwargs)
    except BaseException as error:
        if not in_backward:
            _end_failed(module, state)
        if isinstance(error, RuntimeError) and "mixed torch.Tensor and DTensor" in str(error):
            raise AttentionProviderError(
                f"{type(module).__name__} uses weights of a layer or block within it without calling that module, "
                "so that they were not gathered. Leave this model out of shard_weights."
            ) from error
        raise
    output = state._post_forward(module, _NO_ARGUMENTS, output)
    if state._state_ctx.iter_forward_root is None and not torch.is_grad_enabled():
        _forget_order(state)
    return output


_NO_ARGUMENTS = (None,)  # on GPUs, PyTorch 2.11 cannot move an empty tuple


def _forget_order(state: Any) -> None:
    """Drops the order of forwards, which FSDP2 keeps for a backward, so that it does not grow with every forward."""
    state._comm_ctx.post_forward_order.clear()
    for each in state._state_ctx.all_states:
        if each._fsdp_param_group is not None:
            each._fsdp_param_group._post_forward_indices.clear()


def _end_failed(module: Any, state: Any) -> None:
    """Ends a forward that raised, so that the next one can begin."""
    state._training_state = type(state._training_state).IDLE
    if state._state_ctx.iter_forward_root is state:
        state._state_ctx.iter_forward_root = None
    module.reshard()


def _clean(module: nn.Module, cls: type[nn.Module], added: Iterable[str]) -> None:
    """Removes the traces of FSDP2 from a module."""
    module.__class__ = cls
    for name in added:
        vars(module).pop(name, None)
    _composable_state._module_state_mapping.pop(module, None)


def _remove_hooks(module: nn.Module) -> None:
    hooks = [value for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)]
    numbers = {number for each in hooks for number, hook in each.items() if _is_of_fsdp(hook)}
    for each in hooks:
        for number in numbers:
            each.pop(number, None)


def _is_of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # of the wrapper of a load_state_dict hook
    return (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp")
