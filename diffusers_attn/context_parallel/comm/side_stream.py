"""Work that runs concurrently with the current stream."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

import torch


class Lane(Protocol):
    """The interface of `SideStream`."""

    def is_captured(self) -> bool: ...
    def fork(self) -> None: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *error: Any) -> None: ...
    def join(self) -> None: ...
    def drain(self) -> None: ...


class SideStream:
    """A stream beside the current one. Work inside `with` runs after the earlier work of the current stream,
    concurrently with its work until `join`, and before its work after `join`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # High priority, before kernels of the main stream: a barrier is one warp.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._context = torch.cuda.stream(self._stream)
        self._begin, self._end = torch.cuda.Event(), torch.cuda.Event()
        self._main: torch.cuda.Stream | None = None

    def is_captured(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def fork(self) -> None:
        main = torch.cuda.current_stream(self._device)
        # None is tested first, because a stream compares equal to None.
        if self._main is None:
            self._main = main
        elif main != self._main:
            # Work of the earlier stream still reads received data. (A capture has waited for all of it.)
            if not self.is_captured():
                main.wait_stream(self._main)
            self._main = main

    def __enter__(self) -> None:
        assert self._main is not None
        self._begin.record(self._main)
        self._stream.wait_event(self._begin)
        self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.record(self._stream)
        self._context.__exit__(kind, error, traceback)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._end)

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)
