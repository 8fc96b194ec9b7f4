"""Programs and processes that tests start. None outlives pytest, also where pytest is killed."""

from __future__ import annotations

import multiprocessing
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers_attn.parent_process import end_with_parent, ended_with_parent

TIMEOUT = 600.0
"""seconds: programs that take ten on an idle machine take many times as long on a busy one."""

PRELOAD = [
    "tests.zoo",
    "tests.training.runs",
    "diffusers_attn.parallelize.enable",
    "diffusers_attn.verify_plan.verify",
    "diffusers_attn.training.trainer",
    "diffusers",
    "transformers",
    "peft",
]
"""what processes of all tests have imported when they start"""


def forkserver() -> Any:
    """The context of processes that start with everything imported. There is one server for each process of pytest,
    and the first who asks for it says what it imports: so all ask here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run(
    command: Sequence[str | Path], timeout: float = TIMEOUT, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns with captured text. The command ends with all processes that it started, such as
    the ranks of torchrun, when it takes longer than `timeout` seconds and when pytest is interrupted or killed.

    Raises:
        AssertionError: it took too long, or failed where `check` is set; the message has what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(ended_with_parent(command), stdin=subprocess.PIPE, stdout=out, stderr=err, **options)
        late = False
        try:
            job.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            assert job.stdin is not None
            job.stdin.close()
            job.wait()
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(list(command), job.returncode, out.read(), err.read())
    if late or (check and done.returncode):
        why = f"took more than {timeout:g} s" if late else f"ended with {done.returncode}"
        raise AssertionError(f"{done.args} {why}\n{done.stdout}\n{done.stderr}")
    return done


def as_child(job: Callable[..., Any], *arguments: Any) -> None:
    """The target of a process of `multiprocessing`: `job`, which ends when pytest is killed."""
    end_with_parent()
    job(*arguments)
