"""A cache of masks that have at least one key in every row (live rows).

PyTorch's GPU kernels give arbitrary values in a row without keys, and clearing such rows costs several small kernels
in every layer. Almost no mask has such rows, and one mask serves many layers and steps. So on the second use of a mask,
the device checks it for such rows. The result is read when it is ready, without waiting; from then on the mask goes to
the kernel unchanged. A mask that was changed in place (by `Tensor._version`) counts as a new one.

In a captured or compiled graph no mask counts as known, because the graph will run with other masks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .. import masks
from ..tensor_kinds import no_transform

# By the id of a living tensor: the tensor that owns the memory of a mask (a view may be new in every layer), and views
# that are known to have only live rows.
_owners: dict[int, _Owner] = {}
# Looked up once, because they are used in every layer.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device by its index; not in a CPU build
_LEGACY_STREAM = 0  # what CUDA calls the default stream: it cannot be captured


class _Owner:
    """The results for a tensor and its views, at one version of the tensor."""

    __slots__ = ("device_index", "live", "tensor", "version", "views")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor, functools.partial(_forget, id(tensor)))
        self.version = tensor._version
        self.device_index = tensor.device.index
        self.views: dict[object, _Answer | None] = {}
        self.live = False
        """Whether all rows of the tensor itself are known to be live."""


class _Answer:
    """The check of one view of a mask, which runs on the device."""

    __slots__ = ("dead", "live", "ready")

    def __init__(self, mask: Tensor) -> None:
        self.live = False
        self.dead = torch.empty((), dtype=torch.bool, pin_memory=True)
        self.dead.copy_(masks.dead_rows(mask).any(), non_blocking=True)
        self.ready: torch.cuda.Event | None = torch.cuda.Event()
        self.ready.record()

    def look(self) -> bool:
        if self.ready is not None and self.ready.query():
            self.live, self.ready = not self.dead.item(), None
        return self.live


def where_live(attention: Callable[..., Tensor], otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of query, key, value and mask: calls `attention` if all rows of the mask are known to be live, else
    `otherwise`.

    It is one function, because in almost every layer this check is the only cost of a mask.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if not _is_dynamo_compiling():
            # An entry under the id of a tensor belongs to this tensor: it is removed when the tensor is freed.
            owner = _owners.get(id(mask))
            if (
                owner is not None
                and owner.live
                and owner.version == mask._version
                and _raw_stream(owner.device_index) == _LEGACY_STREAM  # type: ignore[misc]
            ):
                return attention(query, key, value, mask)
        return attention(query, key, value, mask) if known_live(mask) else otherwise(query, key, value, mask)

    return attend


def known_live(mask: Tensor) -> bool:
    """Whether all rows of `mask`, a view from `masks.classify`, are known to be live. False also means not known yet.

    On devices other than CUDA it is always False.
    """
    if (
        type(mask) is not Tensor
        or not mask.is_cuda
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    ):
        return False
    if mask.is_inference():  # an inference tensor has no version
        return False
    tensor, view = mask, None
    if mask._base is not None:
        tensor, view = mask._base, (mask.shape, mask.stride(), mask.storage_offset())
    owner = _owners.get(id(tensor))
    if owner is None or owner.version != tensor._version or owner.tensor() is not tensor:
        owner = _owners[id(tensor)] = _Owner(tensor)
    answer = owner.views.get(view)
    if answer is None:
        # The first use of a mask starts no check. A mask in a torch.func transform stands for several masks.
        asks = view in owner.views and no_transform()
        owner.views[view] = _Answer(mask) if asks else None
        return False
    if not (answer.live or answer.look()):
        return False
    if view is None:
        owner.live = True
    else:  # most models create a view once and pass it to every layer
        _owners[id(mask)] = own = _Owner(mask)
        own.live = True
    return True


def _forget(key: int, tensor: object, owners: dict[int, _Owner] = _owners) -> None:
    # Another tensor may have the id by now. (The dict is an argument, because the last tensors are freed after the
    # interpreter has cleared the names of the module.)
    if key in owners and owners[key].tensor is tensor:
        del owners[key]
