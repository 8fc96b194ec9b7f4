"""Frozen weights of a transformer's blocks in host memory or in files, and on the device while their block runs.

The weights of the next block are copied while a block runs: forwards in the forward pass, and backwards while gradient
checkpointing recomputes. A block's weights are new parameters in each run, so what autograd keeps for its backward
stays valid. diffusers' group offloading moves all parameters of a block, also an adapter's, whose optimizer needs them
on the device, and it prefetches in the order of the forward pass only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
        self._loaded: dict[int, Callable[[], PlainTensors]] = {}
        """Blocks whose weights are on the device, or on their way: a function that waits for them."""
        self._last = -1
        """Index of the block that ran last."""
        for number, block in enumerate(blocks):
            block.store(device, None if folder is None else folder / f"block-{number:04d}.safetensors")
            block.module.register_forward_pre_hook(lambda *_, number=number: self._before(number), prepend=True)
            # Also after the exception with which checkpointing ends a recomputation early.
            block.module.register_forward_hook(lambda *_, number=number: self._after(number), always_call=True)

    def _before(self, number: int) -> None:
        backwards = number == self._last - 1 or number == self._last == len(self._blocks) - 1
        following = number - 1 if backwards else number + 1
        for other in set(self._loaded) - {number, following}:
            self._loaded.pop(other)()  # memory with a copy on its way must not be used again before it arrives
        if number not in self._loaded:
            self._load(number)
        self._blocks[number].use(self._loaded[number]())
        if 0 <= following < len(self._blocks) and following not in self._loaded:
            self._load(following)
        self._last = number

    def _after(self, number: int) -> None:
        self._blocks[number].release()
        self._loaded.pop(number, None)

    def _load(self, number: int) -> None:
        """Starts to bring the weights of a block to the device."""
        block = self._blocks[number]
        if self._reader is not None:
            read: Future[PlainTensors] = self._reader.submit(block.read)
            self._loaded[number] = lambda: self._copy(read.result())()
        else:
            self._loaded[number] = self._copy(block.read())

    def _copy(self, source: PlainTensors) -> Callable[[], PlainTensors]:
        """Starts copies to the device. Returns a function that makes the current stream wait for them."""
        # Memory is allocated on the current stream, and the copies wait for everything that this stream has to do, so
        # memory of earlier blocks is used again without waiting for the host.
        target = {name: torch.empty_like(each, device=self._device) for name, each in source.items()}
        if self._stream is None:
            for name, each in source.items():
                target[name].copy_(each)
            return lambda: target
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for name, each in source.items():
                target[name].copy_(each, non_blocking=True)
            arrived = self._stream.record_event()

        def wait() -> PlainTensors:
            torch.cuda.current_stream(self._device).wait_event(arrived)
            return target

        return wait


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
