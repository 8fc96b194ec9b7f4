"""Tensors that are not plain ones: each kind is computed as PyTorch computes it, or refused by name.

A kernel of a package reads memory, and decisions read shapes. Some tensors have neither in the usual sense: nested and
sparse ones, subclasses that stand for something else, those within a `torch.func` transform. This is the table of what
is done with each, and the only place that asks PyTorch (partly through private names) what a tensor is. It is asked
after the short way of `call_cache.py`, which only plain tensors take.
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
    """What is done with a kind of tensors. Plain strings, which the compiler takes for constants."""

    ANY = "as with plain tensors, but nothing is remembered"
    DERIVED = "by providers that are made of PyTorch's operators, which have every derivative"
    TORCH = "by PyTorch's own function, as it is given"
    STRIPPED = "as the plain tensors that they hold"
    CAUSAL = "as is_causal, or as the mask that it stands for"
    REFUSED = "by nobody"


class Kind(NamedTuple):
    name: str
    """after "query is"."""
    way: str
    """one of `Way`"""
    remedy: str = ""
    """what to pass instead."""


FORWARD = Kind("a dual tensor of forward-mode differentiation", Way.DERIVED)
TRANSFORMED = Kind("a tensor within a torch.func transform", Way.DERIVED)
NESTED = Kind("a nested tensor", Way.TORCH, "pass torch.nested.to_padded_tensor(...) and a mask of its padding")
SPARSE = Kind("a tensor of layout {layout}", Way.REFUSED, "pass {argument}.to_dense()")
QUANTISED = Kind("a quantised tensor", Way.REFUSED, "pass {argument}.dequantize()")
NESTED_MASK = Kind("a nested tensor", Way.REFUSED, "pass a plain mask, with False where there is padding")
LABELLED = Kind("a {cls}", Way.STRIPPED)
OTHER = Kind("a {cls}, which is a tensor subclass", Way.TORCH, "pass the plain torch.Tensor that it stands for")

NOBODY = "and no provider computes attention of it"

# By the class's full name, so that nothing is imported for it.
_BY_CLASS = {
    "torch._subclasses.fake_tensor.FakeTensor": Kind("a FakeTensor", Way.ANY),
    "torch._subclasses.functional_tensor.FunctionalTensor": Kind("a FunctionalTensor", Way.ANY),
    "torch.distributed._functional_collectives.AsyncCollectiveTensor": Kind("an AsyncCollectiveTensor", Way.STRIPPED),
    "torch.distributed.tensor.DTensor": Kind("a DTensor", Way.TORCH, "pass {argument}.to_local()"),
    "torch.masked.maskedtensor.core.MaskedTensor": Kind(
        "a MaskedTensor", Way.REFUSED, "pass {argument}.get_data(), and what it masks as attn_mask"
    ),
    "torch.nested._internal.nested_tensor.NestedTensor": NESTED,
    "torch.nn.attention.bias.CausalBias": Kind("a CausalBias", Way.CAUSAL),
}


def of(query: Any, key: Any, value: Any, mask: Any, nested: bool) -> tuple[str, Kind] | None:
    """The argument that is not a plain tensor, with its kind; None where all are plain.

    Args:
        nested: whether a `torch.Tensor` among them is nested, which the caller had to know before.

    Raises:
        AttentionProviderError: query, key or value is no tensor.
    """
    if (
        type(query) is Tensor
        and type(key) is Tensor
        and type(value) is Tensor
        and (mask is None or (type(mask) is Tensor and mask.layout is torch.strided))
        and query.layout is key.layout is value.layout is torch.strided
        and not nested
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    ):
        return None
    found = None
    for argument, tensor in {"query": query, "key": key, "value": value, "attn_mask": mask}.items():
        if isinstance(tensor, Tensor):
            kind = _of_tensor(tensor)
            if kind is NESTED and argument == "attn_mask":
                kind = NESTED_MASK
        elif argument == "attn_mask":
            continue  # None, or a mask that says itself what it is
        else:
            raise AttentionProviderError(f"{argument} is a {type(tensor).__name__}; a torch.Tensor is accepted.")
        # What is refused first, then what changes the call most.
        if kind is not None and (found is None or _FIRST.index(kind.way) < _FIRST.index(found[1].way)):
            found = argument, kind
    return found


_FIRST = (Way.REFUSED, Way.CAUSAL, Way.STRIPPED, Way.TORCH, Way.DERIVED, Way.ANY)


def check_quantised(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises AttentionProviderError where one is quantised. (`of` need not ask: such a call is never served.)"""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_quantized:
            raise refused(argument, QUANTISED, NOBODY)


def traced(query: Any, key: Any, value: Any, mask: Any) -> tuple[str, Kind] | None:
    """`of`, for Dynamo: by types alone, of which tensors in a graph show the one they have outside of it."""
    for argument, tensor in (("attn_mask", mask), ("query", query), ("key", key), ("value", value)):
        cls = type(tensor)
        if cls is not Tensor and cls is not Parameter and issubclass(cls, Tensor):
            kind = Kind(*_constant_of_class(cls))
            if kind.way not in (Way.ANY, Way.STRIPPED):  # Dynamo takes care of those
                return argument, kind
    return None


def _of_tensor(tensor: Tensor) -> Kind | None:
    cls = type(tensor)
    if cls is not Tensor and cls is not Parameter:
        return _of_class(cls)
    if tensor.is_nested:
        return NESTED
    if tensor.layout is not torch.strided:
        return SPARSE._replace(name=SPARSE.name.format(layout=tensor.layout))
    if is_functorch_wrapped_tensor(tensor):
        return TRANSFORMED
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return FORWARD
    return None


@torch._dynamo.assume_constant_result
def _constant_of_class(cls: type) -> tuple[str, ...]:
    return tuple(_of_class(cls))


@functools.cache
def _of_class(cls: Any) -> Kind:
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
    """Whether results of PyTorch's functions are of this class too."""
    own = cls.__torch_function__
    return getattr(own, "__func__", own) is _DEFAULT.__func__


def stripped(tensor: Any) -> Any:
    """The plain tensor that one of a kind that is `STRIPPED` holds; anything else as it is."""
    if not isinstance(tensor, Tensor) or type(tensor) in (Tensor, Parameter):
        return tensor
    if _of_class(type(tensor)).way != Way.STRIPPED:
        return tensor
    if hasattr(tensor, "trigger_wait"):
        return tensor.trigger_wait()
    return tensor.as_subclass(Tensor)


def labelled_as(out: Tensor, *given: Any) -> Tensor:
    """`out`, of the class that PyTorch would give it for arguments of these classes."""
    classes = [type(each) for each in given if isinstance(each, Tensor)]
    labels = [cls for cls in classes if cls not in (Tensor, Parameter) and _is_default(cls)]
    narrowest = [cls for cls in labels if all(issubclass(cls, other) for other in labels)]
    return out.as_subclass(narrowest[0]) if narrowest else out


def causal(bias: Any, is_causal: bool, device: torch.device) -> Tensor | None:
    """The mask that a `CausalBias` stands for; None where that is `is_causal`.

    Raises:
        AttentionProviderError: `is_causal` beside it.
    """
    if is_causal:
        raise AttentionProviderError("attn_mask is a CausalBias and is_causal=True: pass one of the two.")
    if is_upper_left(bias):
        return None
    rows, columns = bias.seq_len_q, bias.seq_len_kv
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)


def is_upper_left(bias: Any) -> bool:
    """Whether a `CausalBias` is aligned to the top left, as `is_causal` is."""
    return bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv


def refused(argument: str, kind: Kind, why: str, instead: str = "") -> AttentionProviderError:
    """What to raise for a kind that is not served: `why`, what was given, what to do."""
    remedies = [kind.remedy.format(argument=argument)] * bool(kind.remedy) + [instead] * bool(instead)
    do = ", or ".join(remedies)
    return AttentionProviderError(f"{argument} is {kind.name}, {why}. {do[:1].upper()}{do[1:]}.")
