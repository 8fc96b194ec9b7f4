"""The ranks that share a sequence: `ContextParallelMesh` owns the degrees and the process groups."""

from __future__ import annotations

import dataclasses
import datetime

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import AttentionProviderError
from .comm import shared_groups
from .comm.everyone import everyone
from .comm.group import ALONE, Group
from .config import ContextParallelConfig

AXES = ("ring", "ulysses")


@dataclasses.dataclass(frozen=True)
class ContextParallelMesh:
    """The degrees and process groups of context parallelism. Make one with `from_mesh` or `from_degrees`.

    This rank has the shard number `ring.rank * ulysses.size + ulysses.rank`.
    """

    config: ContextParallelConfig
    ring: Group
    """Group along the ring, between whose ranks keys and values travel."""
    ulysses: Group
    """Group along Ulysses, whose ranks exchange tokens for heads."""
    device_type: str = "cpu"
    """Device type of the mesh's ranks, such as "cuda"."""
    lease: shared_groups.Lease | None = dataclasses.field(default=None, compare=False, repr=False)
    """Keeps the groups alive, if `from_degrees` made them."""

    @property
    def size(self) -> int:
        """Number of ranks that share a sequence."""
        return self.ring.size * self.ulysses.size

    @property
    def rank(self) -> int:
        """Number of this rank's shard."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    @staticmethod
    def of(
        mesh: DeviceMesh | ContextParallelMesh, *, rotate_method: str = "allgather", convert_to_fp32: bool = True
    ) -> ContextParallelMesh:
        """The groups of either kind of mesh, with these settings.

        Raises:
            AttentionProviderError: `mesh` is neither kind, or has other dimensions than `from_mesh` accepts.
        """
        if isinstance(mesh, DeviceMesh):
            return ContextParallelMesh.from_mesh(mesh, rotate_method=rotate_method, convert_to_fp32=convert_to_fp32)
        if not isinstance(mesh, ContextParallelMesh):
            raise AttentionProviderError(
                f"mesh is a {type(mesh).__name__}; a torch DeviceMesh or a ContextParallelMesh is accepted."
            )
        config = dataclasses.replace(mesh.config, rotate_method=rotate_method, convert_to_fp32=convert_to_fp32)
        return dataclasses.replace(mesh, config=config)

    @staticmethod
    def from_mesh(
        mesh: DeviceMesh, *, rotate_method: str = "allgather", convert_to_fp32: bool = True
    ) -> ContextParallelMesh:
        """The groups of a DeviceMesh.

        Args:
            mesh: one dimension, which is a ring unless its name is "ulysses"; or two, named "ring" and "ulysses". It
                may be a part of a larger mesh.
            rotate_method, convert_to_fp32: see `ContextParallelConfig`.

        Raises:
            AttentionProviderError: the mesh has other dimensions, or this rank is not in it.
        """
        names = mesh.mesh_dim_names or ()
        if mesh.ndim == 1:
            axes = {"ulysses" if names == ("ulysses",) else "ring": 0}
        elif set(names) == set(AXES):
            axes = {name: names.index(name) for name in AXES}
        else:
            raise AttentionProviderError(
                f"mesh has {mesh.ndim} dimensions named {names or None}; one dimension (a ring), or two named 'ring' "
                "and 'ulysses', are accepted. Pass a part of a larger mesh: mesh['ring', 'ulysses'], or mesh['cp']."
            )
        if mesh.get_coordinate() is None:
            raise AttentionProviderError(
                f"rank {dist.get_rank()} is not in the mesh, which has the ranks {mesh.mesh.flatten().tolist()}. Apply "
                "context parallelism only on the mesh's ranks, or make a mesh of all ranks."
            )
        groups = {
            name: Group(mesh.get_group(dim).group_name, mesh.get_local_rank(dim), mesh.size(dim))
            for name, dim in axes.items()
        }
        ring, ulysses = groups.get("ring", ALONE), groups.get("ulysses", ALONE)
        return ContextParallelMesh(
            ContextParallelConfig(ring.size, ulysses.size, rotate_method, convert_to_fp32),
            ring,
            ulysses,
            mesh.device_type,
        )

    @staticmethod
    def from_degrees(
        ring_degree: int = 1,
        ulysses_degree: int = 1,
        *,
        device_type: str,
        rotate_method: str = "allgather",
        convert_to_fp32: bool = True,
        timeout: datetime.timedelta | float | None = None,
    ) -> ContextParallelMesh:
        """Makes groups over all ranks of the job. All ranks must call this. Every `ring_degree * ulysses_degree`
        neighbouring ranks share a sequence; data parallelism uses the other dimension.

        Groups of the same degrees and timeout are shared, and end with the last mesh that uses them.

        Args:
            ring_degree, ulysses_degree, rotate_method, convert_to_fp32: see `ContextParallelConfig`.
            device_type: the device type of the ranks, such as "cuda".
            timeout: how long an exchange waits for a rank, in seconds. None uses the job's own timeout.

        Raises:
            AttentionProviderError: the degrees do not fit the number of ranks, or there are no ranks.
        """
        config = ContextParallelConfig(ring_degree, ulysses_degree, rotate_method, convert_to_fp32)
        if config.size == 1:
            return ContextParallelMesh(config, ALONE, ALONE)
        if not dist.is_initialized():
            raise AttentionProviderError(
                f"ring_degree={ring_degree} and ulysses_degree={ulysses_degree} need {config.size} ranks, but this is "
                "a single process. Start the script with `accelerate launch --num_processes "
                f"{config.size}` or `torchrun --nproc_per_node {config.size}`, and call "
                "torch.distributed.init_process_group first."
            )
        world = dist.get_world_size()
        if world % config.size:
            raise AttentionProviderError(
                f"ring_degree={ring_degree} * ulysses_degree={ulysses_degree} = {config.size} does not divide the "
                f"{world} ranks of this job. Accepted products: {[n for n in range(1, world + 1) if world % n == 0]}."
            )
        limit = shared_groups.as_timeout(timeout, device_type)
        shared_groups.end_unused()
        lease = shared_groups.lease(
            ("axes", ring_degree, ulysses_degree, limit),
            lambda value: everyone(value, [None]),
            lambda number: _new_groups(ring_degree, ulysses_degree, shared_groups.of_device(limit)),
        )
        names = iter(lease.names)
        rank = dist.get_rank() % config.size
        ring = Group(next(names), rank // ulysses_degree, ring_degree) if ring_degree > 1 else ALONE
        ulysses = Group(next(names), rank % ulysses_degree, ulysses_degree) if ulysses_degree > 1 else ALONE
        return ContextParallelMesh(config, ring, ulysses, device_type, lease)


def _new_groups(ring: int, ulysses: int, timeout: datetime.timedelta) -> list[dist.ProcessGroup]:
    """This rank's groups along the ring and along Ulysses, for degrees above 1. Every rank makes the groups of all
    ranks, as `dist.new_group` requires."""
    mine = []
    for axis, size in (("ring", ring), ("ulysses", ulysses)):
        for first in range(0, dist.get_world_size(), ring * ulysses) if size > 1 else ():
            members = range(first, first + ring * ulysses)
            sets = [members[place::ulysses] for place in range(ulysses)]
            if axis == "ulysses":
                sets = [members[place * ulysses :][:ulysses] for place in range(ring)]
            for each in sets:
                group = dist.new_group(list(each), timeout=timeout, group_desc=f"diffusers_attn {axis}")
                if dist.get_rank() in each:
                    mine.append(group)
    return mine
