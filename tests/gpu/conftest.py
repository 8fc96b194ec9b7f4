"""Fixtures of tests on GPUs. Errors that were measured are reported at the end, whether or not they passed."""

from __future__ import annotations

import collections
import gc

import pytest
import torch

from ..context_parallel.pool import Pool
from .several import SIZE, TIMEOUT, work

_measured: dict[str, dict[str, float]] = collections.defaultdict(dict)


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device"))


@pytest.fixture(scope="module")
def gpus():
    """One process for each GPU."""
    workers = Pool(work, SIZE, TIMEOUT)
    yield workers
    workers.close()


@pytest.fixture
def record():
    """`record(provider, what, error, limit)` notes the error and asserts that it is within the limit."""

    def note(provider: str, what: str, error: float, limit: float) -> None:
        _measured[provider][what] = max(error, _measured[provider].get(what, 0.0))
        assert error <= limit, f"{provider}: {what} is off by {error:.3g}, more than {limit:.3g}"

    return note


@pytest.fixture(autouse=True)
def _collect():
    yield
    # A graph capture that failed must not be alive in the next test.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pytest_terminal_summary(terminalreporter) -> None:
    if not _measured:
        return
    terminalreporter.section("worst errors")
    for provider, errors in _measured.items():
        line = ", ".join(f"{what} {error:.2e}" for what, error in sorted(errors.items()))
        terminalreporter.write_line(f"{provider}: {line}")
