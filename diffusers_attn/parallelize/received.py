"""Stores the input values that a rank receives from the first rank, in the same memory for the same input.

Some code identifies an input by its address. diffusers' TextKVCache stores the keys of a prompt by the address of the
prompt's embeddings. New tensors in every forward would often get the address of an earlier one, and with it the keys of
another prompt. So received values live exactly as long as the input that they replace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Entry(NamedTuple):
    memory: StorageWeakRef
    """A weak reference to the storage of this rank's own input. The memory may be freed, but its id is not reused."""
    received: Tensor
    version: int | None
    """Version of the input when values were last received; None for an inference tensor."""


class ReceivedInputs:
    """The received values of one model's inputs, by the memory of this rank's own inputs."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy starts empty: two copies of a StorageWeakRef would free one reference twice and end the process.
        return ReceivedInputs, ()

    def forget(self) -> None:
        """Frees the values of inputs that no longer exist."""
        self._entries = {key: entry for key, entry in self._entries.items() if not entry.memory.expired()}

    def keep(self, own: Tensor, values: Tensor) -> Tensor:
        """A tensor like `own` with these values; the tensor of an earlier forward if `own` has the same memory."""
        storage = own.untyped_storage()
        key = storage._cdata, own.storage_offset(), own.dtype, tuple(own.shape), own.stride()
        version = None if own.is_inference() else own._version
        entry = self._entries.get(key)
        with torch.no_grad():
            if entry is None or entry.received.is_inference() != torch.is_inference_mode_enabled():
                received = torch.empty_like(own, requires_grad=False).copy_(values)
            elif entry.version == version:
                # Equal values. `.data` keeps the version, since autograd may have saved this tensor.
                received = entry.received
                received.data.copy_(values)
            else:
                received = entry.received.copy_(values)
        self._entries[key] = _Entry(StorageWeakRef(storage), received, version)
        return received
