"""Tensors whose values are computed by other ranks and arrive later.

Between the calls of two branches, pipelines change an output in small ways: they slice it or cast it. Such operations
are recorded and applied when the value arrives. Every other operation, and every operation that also has other tensors,
makes all ranks exchange first: all of them run the same pipeline, so they do it at the same place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Arrival:
    """The tensors that arrive with one exchange.

    Args:
        fill: sets the values of the outputs. All ranks call it at the same place of the program.
    """

    def __init__(self, fill: Callable[[], None]) -> None:
        self._fill: Callable[[], None] | None = fill
        self._recorded: list[weakref.ref[PendingTensor]] = []

    @property
    def is_over(self) -> bool:
        return self._fill is None

    def record(self, tensor: PendingTensor) -> None:
        self._recorded.append(weakref.ref(tensor))

    def finish(self) -> None:
        """Exchanges, and applies the recorded operations in their order. Does nothing the second time."""
        fill, self._fill = self._fill, None
        if fill is None:
            return
        fill()
        for reference in self._recorded:
            tensor = reference()
            if tensor is not None:
                tensor.compute()
        self._recorded.clear()


class PendingTensor(Tensor):
    """A tensor whose value is still to come. Shape, dtype and device are known.

    Args:
        like: a tensor of this shape and dtype; it may be on "meta".
        device: the device of the value.
        arrival: brings the value.
        make: computes the value, if it is the result of a recorded operation.
    """

    arrival: Arrival
    value: Tensor | None
    make: Callable[[], Tensor] | None

    @staticmethod
    def __new__(
        cls, like: Tensor, device: torch.device, arrival: Arrival, make: Callable[[], Tensor] | None = None
    ) -> PendingTensor:
        made = Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)
        made.arrival, made.value, made.make = arrival, None, make
        return made

    def compute(self) -> None:
        """Computes the value of a recorded operation, once the values that it needs have arrived."""
        if self.value is None and self.make is not None:
            self.value, self.make = self.make(), None

    def wait(self) -> Tensor:
        """The value. Exchanges if it has not arrived."""
        self.arrival.finish()
        assert self.value is not None
        return self.value

    def __repr__(self) -> str:  # type: ignore[override]
        if self.arrival.is_over:
            return repr(self.value)
        return f"PendingTensor({list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.wait().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.wait().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        return self.wait().numpy(force=force)

    def tolist(self) -> Any:
        return self.wait().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        recorded = _record(func, args, kwargs)
        return func(*_values(args), **_values(kwargs)) if recorded is None else recorded


def known(value: Any) -> Any:
    """`value`, a nest of containers, with the values of its pending tensors."""
    return _values(value) if any(isinstance(each, PendingTensor) for each in tree_leaves(value)) else value


def _values(nest: Any) -> Any:
    return tree_map(lambda each: each.wait() if isinstance(each, PendingTensor) else each, nest)


def _record(func: Any, args: Any, kwargs: Any) -> PendingTensor | None:
    """The result of an operation on pending tensors alone, still to come; None if it cannot wait."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    pending = [each for each in tensors if isinstance(each, PendingTensor) and not each.arrival.is_over]
    arrivals = {id(each.arrival) for each in pending}
    # Another tensor may be written to before the value arrives, and random numbers must be drawn in their order.
    if len(pending) < len(tensors) or len(arrivals) != 1 or func._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    device = pending[0].device
    try:
        meta_args, meta_kwargs = tree_map(_on_meta, (args, kwargs))
        like = func(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError):  # its result depends on the values
        return None
    target = kwargs.get("device")
    if not isinstance(like, Tensor) or (target is not None and torch.device(target) != device):
        return None
    result = PendingTensor(like, device, pending[0].arrival, lambda: func(*_arrived(args), **_arrived(kwargs)))
    pending[0].arrival.record(result)
    return result


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _arrived(nest: Any) -> Any:
    """`nest` with the values of tensors that have arrived, or that were recorded before this operation."""

    def of(value: Any) -> Any:
        if not isinstance(value, PendingTensor):
            return value
        value.compute()
        return value.value

    return tree_map(of, nest)
