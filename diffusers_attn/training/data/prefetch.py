"""Prefetching in threads: examples are decoded and read while the device computes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(do: Callable[[T], R], items: Iterable[T], *, threads: int, depth: int) -> Generator[R, None, None]:
    """`map(do, items)`, in this order, computed by `threads` threads up to `depth` items ahead.

    `items` may be endless. An exception of `do` is raised when its item is due. The threads end with the iterator.
    """
    source = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="training-data")
    submitted: deque[Future[R]] = deque(pool.submit(do, item) for item in itertools.islice(source, depth))
    try:
        while submitted:
            result = submitted.popleft().result()
            submitted.extend(pool.submit(do, item) for item in itertools.islice(source, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
