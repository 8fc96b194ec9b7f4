"""Programs and processes that tests start. None outlives pytest, also where pytest is killed."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
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
    "diffusers_attn.training.loop.trainer",
    "diffusers",
    "transformers",
    "peft",
]
"""what processes of all tests have imported when they start"""


def forkserver() -> Any:
    """The context of processes that start with everything imported. There is one server for each process of pytest,
    and the first who asks for it says what it imports: so all ask here. A fork of pytest itself would have the codecs
    of PyAV without their threads, and hang when it frees them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run(
    command: Sequence[str | Path], timeout: float = TIMEOUT, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns with captured text. The command ends with all processes that it started, such as
    the ranks of torchrun, when it takes longer than `timeout` seconds and when pytest is interrupted or killed.

    Raises:
        AssertionError: it took too long, or failed where `check` is set; the message has its output.
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


def run_ranks(
    ranks: int, script: str | Path, *arguments: str | Path, of: int | None = None
) -> subprocess.CompletedProcess[str]:
    """A Python script as torchrun starts it, but in processes that have everything imported already: of the time of a
    small job that is the most. When a rank fails, the others are killed; with `of`, when that rank has ended.

    Returns the first exit code that is not 0, and what all ranks printed, one after the other. A launcher itself, and
    settings that packages read when they are imported, need `run`.
    """
    from torch.distributed import TCPStore

    context, command = forkserver(), [str(script), *map(str, arguments)]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the ranks meet at it, as at torchrun's
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank in range(ranks):
            environment = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            jobs.append(context.Process(target=_as_main, args=(command, environment, f"{folder}/{rank}")))
        try:
            for job in jobs:
                job.start()
            until = time.monotonic() + TIMEOUT
            awaited = jobs if of is None else jobs[of : of + 1]
            while any(job.exitcode is None for job in awaited) and not any(job.exitcode for job in awaited):
                if time.monotonic() > until:
                    break
                time.sleep(0.01)
        finally:
            codes = [job.exitcode for job in awaited]
            for job in jobs:
                job.kill()
                job.join()
        printed = [
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{name}"))) for name in ("out", "err")
        ]
    if None in codes and not any(codes):
        raise AssertionError(f"{script} took more than {TIMEOUT:g} s\n{printed[0]}\n{printed[1]}")
    return subprocess.CompletedProcess([str(script)], next(filter(None, codes), 0), *printed)


def _as_main(command: list[str], environment: dict[str, str], path: str) -> None:
    end_with_parent()
    os.environ |= environment
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{path}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


def as_child(job: Callable[..., Any], *arguments: Any) -> None:
    """The target of a process of `multiprocessing`: `job`, which ends when pytest is killed."""
    end_with_parent()
    job(*arguments)
