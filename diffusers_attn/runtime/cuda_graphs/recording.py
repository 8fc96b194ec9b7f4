"""One recorded forward: the memory of its inputs, its graph, and the memory of its outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...context_parallel.sequences.layout import LayoutState
from ...context_parallel.sequences.tracker import SequenceTracker
from ...errors import AttentionProviderError
from .arguments import GraphCall, replaced, tensors_of


class Recording:
    """Records a forward as a CUDA graph.

    Args:
        forward: the model's forward. It has run once with such a call, so that compilation and autotuning are done.
        call: the arguments.
        tensors: the tensors in `call`, contiguous and on the model's device.
        pool: memory pool of the graph. Recordings that share a pool must not run at the same time.
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
        pool: Any,
        tracker: SequenceTracker | None,
        during: contextlib.AbstractContextManager[Any],
        model: str,
    ) -> None:
        self._inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        self._copy(tensors)
        args, kwargs = call.with_tensors(self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            # "thread_local": other threads, such as NCCL's watchdog, may use the device while this one records.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"), during:
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
        self._tracker: LayoutState | None = None if tracker is None else tracker.state()

    def _copy(self, tensors: list[Tensor]) -> None:
        for own, given in zip(self._inputs, tensors):
            own.copy_(given)

    def replay(self, tensors: list[Tensor], tracker: SequenceTracker | None) -> Any:
        """The output of the forward for the values of `tensors`."""
        self._copy(tensors)
        self._graph.replay()
        if tracker is not None and self._tracker is not None:
            tracker.restore(self._tracker)  # the model's own hooks run after the replay and read it
        # Clones, since the next replay overwrites the recorded outputs.
        return replaced(self._output, iter([tensor.clone() for tensor in tensors_of(self._output)]))
