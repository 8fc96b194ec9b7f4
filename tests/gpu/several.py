"""Processes for tests on several GPUs, one for each; the fixture `gpus` starts them."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from diffusers_attn.context_parallel.mesh import ContextParallelMesh

from ..context_parallel.pool import serve

SIZE = min(torch.cuda.device_count(), 4)
TIMEOUT = 300.0
SEVERAL_GPUS = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(SIZE < 2, reason=f"needs two CUDA devices or more; PyTorch sees {SIZE}"),
]
"""`pytestmark` of a file whose tests need several GPUs."""

# (ring, ulysses, rotate_method); 0 is as many as there are GPUs.
STRATEGIES = {
    "ulysses": (1, 0, "allgather"),
    "ring": (0, 1, "alltoall"),
    "gather": (0, 1, "allgather"),
}
if SIZE == 4:
    STRATEGIES |= {"unified ring": (2, 2, "alltoall"), "unified gather": (2, 2, "allgather")}


class Meshes:
    """The groups that jobs ask for, over all GPUs."""

    def __init__(self) -> None:
        self._meshes = {(ring, ulysses): self._make(ring, ulysses) for ring, ulysses in ((1, SIZE), (SIZE, 1))}
        if SIZE == 4:
            self._meshes[2, 2] = self._make(2, 2)

    @staticmethod
    def _make(ring, ulysses):
        return init_device_mesh("cuda", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))

    def __call__(self, strategy):
        ring, ulysses, method = STRATEGIES[strategy]
        return ContextParallelMesh.from_mesh(self._meshes[ring or SIZE, ulysses or SIZE], rotate_method=method)


def work(rank, store, jobs, results):
    torch.cuda.set_device(rank)
    torch.backends.cudnn.allow_tf32 = False  # what is compared is no convolution's rounding
    limit = datetime.timedelta(seconds=TIMEOUT / 2)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=limit, device_id=device
    )
    serve(rank, Meshes(), jobs, results)
