"""Stores the input values that a rank receives from the first rank, in the same memory for the same input.

Some code identifies an input by its address. diffusers' TextKVCache stores the keys of a prompt by the address of the
prompt's embeddings. New tensors in every forward would often get the address of an earlier one, and with it the keys of
another prompt. So received values live exactly as long as the input that they replace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Received(NamedTuple):
    memory: StorageWeakRef
    """A weak reference to the storage of this rank's own input. The memory may be freed, but its id is not reused."""
    received: Tensor
    version: int | None
    """Version of the input when values were last received; None for an inference tensor."""


class ReceivedInputs:
    """The received values of one model's inputs, by the memory of this rank's own inputs."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Received] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy starts empty: two copies of a StorageWeakRef would free one reference twice and end the process.
        return ReceivedInputs, ()

    def forget(self) -> None:
        """Frees the values of inputs that no longer exist."""
        self._entries = {key: entry for key, entry in self._entries.items() if not entry.memory.expired()}

    def keep(self, own: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like `own` with these values; the tensors of an earlier forward if `own` have the same memory. A
        value that is this rank's own tensor object stays so."""
        kept, copies = list(own), _Copies()
        with torch.no_grad():
            for number, (mine, value) in enumerate(zip(own, values)):
                if mine is not value:
                    kept[number] = self._place(mine, value, copies)
            copies.make()
        return kept

    def _place(self, own: Tensor, value: Tensor, copies: _Copies) -> Tensor:
        """The tensor for the values of `own`, into which `copies` will write `value`."""
        storage = own.untyped_storage()
        key = storage._cdata, own.storage_offset(), own.dtype, own.shape, own.stride()
        version = None if own.is_inference() else own._version
        entry = self._entries.get(key)
        if entry is None or entry.received.is_inference() != torch.is_inference_mode_enabled():
            received = torch.empty_like(own, requires_grad=False)
            copies.add(received, value)
        else:
            received = entry.received
            # If values are equal, `.data` keeps the version, since autograd may have saved this tensor.
            copies.add(received.data if entry.version == version else received, value)
        self._entries[key] = _Received(StorageWeakRef(storage), received, version)
        return received


class _Copies:
    """Copies of tensors, made by one kernel for each dtype."""

    def __init__(self) -> None:
        self._lists: dict[object, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, target: Tensor, source: Tensor) -> None:
        targets, sources = self._lists.setdefault((target.dtype, target.device), ([], []))
        targets.append(target)
        sources.append(source)

    def make(self) -> None:
        for targets, sources in self._lists.values():
            torch._foreach_copy_(targets, sources)
