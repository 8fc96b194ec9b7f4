"""Masks that are known to leave every query a key.

PyTorch's GPU kernels give garbage in a row without keys, so that a mask which may have such rows costs several small
kernels in every layer. Almost none has them, and one mask serves many layers and steps. So the second time that a mask
comes, the device is asked whether it has such rows; its answer is picked up when it is there, without waiting for it,
and from then on the mask goes to the kernel as it is. A mask that was changed in place, as far as autograd would notice
(`Tensor._version`), is a new one.

Nothing is taken as known in a graph, captured or compiled: it will run with other masks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import masks

# By a tensor's id for as long as it lives: the one that owns a mask's memory, since a view may be made anew for every
# layer; and views that turned out to be alive.
_owners: dict[int, _Owner] = {}
# Looked up once: this is asked in every layer.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device by its index; not in a CPU build
_LEGACY_STREAM = 0  # what CUDA calls the default stream: it cannot be captured


class _Owner:
    """What is known of a tensor, or of views of it, at one version."""

    __slots__ = ("alive", "device_index", "tensor", "version", "views")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor, functools.partial(_forget, id(tensor)))
        self.version = tensor._version
        self.device_index = tensor.device.index
        self.views: dict[object, _Answer | None] = {}
        self.alive = False
        """the tensor itself."""


class _Answer:
    """Whether a view of a mask leaves every row a key, asked of the device."""

    __slots__ = ("alive", "dead", "ready")

    def __init__(self, mask: Tensor) -> None:
        self.alive = False
        self.dead = torch.empty((), dtype=torch.bool, pin_memory=True)
        self.dead.copy_(masks.dead_rows(mask).any(), non_blocking=True)
        self.ready: torch.cuda.Event | None = torch.cuda.Event()
        self.ready.record()

    def look(self) -> bool:
        if self.ready is not None and self.ready.query():
            self.alive, self.ready = not self.dead.item(), None
        return self.alive


def where_live(attention: Callable[..., Tensor], otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of query, key, value and mask: `attention` with a mask that is known to leave every row a key, else `otherwise`.

    One function rather than a question and a call, because in almost every layer it is all that a mask costs.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if not _is_dynamo_compiling():
            # An entry under a tensor's id is of this very tensor: it goes when the tensor does.
            owner = _owners.get(id(mask))
            if (
                owner is not None
                and owner.alive
                and owner.version == mask._version
                and _raw_stream(owner.device_index) == _LEGACY_STREAM  # type: ignore[misc]
            ):
                return attention(query, key, value, mask)
        return attention(query, key, value, mask) if known_live(mask) else otherwise(query, key, value, mask)

    return attend


def known_live(mask: Tensor) -> bool:
    """Whether `mask`, a view from `masks.classify`, is known to leave every row a key. False also means: not known yet.

    On other devices than CUDA's nothing is ever asked.
    """
    if (
        type(mask) is not Tensor
        or not mask.is_cuda
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    ):
        return False
    if mask.is_inference():  # has no version
        return False
    tensor, view = mask, None
    if mask._base is not None:
        tensor, view = mask._base, (mask.shape, mask.stride(), mask.storage_offset())
    owner = _owners.get(id(tensor))
    if owner is None or owner.version != tensor._version or owner.tensor() is not tensor:
        owner = _owners[id(tensor)] = _Owner(tensor)
    answer = owner.views.get(view)
    if answer is None:
        # A mask that comes but once is not worth a question; one in a torch.func transform stands for several.
        asks = view in owner.views and not is_functorch_wrapped_tensor(mask)
        owner.views[view] = _Answer(mask) if asks else None
        return False
    if not (answer.alive or answer.look()):
        return False
    if view is None:
        owner.alive = True
    else:  # most models make a view once and give it to every layer
        _owners[id(mask)] = own = _Owner(mask)
        own.alive = True
    return True


def _forget(key: int, tensor: object, owners: dict[int, _Owner] = _owners) -> None:
    # Another tensor may have been given the id since. (The dict is an argument, since the last tensors go when the
    # interpreter has cleared the module's names.)
    if key in owners and owners[key].tensor is tensor:
        del owners[key]
