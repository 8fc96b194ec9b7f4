"""A mesh with dimensions for guidance or data: the same as degrees by name."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import AttentionProviderError

GROUPS = ("data", "guidance")
"""Dimensions along which ranks share no sequence."""
AXES = (*GROUPS, "ring", "ulysses")


class GivenDegrees(NamedTuple):
    """The degrees that a user named; None for others."""

    data: int | None
    guidance: int | None
    ring: int | None
    ulysses: int | None


def degrees_of(mesh: object, given: GivenDegrees) -> GivenDegrees | None:
    """The degrees that stand for `mesh`; None if it has no dimension for guidance or data.

    Args:
        mesh: a user's mesh.
        given: the degrees that the user named beside it.

    Raises:
        AttentionProviderError: the mesh has other dimensions, lacks ranks of the job or has them in another order, or
            contradicts a degree.
    """
    names = mesh.mesh_dim_names or () if isinstance(mesh, DeviceMesh) else ()
    if not isinstance(mesh, DeviceMesh) or not set(names) & set(GROUPS):
        return None
    ranks = mesh.mesh.flatten().tolist()
    if list(names) != [axis for axis in AXES if axis in names] or ranks != list(range(dist.get_world_size())):
        raise AttentionProviderError(
            f"mesh has the dimensions {names} and the ranks {ranks}. With 'data' or 'guidance', accepted are "
            f"dimensions named {', '.join(map(repr, AXES))}, in this order, over all ranks of the job in theirs, such "
            "as init_device_mesh('cuda', (2, 2), mesh_dim_names=('guidance', 'ulysses')). Or leave mesh out, and give "
            "degrees."
        )
    sizes = dict(zip(names, mesh.mesh.shape))
    for axis, degree in given._asdict().items():
        if degree not in (None, sizes.get(axis, 1)):
            raise AttentionProviderError(
                f"{axis}_degree={degree}, but the mesh has {sizes.get(axis, 1)}. Leave one of them out."
            )
    shares = "ring" in sizes or "ulysses" in sizes
    within = {axis: sizes.get(axis, 1) if shares else None for axis in ("ring", "ulysses")}
    return GivenDegrees(sizes.get("data", given.data), sizes.get("guidance", 1), **within)
