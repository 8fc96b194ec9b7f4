"""One recorded forward: the memory of its inputs, its graph, and the memory of its outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...context_parallel.sequences.layout import LayoutState
from ...context_parallel.sequences.tracker import SequenceTracker
from ...errors import AttentionProviderError
from ...nested import describe, mapped
from .arguments import GraphCall, is_plain
from .capture_failure import restored_after_failure


class Pool:
    """The memory that the recordings of one model share. Their replays must not overlap."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the device that the recordings hold."""
        segments = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) == tuple(self.handle))

    def take(self) -> None:
        """Has the current stream wait for the latest replay, which may be on another stream."""
        stream = torch.cuda.current_stream()
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream


class Recording:
    """Records a forward as a CUDA graph.

    Args:
        forward: the model's forward. It has run once with such a call, so that compilation and autotuning are done.
        call: the arguments.
        tensors: the tensors in `call`, on the model's device.
        pool: memory of the graph.
        tracker: tracks the model's sequences; None without context parallelism.
        during: context manager that is entered while recording.
        model: name of the model, for messages.

    Raises:
        AttentionProviderError: the forward does something that a graph cannot contain, such as waiting for the device.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        call: GraphCall,
        tensors: list[Tensor],
        pool: Pool,
        tracker: SequenceTracker | None,
        during: contextlib.AbstractContextManager[Any],
        model: str,
    ) -> None:
        self._pool = pool
        pool.take()
        self._inputs = [torch.empty_like(tensor) for tensor in tensors]  # with their strides, unless these overlap
        self._copy(tensors)
        args, kwargs = call.with_tensors(self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            # "thread_local": other threads, such as NCCL's watchdog, may use the device while this one records.
            with (
                restored_after_failure(torch.device("cuda", torch.cuda.current_device()), pool.handle),
                torch.cuda.graph(self._graph, pool=pool.handle, capture_error_mode="thread_local"),
                during,
            ):
                try:
                    self._output = forward(*args, **kwargs)
                except Exception as error:  # ending the capture raises another error, which would hide this one
                    failure = error
                    raise
        except Exception as error:
            cause = failure or error
            raise AttentionProviderError(
                f"the forward of {model} cannot be recorded as a CUDA graph: {type(cause).__name__}: {cause}\nA graph "
                "holds nothing that waits for the device (.item(), a mask whose lengths the host must know), copies "
                "from the host's memory, or launches on other streams. Name a provider that does none of this, or call "
                "remove_cuda_graphs(model)."
            ) from cause
        _check_output(self._output, model)
        self._tracker: LayoutState | None = None if tracker is None else tracker.state()

    def _copy(self, tensors: list[Tensor]) -> None:
        for own, given in zip(self._inputs, tensors):
            own.copy_(given)

    def replay(self, tensors: list[Tensor], tracker: SequenceTracker | None) -> Any:
        """The output of the forward for the values of `tensors`."""
        self._pool.take()
        self._copy(tensors)
        self._graph.replay()
        if tracker is not None and self._tracker is not None:
            tracker.restore(self._tracker)  # the model's own hooks run after the replay and read it
        # Clones, since the next replay overwrites the recorded outputs.
        return mapped(self._output, Tensor.clone)


def _check_output(output: Any, model: str) -> None:
    """Raises AttentionProviderError if `output` holds tensors in an object that `mapped` does not look into."""
    if isinstance(output, (list, tuple)):
        for each in output:
            _check_output(each, model)
    elif isinstance(output, Mapping):
        for each in output.values():
            _check_output(each, model)
    elif not isinstance(output, Tensor) and not is_plain(output):
        raise AttentionProviderError(
            f"{model} returns {describe(output)}. A recorded forward returns tensors, plain values, and lists and "
            "dicts of these. Call remove_cuda_graphs(model)."
        )
