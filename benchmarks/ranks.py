"""The processes of a benchmark, and how they exchange results."""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from measuring import Report
from strategies import Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diffusers_attn.parent_process import end_with_parent


class Ranks:
    """The process groups of a benchmark. Ranks exchange results over gloo, which works when NCCL does not."""

    def __init__(self, device_type: str, timeout: float) -> None:
        end_with_parent()  # a launcher that is killed leaves its processes behind
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device_type == "cuda" else device_type)
        limit = datetime.timedelta(seconds=timeout)
        if device_type == "cuda":
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", timeout=limit, device_id=self.device)
        else:
            dist.init_process_group("gloo", timeout=limit)
        # A long timeout, since ranks compile at different speeds.
        self.talk = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=10))
        self._meshes: dict[tuple[int, int], DeviceMesh] = {}

    def mesh(self, strategy: Strategy) -> DeviceMesh:
        """The mesh of a strategy. Strategies with equal degrees share one, since communicators take memory."""
        shape = strategy.ring or self.size, strategy.ulysses or self.size
        if shape[0] * shape[1] != self.size:
            raise ValueError(f"{shape[0]} x {shape[1]} ranks are not the {self.size} of this job")
        if shape not in self._meshes:
            self._meshes[shape] = init_device_mesh(self.device.type, shape, mesh_dim_names=("ring", "ulysses"))
        return self._meshes[shape]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of the ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.talk)
        return values

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def attempt(self, work: Callable[[], Any]) -> list[Any]:
        """The results of `work` on all ranks.

        Raises:
            VariantError: it failed on all ranks.
            RanksDifferError: it failed on some ranks; the others may wait for them forever.
        """
        try:
            mine, error = work(), ""
        except Exception as failure:  # whatever it is, the other variants are still measured
            if os.environ.get("BENCHMARK_TRACEBACKS"):
                traceback.print_exc()
            mine, error = None, f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
        every = self.gather((mine, error))
        failed = {rank: error for rank, (_, error) in enumerate(every) if error}
        if len(failed) == self.size:
            raise VariantError(failed[0])
        if failed:
            raise RanksDifferError(", ".join(f"rank {rank} alone: {error}" for rank, error in failed.items()))
        return [result for result, _ in every]

    def run(self, measure: Callable[[], None], report: Report, markdown: Callable[[dict[str, Any]], str]) -> NoReturn:
        """Measures, prints the tables of the report on the first rank, and ends this process: with status 1 if a rank
        failed.

        Args:
            measure: adds the variants to `report`.
            report: the results.
            markdown: the tables of a report, from the content of its file.
        """
        status = 0
        try:
            measure()
        except (RanksDifferError, VariantError) as failure:
            print(f"rank {self.rank}: {failure}", file=sys.stderr)
            status = 1
        if self.rank == 0:
            results = [variant.result for variant in report.variants]
            print(markdown({"environment": report.environment, "results": results}), flush=True)
        self.end(status)

    def end(self, status: int) -> NoReturn:
        """Ends this process: together with the others after success, else at once.

        Process groups are not destroyed, since exchanges may be open and gloo's threads may abort the process.
        """
        if status == 0:
            dist.barrier(group=self.talk)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class VariantError(Exception):
    """A variant failed on all ranks."""


class RanksDifferError(Exception):
    """A variant failed on some ranks, so the exchanges of the others cannot end."""
