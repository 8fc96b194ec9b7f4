"""Runs tests on a mutant: a fork of this process gives the function its mutated code, and runs them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from .mutate import Mutant, code_of

PACKAGE = "diffusers_attn"
KILLED, SURVIVED, LATE = "killed", "survived", "late"
"""Outcomes. A mutant whose tests take ten times as long as usual counts as noticed."""
_OPTIONS = [
    "-q",
    "-x",
    "-n0",
    "-p",
    "no:cacheprovider",
    "-m",
    "not gpu and not multi_gpu and not thorough and not slow",
]


def path_of(module: str) -> Path:
    found = importlib.import_module(f"{PACKAGE}.{module}").__file__
    assert found is not None
    return Path(found)


def collect(tests: list[str]) -> None:
    """Imports the tests, so that every fork has them. It runs none: what they leave in caches would hide mutants."""
    with _silence():
        assert pytest.main(["--collect-only", *_OPTIONS, *tests]) == 0


def run(tests: list[str], limit: float, mutant: Mutant | None = None) -> tuple[str, float]:
    """The outcome and the seconds of a trial.

    Args:
        limit: seconds after which it is ended.
        mutant: None runs the tests on the code as it is, which must survive.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            _in_fork()
            if mutant is not None:
                function_of(mutant).__code__ = code_of(mutant, path_of(mutant.module))
            with _silence():
                code = pytest.main([*_OPTIONS, *tests])
        finally:
            os._exit(code)
    outcome = LATE
    while time.monotonic() - start < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            outcome = SURVIVED if os.waitstatus_to_exitcode(status) == 0 else KILLED
            break
        time.sleep(0.05)
    try:
        os.killpg(child, signal.SIGKILL)  # also the ranks that it has started
    except ProcessLookupError:
        pass
    if outcome == LATE:
        os.waitpid(child, 0)
    return outcome, time.monotonic() - start


def function_of(mutant: Mutant) -> Any:
    """The function that a mutant changes, below what decorates it."""
    found: Any = importlib.import_module(f"{PACKAGE}.{mutant.module}")
    for name in mutant.function.split("."):
        found = vars(found)[name]
    while not isinstance(getattr(found, "__code__", None), CodeType) or hasattr(found, "__wrapped__"):
        found = getattr(found, "__wrapped__", None) or getattr(found, "__func__", None) or found.fget
    return found


def _in_fork() -> None:
    """Ranks must be forks of the mutant, and not of a server that has the code as it is."""
    from ..context_parallel import pool

    pool.forkserver = lambda: multiprocessing.get_context("fork")


class _silence:  # noqa: N801
    """Writes what pytest prints, also from other processes, nowhere."""

    def __enter__(self) -> None:
        self.kept = os.dup(1), os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *error: object) -> None:
        for number, kept in zip((1, 2), self.kept):
            os.dup2(kept, number)
            os.close(kept)
