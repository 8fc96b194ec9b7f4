"""What one entry of a plan does: hooks on the modules that it names.

All that can be looked up is looked up when a hook is made; a hook itself only slices, so that a compiler traces it into
its module's graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...cp_plans.advanced import (
    CPBlocks,
    CPCache,
    CPForbidden,
    CPGatherInput,
    CPHalo,
    CPHeads,
    CPLength,
    CPLogBase,
    CPRequired,
    CPStore,
)
from ...cp_plans.plan import CPAttention, CPInput, CPOutput, ParamId
from ...errors import AttentionProviderError
from ...nested import describe, like, updated
from ...tracing.errors import raise_error
from ..sequences.tracker import REPLICATED, Role, SequenceTracker
from .halo import AddHalo, CutHalo
from .head_exchange import ToHeads, ToTokens
from .kv_cache import GatheringStore
from .submodules import original
from .too_short import has_entries, problem_of
from .within import CheckCalled, check_called


def hooks_of(
    module: nn.Module, path: str, spec: Any, tracker: SequenceTracker, name: str | None = None
) -> Iterator[Callable[[], RemovableHandle]]:
    """The hooks of one entry of a plan, as functions that set them. `name` is the module's, if `path` means several."""
    name = path if name is None else name
    if spec is None:
        yield from _attention_hooks(module, tracker, None, name)
    elif spec is CheckCalled:
        yield lambda: module.register_forward_pre_hook(CheckCalled(tracker, name))
    elif isinstance(spec, CPAttention):
        keys = spec.query if spec.key is None else spec.key
        role = Role(tuple(spec.query), tuple(keys), spec.outer_mask, spec.key_mask, spec.row_mask, spec.prefix)
        if spec.prefix is not None:
            tracker.replicated.add(spec.prefix)
        yield from _attention_hooks(module, tracker, role, name, spec.bound)
    elif isinstance(spec, CPHalo):
        length = None if spec.length is None else argument_of(module, path, ParamId(spec.length))
        add = AddHalo(tracker, path, spec, length)
        yield lambda: module.register_forward_pre_hook(add, with_kwargs=True)
        yield lambda: module.register_forward_hook(CutHalo(tracker, spec))
    elif isinstance(spec, CPHeads):
        places = [(name, argument_of(module, path, ParamId(name))[1], dims) for name, dims in spec.arguments.items()]
        yield lambda: module.register_forward_pre_hook(ToHeads(tracker, path, spec, places), with_kwargs=True)
        yield lambda: module.register_forward_hook(ToTokens(tracker, path, spec))
        yield from _attention_hooks(module, tracker, REPLICATED, name)  # of some heads
    elif isinstance(spec, CPOutput) or (isinstance(spec, Sequence) and not isinstance(spec, str)):
        outputs = [spec] if isinstance(spec, CPOutput) else list(spec)
        if not all(each is None or isinstance(each, CPOutput) for each in outputs):
            raise _not_understood(path, spec)
        yield lambda: module.register_forward_hook(_GatherOutputs(tracker, path, outputs))
    elif isinstance(spec, Mapping):
        before, behind = [], []
        for key, each in spec.items():
            param = as_param(key)
            words = words_in(each)
            if not words or not all(isinstance(word, _INPUTS) for word in words):
                raise _not_understood(path, spec)
            for word in words:
                if isinstance(word, CPInput) and word.sequence is not None:
                    names = (word.sequence,) if isinstance(word.sequence, str) else word.sequence
                    tracker.named.update(names)
                    tracker.balanced.update(names if word.balanced else ())
            if isinstance(words[0], CPInput) and words[0].split_output:
                behind.append((param, each))
            else:
                before.append((*argument_of(module, path, param), each))
        if before:
            yield lambda: module.register_forward_pre_hook(_SplitInputs(tracker, path, before), with_kwargs=True)
        if behind:
            yield lambda: module.register_forward_hook(_SplitOutputs(tracker, path, behind))
    else:
        raise _not_understood(path, spec)


def _attention_hooks(
    module: nn.Module, tracker: SequenceTracker, role: Role | None, name: str, bound: bool = False
) -> list[Callable[[], RemovableHandle]]:
    return [
        lambda: module.register_forward_pre_hook(_EnterAttention(tracker, role, bound, name)),
        lambda: module.register_forward_hook(_LeaveAttention(tracker, role, name)),
    ]


def _not_understood(path: str, spec: object) -> AttentionProviderError:
    words = words_in(spec) if isinstance(spec, (list, tuple, Mapping)) else [spec]
    if any(type(word).__module__.startswith("diffusers.") for word in words):
        return AttentionProviderError(
            f"the plan has {spec!r} for '{path}', which is in the words of diffusers. Here ContextParallelInput is "
            "CPInput, and ContextParallelOutput is CPOutput, with the same arguments: import them from diffusers_attn."
        )
    return AttentionProviderError(
        f"the plan has {spec!r} for '{path}'. Accepted are a dict of ParamId to "
        f"{', '.join(word.__name__ for word in _INPUTS)} (or, for nested arguments, lists and dicts of them), a "
        "CPOutput or a list of them, a CPHalo, a CPHeads, a CPAttention, and a list of these."
    )


_INPUTS = (CPInput, CPGatherInput, CPStore, CPCache, CPLength, CPLogBase, CPBlocks, CPForbidden, CPRequired)


def as_param(key: ParamId | str | int) -> ParamId:
    """The argument that a key of a plan's entry means."""
    if isinstance(key, ParamId):
        return key
    return ParamId(index=key) if isinstance(key, int) else ParamId(key)


def words_in(spec: Any) -> list[Any]:
    """All that is in a nested spec."""
    if isinstance(spec, (list, tuple)):
        return [word for each in spec if each is not None for word in words_in(each)]
    return [word for each in spec.values() for word in words_in(each)] if isinstance(spec, Mapping) else [spec]


def argument_of(module: nn.Module, path: str, param: ParamId) -> tuple[str | None, int | None]:
    """Name and place of an argument of the module's forward: whichever way a caller gives it, the hook finds it."""
    parameters = list(inspect.signature(original(module).forward).parameters.values())
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    anywhere = names + [each.name for each in parameters if each.kind == each.KEYWORD_ONLY]
    open_ended = any(each.kind == each.VAR_KEYWORD for each in parameters)
    if param.name in anywhere:
        return param.name, names.index(param.name) if param.name in names else None
    if param.index is not None and -len(names) <= param.index < len(names):
        index = param.index % len(names)
        return names[index], index
    if param.name is not None and open_ended:
        return param.name, None
    raise AttentionProviderError(
        f"the plan names argument {param} of '{path}', and the forward of {type(original(module)).__name__} has "
        f"{', '.join(anywhere) or 'none'}."
    )


class _PlanHook:
    """What hooks share: applying a spec to whatever is nested as it is."""

    def __init__(self, tracker: SequenceTracker, path: str) -> None:
        self.tracker = tracker
        self.path = path

    def split(self, value: Any, spec: Any, what: str, outputs: Sequence[Any] = ()) -> Any:
        """`value` with its tensors split, or gathered, as `spec` says. Of an output, `outputs` are all of its module's,
        for an error to speak of."""
        if isinstance(spec, CPRequired):
            if value is None:
                raise AttentionProviderError(
                    f"this forward was given no {what}, without which its context-parallel plan cannot serve it: "
                    f"{spec.reason}"
                )
            return value
        if value is None or spec is None or isinstance(spec, CPCache):
            return value
        if isinstance(spec, CPForbidden):
            raise AttentionProviderError(
                f"this forward was given {what}={describe(value)}, which its context-parallel plan cannot serve: "
                f"{spec.reason}"
            )
        if isinstance(spec, CPBlocks):
            self.tracker.keep_blocks(spec.sequence, spec.size)
            return value
        if isinstance(spec, CPLength) and (spec.of is not None or isinstance(value, int)):
            if spec.full:
                return self.tracker.global_length(spec.sequence, value)
            length = self.tracker.shard_length(spec.sequence, value if spec.of is None else spec.of(value))
            return length if spec.of is None else value
        if isinstance(spec, CPLogBase) and isinstance(value, (int, float)):
            return self.tracker.log_base(spec.sequence, value)
        if isinstance(value, Tensor) and isinstance(spec, CPInput):
            if not self._has_dims(value, spec, what) or (spec.leave_other_dims and value.shape[spec.split_dim] == 1):
                return value
            if not has_entries(value, spec.split_dim, self.tracker.mesh.size):
                problem = problem_of(value, spec, f"{what} of '{self.path}'", self.tracker, outputs)
                if problem is not None:
                    raise_error(AttentionProviderError, problem)
            sequence = spec.sequence or f"{self.path}:{what}"
            if spec.grouped:
                return self.tracker.split_groups(sequence, value, spec.split_dim)
            return self.tracker.split(sequence, value, spec.split_dim, spec.flattened, spec.split_already)
        if isinstance(value, Tensor) and isinstance(spec, CPGatherInput):
            self._has_dims(value, spec, what)
            gather = self.tracker.gather_groups if spec.grouped else self.tracker.gather
            return gather(spec.sequence, value, spec.gather_dim)
        if isinstance(spec, CPStore):
            return GatheringStore(value, spec, self.tracker)
        if isinstance(value, (list, tuple)):
            specs = [spec] * len(value) if isinstance(spec, (CPInput, CPGatherInput)) else spec
            if isinstance(specs, (list, tuple)) and len(specs) == len(value):
                items = [self.split(each, spec, f"{what}[{i}]") for i, (each, spec) in enumerate(zip(value, specs))]
                return like(value, items)
        if isinstance(value, Mapping) and isinstance(spec, (Mapping, CPInput, CPGatherInput)):
            specs = spec if isinstance(spec, Mapping) else dict.fromkeys(value, spec)
            found = {name: each for name, each in specs.items() if name in value}  # as of arguments: those given
            return updated(
                value, {name: self.split(value[name], each, f"{what}.{name}") for name, each in found.items()}
            )
        raise AttentionProviderError(
            f"{what} of '{self.path}' is {describe(value)}, and its plan says {spec}. A CPInput or CPGatherInput is "
            "for a tensor, or for all tensors of a list or dict; a list of as many for one each; a dict for a dict; a "
            "CPLength for an int."
        )

    def _has_dims(self, tensor: Tensor, spec: CPInput | CPGatherInput | CPOutput, what: str) -> bool:
        if spec.expected_dims is None or tensor.ndim == spec.expected_dims:
            return True
        if isinstance(spec, CPInput) and spec.leave_other_dims:
            return False
        raise AttentionProviderError(
            f"{what} of '{self.path}' has {tensor.ndim} dimensions, {list(tensor.shape)}; the plan expects "
            f"{spec.expected_dims}. Correct expected_dims and the dimension in {spec}, or leave expected_dims out."
        )


class _SplitInputs(_PlanHook):
    """Splits a module's arguments, or gathers those that it needs whole."""

    def __init__(self, tracker: SequenceTracker, path: str, specs: list[tuple[str | None, int | None, Any]]) -> None:
        super().__init__(tracker, path)
        self.specs = specs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_called(self, module)
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, index, spec in self.specs:
            if name is not None and name in new_kwargs:
                new_kwargs[name] = self.split(new_kwargs[name], spec, name)
            elif index is not None and index < len(new_args):
                new_args[index] = self.split(new_args[index], spec, name or f"argument {index}")
            elif isinstance(spec, CPRequired):
                self.split(None, spec, name or f"argument {index}")
        return tuple(new_args), new_kwargs


class _SplitOutputs(_PlanHook):
    def __init__(self, tracker: SequenceTracker, path: str, specs: list[tuple[ParamId, Any]]) -> None:
        super().__init__(tracker, path)
        self.specs = specs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        check_called(self, module)
        for param, spec in self.specs:
            what = f"output {param}"
            if isinstance(output, Tensor) and param.index in (0, -1, None):
                output = self.split(output, spec, what)
            elif isinstance(output, Mapping):
                name = param.name if param.name is not None else list(output)[param.index or 0]
                output = updated(output, {name: self.split(output[name], spec, what)})
            elif (
                isinstance(output, (list, tuple))
                and param.index is not None
                and -len(output) <= param.index < len(output)
            ):
                items = list(output)
                items[param.index] = self.split(items[param.index], spec, what, outputs=items)
                output = like(output, items)
            else:
                raise AttentionProviderError(f"'{self.path}' has no {what}: it gave {describe(output)}.")
        return output


class _GatherOutputs(_PlanHook):
    def __init__(self, tracker: SequenceTracker, path: str, specs: list[CPOutput | None]) -> None:
        super().__init__(tracker, path)
        self.specs = specs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        check_called(self, module)
        if isinstance(output, Tensor):
            items = [output]
        else:
            items = list(output.values()) if isinstance(output, Mapping) else list(output)
        if len(self.specs) > len(items):
            raise AttentionProviderError(
                f"the plan gathers {len(self.specs)} outputs of '{self.path}', which gave {describe(output)}."
            )
        for index, spec in enumerate(self.specs):
            if spec is not None and items[index] is not None:
                self._has_dims(items[index], spec, f"output {index}")
                gather = self.tracker.gather_groups if spec.grouped else self.tracker.gather
                items[index] = gather(spec.sequence, items[index], spec.gather_dim)
        if isinstance(output, Tensor):
            return items[0]
        return updated(output, dict(zip(output, items))) if isinstance(output, Mapping) else like(output, items)


class _EnterAttention:
    """Says whose attention module now runs, and what it attends to."""

    def __init__(self, tracker: SequenceTracker, role: Role | None, bound: bool, path: str) -> None:
        self.tracker = tracker
        self.role = role
        self.bound = bound
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        check_called(self, module)
        if self.role is not None and self.tracker.splits_blocks(self.role.key):
            _check_bound(module, "attends by blocks that it chooses from all tokens", "asks the other ranks")
        elif self.bound and self.tracker.mesh.size > 1:
            _check_bound(module, "counts places of the whole sequence", "knows where this rank's tokens are")
        self.tracker.enter(self.role)


class _LeaveAttention:
    """Sees to it that attention over split tokens was answered by this library, before anything is made of it."""

    def __init__(self, tracker: SequenceTracker, role: Role | None, name: str) -> None:
        self.tracker = tracker
        self.is_local = role is not None and not (role.query and role.key)
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.tracker.leave(self.is_local or _is_ours(module)) and self.tracker.strict:
            raise_error(_unanswered, self, module)


def _is_ours(module: Any) -> bool:
    """Whether the processor has no other attention than this library's. A bound one that does not ask for it does so
    because attention is skipped, as some guidance does."""
    return hasattr(module, "processor") and (module.processor is None or hasattr(module.processor, "choice"))


def _unanswered(hook: _LeaveAttention, module: Any) -> AttentionProviderError:
    processor = getattr(module, "processor", None)
    by = f"its processor, {type(processor).__name__}, which calls" if processor is not None else "code that calls"
    return AttentionProviderError(
        f"'{hook.name}' ({type(module).__name__}) attends by {by} no attention of diffusers_attn, so that it saw the "
        f"tokens of this rank alone, and took them for all. Bind it to a provider, which "
        "set_attn_processor(DispatchProcessor()) does for processors of diffusers; have its code call "
        "diffusers_attn.attention_dispatch; or, if each rank has all keys that it needs, say so in the plan: "
        f'"{hook.name}": CPAttention((), key=()). To go on without context parallelism, call '
        "disable_context_parallel(model), or remove_context_parallel(model) where a plan was applied."
    )


def _check_bound(module: Any, what: str, instead: str) -> None:
    """Raises AttentionProviderError where a processor would have to know of tokens that other ranks have, and it is
    diffusers' own."""
    if not hasattr(module.processor, "choice"):
        raise AttentionProviderError(
            f"{type(module).__name__} {what}, and its processor, {type(module.processor).__name__}, knows of this "
            f"rank's alone. Bind it to a provider, which gives it one that {instead}: "
            'model.set_attn_processor(DispatchProcessor("flex")).'
        )
