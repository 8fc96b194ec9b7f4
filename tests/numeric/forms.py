"""The kinds of tensors that a call may have, and the ways in which they lie in memory.

A form makes tensors of its kind from plain ones, calls attention, and returns a plain tensor, differentiably: so each
is compared with the same definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import pad

from .. import reference
from .features import LENGTH, PASSES

Attend = Callable[..., Tensor]
"""Called as `attention_dispatch`."""

EAGER = ("forward", "backward")
SHORTER = 90
"""Tokens of the second sequence of a nested tensor."""


class Form(NamedTuple):
    call: Callable[..., Tensor]
    """Called with the attention, query, key, value, and more arguments of it."""
    expected: Callable[..., Tensor] = lambda *tensors, **rest: reference.attention(*tensors, **rest)[0]
    """What `call` should return: called with query, key, value and arguments of `reference.attention`."""
    passes: tuple[str, ...] = PASSES
    only: tuple[str, ...] = ()
    """The only providers that serve it, if its error says so: "native" means PyTorch's own function."""
    refused: str = ""
    """Words of the error with which every provider refuses it."""
    over_ranks: str = ""
    """Words of the error with which it is refused where tokens are split."""
    cpu_passes: tuple[str, ...] | None = None
    """Passes on a CPU, where PyTorch has fewer."""
    mask: Callable[[int, int], Any] | None = None
    """Makes a mask object from the lengths of query and key."""
    shapes_only: bool = False
    """Whether the result has no values to compare."""


def _plain(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
    return attend(*tensors, **rest)


def _in_memory(lay: Callable[[Tensor], Tensor]) -> Form:
    return Form(lambda attend, query, key, value, **rest: attend(lay(query), lay(key), lay(value), **rest))


def _bshd(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor + 1.0], dim=3).flatten(2, 3)[:, :, ::2]


def _columns(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def _packed(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    packed = torch.stack([query, key, value], dim=2).transpose(1, 3).contiguous()
    return attend(*(packed[:, :, each].transpose(1, 2) for each in range(3)), **rest)


def _three(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
    return attend(*(each.squeeze(0) for each in tensors), **rest).unsqueeze(0)


def _five(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
    return attend(*(each.unsqueeze(0) for each in tensors), **rest).squeeze(0)


class Labelled(Tensor):
    """A subclass that only has a name."""


def _labelled(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    return attend(query.as_subclass(Labelled), key, value, **rest).as_subclass(Tensor)


def _parameter(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    return attend(query, torch.nn.Parameter(key), value, **rest)


def _biased(make: Callable[[int, int], Any], offset: bool) -> Form:
    def expected(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        rows, columns = query.shape[2], key.shape[2]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        seen = seen.tril(columns - rows if offset else 0)
        return reference.attention(query, key, value, seen)[0]

    return Form(_plain, expected, mask=make)


def _nested(layout: torch.layout) -> Form:
    def call(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
        parts = [[each[0], each[1, :, :SHORTER]] for each in tensors]
        if layout is torch.strided:
            given = [torch.nested.as_nested_tensor(each) for each in parts]
        else:  # its ragged dimension is made as the first one
            turned = [[each.transpose(0, 1) for each in pair] for pair in parts]
            nested: list[Any] = [torch.nested.as_nested_tensor(each, layout=layout).transpose(1, 2) for each in turned]
            first, *others = nested
            given = [first, *(_with_offsets(each, first.offsets()) for each in others)]
        found = attend(*given, **rest).unbind()
        return torch.stack([pad(each, (0, 0, 0, tensors[0].shape[2] - each.shape[1])) for each in found])

    def expected(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        places = torch.arange(LENGTH, device=query.device) < torch.tensor([[LENGTH], [SHORTER]], device=query.device)
        return reference.attention(query, key, value, places[:, None, :, None] & places[:, None, None, :])[0]

    return Form(call, expected, EAGER, only=("native", "auto"), over_ranks="nested tensor, and the tokens")


def _with_offsets(nested: Tensor, offsets: Tensor) -> Tensor:
    """The same jagged tensor, of the lengths that another one has: PyTorch compares those by identity."""
    turned = nested.transpose(1, 2)
    return torch.nested.nested_tensor_from_jagged(turned.values(), offsets).transpose(1, 2)


def _dtensor(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
    mesh = _mesh(tensors[0].device.type)
    found: Any = attend(*(DTensor.from_local(each, mesh, [Replicate()]) for each in tensors), **rest)
    return found.to_local()


@functools.cache
def _mesh(device_type: str) -> DeviceMesh:
    """Of this process alone."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    # Without a group, which all ranks of a job would have to make: nothing is exchanged in a mesh of one.
    return DeviceMesh(device_type, [torch.distributed.get_rank()], _init_backend=False)


def _quantised(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    return attend(query, torch.quantize_per_tensor(key, 0.1, 0, torch.qint8), value, **rest)


def _sparse(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    return attend(query, key.to_sparse(), value, **rest)


def _masked(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    return attend(query, torch.masked.masked_tensor(key, key > 0), value, **rest)


def _fake(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
    with FakeTensorMode() as mode:
        return attend(*map(mode.from_tensor, tensors), **rest)


def _meta(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
    return attend(*(each.to("meta") for each in tensors), **rest)


def _vmap(attend: Attend, *tensors: Tensor, **rest: Any) -> Tensor:
    return torch.vmap(lambda query, key, value: attend(query, key, value, **rest))(*tensors)


def _grad(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    return torch.func.grad(lambda given: attend(given, key, value, **rest).square().sum())(query)


def _jvp(attend: Attend, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
    with forward_ad.dual_level():
        out = attend(forward_ad.make_dual(query, key[:, :, : query.shape[2]]), key, value, **rest)
        return forward_ad.unpack_dual(out).tangent


def _of_reference(transform: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def definition(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        given = [each if each.ndim == 4 else each.unsqueeze(0) for each in (query, key, value)]
        out = reference.attention(*given, **rest)[0]
        return out if query.ndim == 4 else out.squeeze(0)

    return lambda *tensors, **rest: transform(definition, *(each.double() for each in tensors), **rest)


def _derived(call: Callable[..., Tensor]) -> Form:
    words = "and the tokens of this call are split over ranks"
    return Form(call, _of_reference(call), ("forward",), over_ranks=words)


FORMS = {
    "plain": Form(_plain),
    "bshd": _in_memory(_bshd),
    "packed": Form(_packed),
    "gaps": _in_memory(_gaps),
    "columns": _in_memory(_columns),
    "three dimensions": Form(_three),
    "five dimensions": Form(_five),
    "parameter": Form(_parameter, passes=("forward",)),
    "labelled": Form(_labelled, passes=EAGER),
    "upper left": _biased(causal_upper_left, offset=False),
    "lower right": _biased(causal_lower_right, offset=True)._replace(over_ranks="aligned to the lower right"),
    "nested strided": _nested(torch.strided),
    "nested jagged": _nested(torch.jagged),
    "DTensor": Form(
        _dtensor, passes=EAGER, only=("native", "auto"), over_ranks="DTensor, and the tokens", cpu_passes=("forward",)
    ),
    "quantised": Form(_quantised, passes=("forward",), refused="a quantised tensor, and no provider accepts it"),
    "sparse": Form(_sparse, passes=("forward",), refused="sparse_coo, and no provider accepts it"),
    "masked": Form(_masked, passes=("forward",), refused="a MaskedTensor, and no provider accepts it"),
    "fake": Form(_fake, passes=("forward",), shapes_only=True),
    "meta": Form(_meta, passes=("forward",), shapes_only=True),
    "vmap": _derived(_vmap),
    "func.grad": _derived(_grad),
    "jvp": _derived(_jvp),
}
"""Forms by name."""
