"""Marks sizes that change as dynamic, so that all ranks compile the same graphs.

`torch.compile` treats a size as a constant until it sees another one. A rank's shard may keep its size while the full
sequence changes: of 35 and of 36 tokens, the first of two ranks has 18. That rank would compile its blocks once when
the full sequence changes, and again when its shard changes too. So once any sequence has changed, the arguments of
compiled modules are marked: each dimension that is as long as a sequence or a shard is dynamic.

The marks are those that AOTAutograd leaves on the outputs of a graph: a hint, on which no graph depends. Their name is
private to PyTorch, and only this file uses it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..sequences.tracker import SequenceTracker

_MARK = (
    "_dynamo_propagated_dynamic_indices"
    if Version(torch.__version__).release >= (2, 13)
    else "_dynamo_weak_dynamic_indices"
)
"""The attribute in which AOTAutograd lists the dynamic dimensions of a tensor."""


class DynamicSizes:
    """The dynamic sizes of a model's running forward."""

    def __init__(self, model: nn.Module, tracker: SequenceTracker) -> None:
        self._tracker = tracker
        # Weak references, so that replaced blocks are freed. The model itself is left out: it receives full sequences.
        self._modules = [weakref.ref(module) for module in model.modules() if module is not model]
        self._first: dict[str, int] = {}
        self._changed = False
        self._lengths: Mapping[str, int] = tracker.lengths
        self._number = 0
        self._sizes: frozenset[int] = frozenset()

    def watch(self) -> None:
        """Wraps compiled modules, whoever compiled them, to mark their arguments. Called before every forward."""
        for reference in self._modules:
            module = reference()
            if module is not None:
                compiled = module._compiled_call_impl
                if compiled is not None and type(compiled) is not _Marking:
                    module._compiled_call_impl = _Marking(compiled, self)

    def unwatch(self) -> None:
        """Removes the wrappers."""
        for reference in self._modules:
            module = reference()
            if module is not None and type(module._compiled_call_impl) is _Marking:
                module._compiled_call_impl = module._compiled_call_impl.compiled

    def sizes(self) -> frozenset[int]:
        """Lengths of sequences and of this rank's shards, also joined. Empty until a sequence has changed length."""
        lengths = self._tracker.lengths
        if lengths is not self._lengths or len(lengths) != self._number:
            before = dict(self._lengths)  # a sequence may be split in the module that is about to run
            self._lengths, self._number = lengths, len(lengths)
            for name, length in lengths.items():
                self._changed |= self._first.setdefault(name, length) != length
            if self._changed:
                full = [lengths.get(name, before.get(name, 0)) for name in {**before, **lengths}]
                shards = [self._tracker.local_length((name,)) for name in lengths]
                for tensor in lengths.tensors():
                    _mark(tensor, frozenset(tensor.shape[:1]))
                self._sizes = frozenset(size for size in (*_joined(full), *_joined(shards)) if size > 1)
        return self._sizes


def _joined(lengths: list[int]) -> Iterable[int]:
    counts = range(1, len(lengths) + 1)
    return (sum(some) for count in counts for some in itertools.combinations(lengths, count))


class _Marking:
    """Wraps a module's compiled call, and marks its arguments."""

    def __init__(self, compiled: Callable[..., Any], dynamic: DynamicSizes) -> None:
        self.compiled = compiled
        self.dynamic = dynamic

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            sizes = self.dynamic.sizes()
            if sizes:
                _mark(args, sizes)
                _mark(kwargs, sizes)
        return self.compiled(*args, **kwargs)


def _mark(value: Any, sizes: frozenset[int]) -> None:
    if type(value) is Tensor:
        dims = {dim for dim, size in enumerate(value.shape) if size in sizes}
        if dims:
            setattr(value, _MARK, getattr(value, _MARK, set()) | dims)
        if value._is_view() and type(value._base) is Tensor:
            _mark(value._base, sizes)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _mark(each, sizes)
    elif isinstance(value, dict):
        for each in value.values():
            _mark(each, sizes)
