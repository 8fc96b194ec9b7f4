"""Where a rank keeps what it receives of the first rank's inputs: for the same input, always the same memory.

Some code recognises an input by its address. diffusers' TextKVCache does: it keeps the keys of a prompt, and looks them
up by the address of the prompt's embeddings. A fresh tensor in every forward would often get the address of an earlier
one, and the keys of another prompt with it. So received values live exactly as long as the input that they replace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Kept(NamedTuple):
    memory: StorageWeakRef
    """of this rank's own input. It does not keep the memory alive, but keeps its number from being given to another."""
    received: Tensor
    version: int | None
    """how often the input had been written into when values were last received."""


class ReceivedInputs:
    """The received values of one model's inputs, by the memory of this rank's own inputs."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], _Kept] = {}

    def forget(self) -> None:
        """Frees what was received for inputs that are gone."""
        self._kept = {place: kept for place, kept in self._kept.items() if not kept.memory.expired()}

    def keep(self, own: Tensor, values: Tensor) -> Tensor:
        """A tensor like `own` with these values: the one of an earlier forward if `own` is the same memory."""
        storage = own.untyped_storage()
        place = storage._cdata, own.storage_offset(), own.dtype, tuple(own.shape), own.stride()
        version = None if own.is_inference() else own._version
        kept = self._kept.get(place)
        with torch.no_grad():
            if kept is None or kept.received.is_inference() != torch.is_inference_mode_enabled():
                received = torch.empty_like(own, requires_grad=False).copy_(values)
            elif kept.version == version:
                # The same values once more. Autograd may have saved them, and need not hear of it.
                received = kept.received
                received.data.copy_(values)
            else:
                received = kept.received.copy_(values)
        self._kept[place] = _Kept(StorageWeakRef(storage), received, version)
        return received
