"""Four processes on gloo, started once for all tests on several ranks, so that a test costs only its own work.

A job is a function of a module below `tests`, called on each of the first `ranks` processes as
`job(meshes, **arguments)`. It returns something that pickles. If it fails on a rank, the test fails with that rank's
traceback, and since the other ranks may then wait for it, all processes end and new ones start for the next job.
"""

from __future__ import annotations

import datetime
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _world

from diffusers_attn.context_parallel.mesh import ContextParallelMesh
from diffusers_attn.parent_process import end_with_parent

from ..launching import forkserver

SIZE = 4
TIMEOUT = 300.0
"""seconds for a job, and half of it for an exchange: on a busy machine everything takes many times as long."""
START = 600.0
"""seconds in which all processes must have started. They import torch and diffusers, all at once."""
_STOP = None
_READY = 0


class Meshes:
    """The process groups that jobs ask for. Made on all four ranks, so that jobs on fewer need none of their own."""

    def __init__(self) -> None:
        # Two ranks are a part of a larger mesh, as they are beside data parallelism.
        pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "cp"))
        self.lines: dict[int, DeviceMesh] = {
            2: pairs["cp"],
            3: DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("cp",)),
            4: init_device_mesh("cpu", (4,), mesh_dim_names=("cp",)),
        }
        self.heads = {size: DeviceMesh("cpu", list(range(size)), mesh_dim_names=("ulysses",)) for size in (2, 3, 4)}
        self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        self.pairs = pairs

    def __call__(self, ring: int, ulysses: int, **config: Any) -> ContextParallelMesh:
        if ring > 1 and ulysses > 1:
            return ContextParallelMesh.from_mesh(self.square, **config)
        return ContextParallelMesh.from_mesh(self.lines[ring] if ring > 1 else self.heads[ulysses], **config)


def _begin(work: Callable[..., None], rank: int, store: str, jobs: Any, results: Any) -> None:
    end_with_parent(Path(store).parent)
    work(rank, store, jobs, results)


def _work(rank: int, store: str, jobs: Any, results: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", store=served(store, rank, SIZE), rank=rank, world_size=SIZE, timeout=timeout)
    serve(rank, Meshes(), jobs, results)


def served(path: str, rank: int, size: int) -> dist.Store:
    """A store as launchers have it, whose port is at `path`: with that of files, ranks meet in 10 ms and not in 0.3."""
    files = dist.FileStore(path, size)
    store = dist.TCPStore(
        "127.0.0.1", 0 if rank == 0 else int(files.get("port")), None, rank == 0, wait_for_workers=False
    )
    if rank == 0:
        files.set("port", str(store.port))
    return store


def serve(rank: int, meshes: Any, jobs: Any, results: Any) -> None:
    """What a process does once it is in its group: jobs as they come, then its end."""
    results.put((_READY, rank, True, None, groups_so_far(meshes)))
    while (work := jobs.get()) is not _STOP:
        number, job, arguments = work
        try:
            torch.manual_seed(0)
            answer: tuple[bool, Any] = (True, job(meshes, **arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        results.put((number, rank, *answer, groups_so_far(meshes)))
    # gloo's threads may abort a process that has ended its work and tears down beside others that have not.
    dist.barrier()
    results.close()
    results.join_thread()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def groups_so_far(meshes: Any) -> int:
    """How many groups PyTorch has named in this process. It names the next one by this number, so ranks with different
    numbers wait for each other in vain. 0 without meshes: then each job makes a world of its own."""
    return 0 if meshes is None else _world.group_count


class Pool:
    """Processes that run `work(rank, path of a store, jobs, results)`, see `serve`; a job takes `timeout` s at most."""

    def __init__(self, work: Callable[..., None] = _work, size: int = SIZE, timeout: float = TIMEOUT) -> None:
        self._work, self._size, self._timeout = work, size, timeout
        self._processes: list[Any] = []
        self._number = 0
        self._groups: dict[int, int] = {}
        """Of each rank, after its last job."""

    def run(self, ranks: int, job: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What `job` returned on each of the first `ranks` processes."""
        if not self._processes:
            self._start()
        self._number += 1
        try:
            for jobs in self._jobs[:ranks]:
                jobs.put((self._number, job, arguments))
            return self._answers(self._number, ranks, self._timeout)
        except KeyboardInterrupt:
            self.kill()  # they are at work, and would be waited for at the end
            raise

    def _answers(self, wanted: int, ranks: int, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        until = time.monotonic() + timeout
        while len(answers) < ranks:
            missing = sorted(set(range(ranks)) - set(answers))
            try:
                number, rank, succeeded, answer, groups = self._results.get(timeout=1.0)
            except queue.Empty:
                ended = [rank for rank in missing if not self._processes[rank].is_alive()]
                if ended or time.monotonic() > until:
                    codes = [self._processes[rank].exitcode for rank in ended]
                    self.kill()
                    if ended:
                        raise RuntimeError(f"ranks {ended} ended with {codes}") from None
                    raise TimeoutError(f"no answer from ranks {missing} within {timeout:.0f} s") from None
                continue
            if number != wanted:
                continue
            if not succeeded:
                self.kill()
                raise AssertionError(f"on rank {rank} of {ranks}:\n{answer}")
            answers[rank], self._groups[rank] = answer, groups
        if len(set(self._groups.values())) > 1:
            self.kill()
            raise AssertionError(f"ranks have made {self._groups} groups; all ranks of a pool must make each group")
        return [answers[rank] for rank in range(ranks)]

    def _start(self) -> None:
        # Forks of one process that has imported everything: of spawned ones, each would import it again. But CUDA does
        # not work in forks of a process that has looked for devices, as some imports do.
        context = mp.get_context("spawn") if torch.cuda.is_available() else forkserver()
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = [context.SimpleQueue() for _ in range(self._size)]
        self._results = context.Queue()
        store = os.path.join(self._folder.name, "store")
        self._processes = [
            context.Process(target=_begin, args=(self._work, rank, store, self._jobs[rank], self._results), daemon=True)
            for rank in range(self._size)
        ]
        for process in self._processes:
            process.start()
        self._groups = {}
        self._answers(_READY, self._size, START)

    def close(self) -> None:
        """Ends the processes and raises where one did not end well."""
        for jobs in self._jobs if self._processes else []:
            jobs.put(_STOP)
        for process in self._processes:
            process.join(TIMEOUT)
        codes = [process.exitcode for process in self._processes]
        self.kill()
        if any(codes):
            raise RuntimeError(f"workers ended with {codes}")

    def kill(self) -> None:
        if "COVERAGE_RUN" in os.environ:  # a process that is killed loses its measurements
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                process.join(10)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []
