"""Frozen weights of a transformer's blocks in host memory or in files, and on the device while their block runs.

The device has memory for two blocks: one for those with even numbers, one for those with odd numbers. The weights of
the next block are copied while a block runs: forwards in the forward pass, backwards in the backward pass, in which
gradient checkpointing recomputes the block. In both passes a block's weights are at the same place. So an operation may
keep them without autograd's knowledge, as those of bitsandbytes do; if each run of a block had memory of its own, such
operations would hold the weights of all blocks from the forward to the backward.

diffusers' group offloading moves all parameters of a block, also an adapter's, whose optimizer needs them on the
device, and it prefetches in the order of the forward pass only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...runtime.compile import repeated_blocks

PlainTensors = dict[str, Tensor]
"""The plain tensors of a block's frozen weights, by name."""


def offload_blocks(transformer: nn.Module, device: torch.device, folder: Path | None = None) -> BlockOffload:
    """Moves a transformer to `device`, except the frozen weights of its blocks. Call it after adapters were added.

    Args:
        transformer: the model on the CPU.
        device: device of the run.
        folder: existing folder for files with the weights. None: they stay in host memory, page-locked for a GPU.

    Returns:
        The installed hooks.
    """
    frozen = [_Block(each) for each in repeated_blocks(transformer)]
    kept = {id(parameter) for block in frozen for _, _, parameter in block.slots}
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(device)  # the same object, which an optimizer may have
                else:
                    moved = parameter.to(device)  # a parameter already, if quantised by bitsandbytes
                    if not isinstance(moved, nn.Parameter):
                        moved = nn.Parameter(moved, requires_grad=False)
                    module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return BlockOffload(frozen, device, folder)


class BlockOffload:
    """Hooks that bring the weights of blocks to the device and remove them again. Made by `offload_blocks`."""

    def __init__(self, blocks: list[_Block], device: torch.device, folder: Path | None) -> None:
        self._blocks, self._device = blocks, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, "offload") if folder is not None else None
        self._backward: int | None = None
        """The block whose backward began last; None in a forward pass."""
        for number, block in enumerate(blocks):
            block.store(device, None if folder is None else folder / f"block-{number:04d}.safetensors")
        self._memory = [
            torch.empty(max((each.bytes for each in those), default=0), dtype=torch.uint8, device=device)
            for those in (blocks[::2], blocks[1::2])
        ]
        self._held: list[tuple[int, Callable[[], PlainTensors]] | None] = [None, None]
        """For each part of the memory: the block whose weights it has, and a function that waits until they are there
        and returns them."""
        for number, block in enumerate(blocks):
            block.module.register_forward_pre_hook(lambda *_, number=number: self._before(number), prepend=True)
            # Also after the exception with which checkpointing ends a recomputation early.
            block.module.register_forward_hook(
                lambda _, __, output, number=number: self._after(number, output), always_call=True
            )

    def _before(self, number: int) -> None:
        if number != self._backward:  # and so not recomputed
            self._backward = None
            self._blocks[number].use(self._bring(number, number + 1))
        else:
            self._blocks[number].use(self._bring(number, number - 1))

    def _after(self, number: int, output: Any) -> None:
        self._blocks[number].release()
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                # Before any backward of the block: the first ones may need weights and nothing that is recomputed.
                each.register_hook(lambda _: self._begin_backward(number))

    def _begin_backward(self, number: int) -> None:
        if number != self._backward:
            self._backward = number
            self._bring(number, number - 1)

    def _bring(self, number: int, following: int) -> PlainTensors:
        """A block's weights on the device. Those of another block, the following one, begin to be copied.

        Memory of the following block is free: a block between two others has run before the second begins. This holds
        in the backward pass, too, since autograd takes the operation that was recorded last of those that are ready.
        """
        self._load(number)
        held = self._held[number % 2]
        assert held is not None
        tensors = held[1]()
        if 0 <= following < len(self._blocks):
            self._load(following)
        return tensors

    def _load(self, number: int) -> None:
        """Starts to bring the weights of a block to the device, if they are not there."""
        held = self._held[number % 2]
        if held is not None and held[0] == number:
            return
        block = self._blocks[number]
        if self._reader is None:
            self._held[number % 2] = number, self._copy(number, block.read())
        else:
            read: Future[PlainTensors] = self._reader.submit(block.read)
            copied = functools.cache(lambda: self._copy(number, read.result()))
            self._held[number % 2] = number, lambda: copied()()

    def _copy(self, number: int, source: PlainTensors) -> Callable[[], PlainTensors]:
        """Starts copies to the device. Returns a function that makes the current stream wait for them."""
        target = placed(self._memory[number % 2], source)
        if self._stream is None:
            for name, each in source.items():
                target[name].copy_(each)
            return lambda: target
        # All that the block before in this memory has to do, backward included, is in the current stream already.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, each in source.items():
                target[name].copy_(each, non_blocking=True)
            arrived = self._stream.record_event()

        def wait() -> PlainTensors:
            torch.cuda.current_stream(self._device).wait_event(arrived)
            return target

        return wait


ALIGNMENT = 256
"""Bytes, as PyTorch's allocator aligns tensors on GPUs."""


def placed(memory: Tensor, like: PlainTensors) -> PlainTensors:
    """Tensors one after the other in `memory` (of bytes), with shapes, strides and dtypes of those in `like`."""
    found, begin = {}, 0
    for name, each in like.items():
        size = _bytes(each)
        part = memory[begin : begin + size].view(each.dtype)
        found[name] = part.as_strided(each.size(), each.stride(), part.storage_offset())
        begin += -(-size // ALIGNMENT) * ALIGNMENT
    return found


def _bytes(tensor: Tensor) -> int:
    """Bytes from the first to the last element of a tensor."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Block:
    """A block and the places of its frozen weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.slots: list[tuple[nn.Module, str, Tensor]] = [
            (each, name, parameter)
            for each in module.modules()
            for name, parameter in each._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        """Module, name and parameter: one with values in host memory, or without values if a file has them."""
        self.bytes = 0
        """Bytes that `placed` needs for the weights, once they are stored."""
        self._path: Path | None = None
        self._pinned = False

    def store(self, device: torch.device, path: Path | None) -> None:
        """Puts the weights into page-locked memory or into a file."""
        self._path, self._pinned = path, device.type == "cuda"
        for _, _, parameter in self.slots:
            scales = getattr(parameter, "quant_state", None)
            if scales is not None:  # those of bitsandbytes, a small part of the memory
                scales.to(device)
        plain = self._plain()
        self.bytes = sum(-(-_bytes(each) // ALIGNMENT) * ALIGNMENT for each in plain.values())
        if path is not None:
            from safetensors.torch import save_file

            save_file({name: each.clone(memory_format=torch.contiguous_format) for name, each in plain.items()}, path)
            plain = {name: torch.empty_like(each, device="meta") for name, each in plain.items()}
        elif self._pinned:
            plain = {name: each.pin_memory() for name, each in plain.items()}
        self.slots = [
            (module, name, _rebuilt(parameter, str(number), plain))
            for number, (module, name, parameter) in enumerate(self.slots)
        ]
        self.release()

    def read(self) -> PlainTensors:
        """The weights in host memory, read from the file if there is one."""
        if self._path is None:
            return self._plain()
        from safetensors.torch import load_file

        found = load_file(self._path)
        return {name: each.pin_memory() for name, each in found.items()} if self._pinned else found

    def use(self, tensors: PlainTensors) -> None:
        """Makes parameters of tensors on the device, and gives them to the modules."""
        for number, (module, name, parameter) in enumerate(self.slots):
            module._parameters[name] = _rebuilt(parameter, str(number), tensors)  # type: ignore[assignment]

    def release(self) -> None:
        """Gives the modules the parameters without values on the device."""
        for module, name, parameter in self.slots:
            module._parameters[name] = parameter  # type: ignore[assignment]

    def _plain(self) -> PlainTensors:
        found: PlainTensors = {}
        for number, (_, _, parameter) in enumerate(self.slots):
            _flatten(parameter.detach(), str(number), found)
        return found


def _flatten(tensor: Tensor, name: str, found: PlainTensors) -> None:
    """Adds the plain tensors of which a tensor consists to `found`; a quantised one has several."""
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            _flatten(getattr(tensor, inner), f"{name}.{inner}", found)
    else:
        found[name] = tensor.as_subclass(Tensor)


def _rebuilt(like: Tensor, name: str, tensors: PlainTensors) -> Tensor:
    """A parameter as `like`, of the plain tensors that `_flatten` named."""
    if hasattr(like, "__tensor_flatten__"):
        return nn.Parameter(_wrapped(like, name, tensors), requires_grad=False)
    found: Any = Tensor._make_subclass(type(like), tensors[name], False)
    found.__dict__.update(like.__dict__)  # such as the scales of bitsandbytes
    return found


def _wrapped(like: Any, name: str, tensors: PlainTensors) -> Any:
    if not hasattr(like, "__tensor_flatten__"):
        return tensors[name]
    names, context = like.__tensor_flatten__()
    inner = {each: _wrapped(getattr(like, each), f"{name}.{each}", tensors) for each in names}
    return type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())
