"""Degrees, process groups and their errors, and the pool of worker processes."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ring_degree": 0}, "ring_degree=0: a whole number from 1"),
        ({"ulysses_degree": 2.0}, "ulysses_degree=2.0"),
        ({"ring_degree": True}, "ring_degree=True"),
        ({"rotate_method": "p2p"}, "rotate_method='p2p': accepted are 'allgather' and 'alltoall'"),
        ({"convert_to_fp32": None}, "convert_to_fp32=None"),
    ],
)
def test_values_are_checked_once(values, message):
    with pytest.raises(AttentionProviderError, match=message):
        ContextParallelConfig(**values)


def test_a_single_process_needs_no_groups():
    mesh = ContextParallelMesh.from_degrees(1, 1, device_type="cpu")
    assert (mesh.ring, mesh.ulysses, mesh.size, mesh.rank) == (ALONE, ALONE, 1, 0)
    with pytest.raises(AttentionProviderError, match="accelerate launch --num_processes 4"):
        ContextParallelMesh.from_degrees(2, 2, device_type="cpu")


def shapes(meshes):
    """(rank, size, ring, ulysses) of every kind of mesh, and the messages of those that are refused."""
    line, square = meshes.lines[4], meshes.square
    made = {
        "line": ContextParallelMesh.from_mesh(line, rotate_method="alltoall"),
        "heads": ContextParallelMesh.from_mesh(meshes.heads[4]),
        "square": ContextParallelMesh.from_mesh(square),
        "part": ContextParallelMesh.from_mesh(meshes.pairs["cp"]),
        "degrees": ContextParallelMesh.from_degrees(2, 1, device_type="cpu"),
    }
    refused = {}
    for name, make in {
        "names": lambda: ContextParallelMesh.from_mesh(meshes.pairs),
        "outside": lambda: ContextParallelMesh.from_mesh(meshes.lines[3]),
        "world": lambda: ContextParallelMesh.from_degrees(3, 1, device_type="cpu"),
    }.items():
        try:
            make()
        except AttentionProviderError as error:
            refused[name] = str(error)
    return {name: (mesh.rank, mesh.size, mesh.ring[1:], mesh.ulysses[1:]) for name, mesh in made.items()}, refused


def test_groups_of_meshes(pool):
    for rank, (made, refused) in enumerate(pool.run(4, shapes)):
        assert made == {
            "line": (rank, 4, (rank, 4), (0, 1)),
            "heads": (rank, 4, (0, 1), (rank, 4)),
            "square": (rank, 4, (rank // 2, 2), (rank % 2, 2)),
            "part": (rank % 2, 2, (rank % 2, 2), (0, 1)),
            "degrees": (rank % 2, 2, (rank % 2, 2), (0, 1)),
        }
        assert "mesh['ring', 'ulysses']" in refused["names"]
        assert "Accepted products: [1, 2, 4]" in refused["world"]
        assert ("outside" in refused) == (rank == 3)


def fail_on_one(meshes, rank):
    mesh: DeviceMesh = meshes.lines[2]
    if mesh.get_local_rank() == rank:
        raise ValueError("as intended")
    torch.distributed.all_reduce(torch.ones(1), group=mesh.get_group())


def succeed(meshes):
    return meshes.lines[2].get_local_rank()


def test_a_rank_that_fails_is_reported_and_stops_nothing(pool):
    with pytest.raises(AssertionError, match="ValueError: as intended"):
        pool.run(2, fail_on_one, rank=1)
    assert pool.run(2, succeed) == [0, 1]
