"""Tensors that are not plain: each kind is computed as PyTorch computes it, or refused by name.

Kernels read memory, and decisions read shapes. Some tensors have neither in the usual sense: nested and sparse tensors,
subclasses that represent other data, and tensors inside a `torch.func` transform. This file has the table of how each
kind is served. It is the only file that asks PyTorch (partly through private names) for the kind of a tensor.
Dispatch looks for plain tensors first, and asks here about all others.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from .errors import AttentionProviderError


class Way:
    """How a kind of tensors is served. Plain strings, which compilers treat as constants."""

    ANY = "like plain tensors, with a decision for each call"
    DERIVED = "by providers made of PyTorch's operators, which have every derivative"
    TORCH = "by PyTorch's own function, unchanged"
    STRIPPED = "as the plain tensors that they hold"
    CAUSAL = "as is_causal, or as the equivalent mask"
    OWN = "by a method `attention` of its own, which passes plain tensors on"
    REFUSED = "by no provider"


class TensorKind(NamedTuple):
    """A kind of tensors and how it is served."""

    name: str
    """Completes "query is ..." in an error."""
    way: str
    """One of `Way`."""
    remedy: str = ""
    """What to pass instead."""


FORWARD = TensorKind("a dual tensor of forward-mode differentiation", Way.DERIVED)
TRANSFORMED = TensorKind("a tensor within a torch.func transform", Way.DERIVED)
NESTED = TensorKind("a nested tensor", Way.TORCH, "pass torch.nested.to_padded_tensor(...) and a mask of its padding")
SPARSE = TensorKind("a tensor of layout {layout}", Way.REFUSED, "pass {argument}.to_dense()")
QUANTISED = TensorKind("a quantised tensor", Way.REFUSED, "pass {argument}.dequantize()")
NESTED_MASK = TensorKind("a nested tensor", Way.REFUSED, "pass a plain mask, with False where there is padding")
LABELLED = TensorKind("a {cls}", Way.STRIPPED)
OTHER = TensorKind("a {cls}, which is a tensor subclass", Way.TORCH, "pass the plain torch.Tensor with the same values")

NOBODY = "and no provider accepts it"

# By the full name of the class, so that the table imports nothing.
_BY_CLASS = {
    "diffusers_attn.vae.row_split.RowSplit": TensorKind("a RowSplit", Way.OWN),
    "torch._subclasses.fake_tensor.FakeTensor": TensorKind("a FakeTensor", Way.ANY),
    "torch._subclasses.functional_tensor.FunctionalTensor": TensorKind("a FunctionalTensor", Way.ANY),
    "torch.distributed._functional_collectives.AsyncCollectiveTensor": TensorKind(
        "an AsyncCollectiveTensor", Way.STRIPPED
    ),
    "torch.distributed.tensor.DTensor": TensorKind("a DTensor", Way.TORCH, "pass {argument}.to_local()"),
    "torch.masked.maskedtensor.core.MaskedTensor": TensorKind(
        "a MaskedTensor", Way.REFUSED, "pass {argument}.get_data(), and its mask as attn_mask"
    ),
    "torch.nested._internal.nested_tensor.NestedTensor": NESTED,
    "torch.nn.attention.bias.CausalBias": TensorKind("a CausalBias", Way.CAUSAL),
}


def no_transform() -> bool:
    """Whether the call is outside torch.func transforms and forward-mode differentiation."""
    return not in_forward_mode() and peek_interpreter_stack() is None


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on, also by a transform such as `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def of(query: Any, key: Any, value: Any, mask: Any) -> tuple[str, TensorKind] | None:
    """The name of the first argument that is not a plain tensor, with its kind; None if all are plain.

    Raises:
        AttentionProviderError: query, key or value is no tensor.
    """
    found = None
    for argument, tensor in {"query": query, "key": key, "value": value, "attn_mask": mask}.items():
        if isinstance(tensor, Tensor):
            kind = _of_tensor(tensor)
            if kind is NESTED and argument == "attn_mask":
                kind = NESTED_MASK
        elif argument == "attn_mask":
            continue  # None, or a mask object that is classified elsewhere
        else:
            raise AttentionProviderError(f"{argument} is a {type(tensor).__name__}; a torch.Tensor is accepted.")
        # A refused kind comes first, then the kind that changes the call most.
        if kind is not None and (found is None or _FIRST.index(kind.way) < _FIRST.index(found[1].way)):
            found = argument, kind
    return found


_FIRST = (Way.REFUSED, Way.OWN, Way.CAUSAL, Way.STRIPPED, Way.TORCH, Way.DERIVED, Way.ANY)


def check_quantised(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises AttentionProviderError if one is quantised."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_quantized:
            raise refused(argument, QUANTISED, NOBODY)


def traced(query: Any, key: Any, value: Any, mask: Any) -> tuple[str, TensorKind] | None:
    """`of` while Dynamo traces, by types alone: a tensor in a graph shows the type that it has outside."""
    for argument, tensor in (("attn_mask", mask), ("query", query), ("key", key), ("value", value)):
        cls = type(tensor)
        if cls is not Tensor and cls is not Parameter and issubclass(cls, Tensor):
            kind = TensorKind(*_constant_of_class(cls))
            if kind.way not in (Way.ANY, Way.STRIPPED):  # Dynamo handles these
                return argument, kind
    return None


def _of_tensor(tensor: Tensor) -> TensorKind | None:
    cls = type(tensor)
    if cls is not Tensor and cls is not Parameter:
        return _of_class(cls)
    if tensor.is_nested:
        return NESTED
    if tensor.layout is not torch.strided:
        return SPARSE._replace(name=SPARSE.name.format(layout=tensor.layout))
    if is_functorch_wrapped_tensor(tensor):
        return TRANSFORMED
    if in_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None:
        return FORWARD
    return None


@torch._dynamo.assume_constant_result
def _constant_of_class(cls: type) -> tuple[str, ...]:
    return tuple(_of_class(cls))


@functools.cache
def _of_class(cls: Any) -> TensorKind:
    for base in cls.__mro__:
        kind = _BY_CLASS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind
    own_code = cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ or not (
        _is_default(cls) or cls.__torch_function__ is Parameter.__torch_function__
    )
    kind = OTHER if own_code else LABELLED
    return kind._replace(name=kind.name.format(cls=cls.__name__))


_DEFAULT: Any = Tensor.__torch_function__


def _is_default(cls: Any) -> bool:
    """Whether PyTorch's functions on tensors of this class return tensors of this class."""
    own = cls.__torch_function__
    return getattr(own, "__func__", own) is _DEFAULT.__func__


def stripped(tensor: Any) -> Any:
    """The plain tensor inside a tensor of a `STRIPPED` kind; anything else unchanged."""
    if not isinstance(tensor, Tensor) or type(tensor) in (Tensor, Parameter):
        return tensor
    if _of_class(type(tensor)).way != Way.STRIPPED:
        return tensor
    if hasattr(tensor, "trigger_wait"):
        return tensor.trigger_wait()
    return tensor.as_subclass(Tensor)


def labelled_as(out: Tensor, *given: Any) -> Tensor:
    """`out` with the class that PyTorch gives a result for arguments of these classes."""
    classes = [type(each) for each in given if isinstance(each, Tensor)]
    labels = [cls for cls in classes if cls not in (Tensor, Parameter) and _is_default(cls)]
    narrowest = [cls for cls in labels if all(issubclass(cls, other) for other in labels)]
    return out.as_subclass(narrowest[0]) if narrowest else out


def causal(bias: Any, is_causal: bool, device: torch.device) -> Tensor | None:
    """The bool mask `[query_len, key_len]` equivalent to a `CausalBias`; None if `is_causal=True` is equivalent.

    Raises:
        AttentionProviderError: `is_causal` is True as well.
    """
    if is_causal:
        raise AttentionProviderError(
            "attn_mask is a CausalBias and is_causal=True; one of the two is accepted. Pass is_causal=False."
        )
    if is_upper_left(bias):
        return None
    rows, columns = bias.seq_len_q, bias.seq_len_kv
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)


def is_upper_left(bias: Any) -> bool:
    """Whether a `CausalBias` is aligned to the top left, as `is_causal` is."""
    return bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv


def refused(argument: str, kind: TensorKind, why: str, instead: str = "") -> AttentionProviderError:
    """The error for a kind that is not served: what was given, `why` it is refused, and what to do."""
    remedies = [kind.remedy.format(argument=argument)] * bool(kind.remedy) + [instead] * bool(instead)
    do = ", or ".join(remedies)
    return AttentionProviderError(f"{argument} is {kind.name}, {why}. {do[:1].upper()}{do[1:]}.")
