"""One recorded forward: its inputs' memory, its graph, its outputs' memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...context_parallel.sequences.tracker import SequenceTracker, TrackerState
from ...errors import AttentionProviderError
from .arguments import GraphCall, replaced, tensors_of


class Recording:
    """A forward, recorded.

    Args:
        forward: of the model. It has run once with a call like this one, so that nothing is left to be compiled or
            chosen.
        call: its arguments.
        tensors: those in it, on the model's device.
        pool: whose memory the forward computes in. Recordings that share one may not run at the same time.
        streams: of the model's context parallelism, if it has any.
        meanwhile: what is to be held while it is recorded.

    Raises:
        AttentionProviderError: it does something that a graph cannot have, such as waiting for the device.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        call: GraphCall,
        tensors: list[Tensor],
        pool: Any,
        tracker: SequenceTracker | None,
        meanwhile: contextlib.AbstractContextManager[Any],
        model: str,
    ) -> None:
        self._inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        self._copy(tensors)
        args, kwargs = call.with_tensors(self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            # Other threads, such as NCCL's watchdog, go on asking the device meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"), meanwhile:
                try:
                    self._output = forward(*args, **kwargs)
                except Exception as error:  # what ends the recording hides it behind an error of its own
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
        self._tracker: TrackerState | None = None if tracker is None else tracker.state()

    def _copy(self, tensors: list[Tensor]) -> None:
        for own, given in zip(self._inputs, tensors):
            own.copy_(given)

    def replay(self, tensors: list[Tensor], tracker: SequenceTracker | None) -> Any:
        """The output for other `tensors`, as the forward would return it."""
        self._copy(tensors)
        self._graph.replay()
        if tracker is not None and self._tracker is not None:
            tracker.restore(self._tracker)  # for what the model's own hooks still do
        # Of its own: the next replay writes to the recorded ones.
        return replaced(self._output, iter([tensor.clone() for tensor in tensors_of(self._output)]))
