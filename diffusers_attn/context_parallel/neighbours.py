"""What a convolution along a split sequence sees beyond this rank's shard: entries of the ranks before and after.

All ranks' edges are gathered, which are few, by what gathers outputs: it serves any mesh, and its gradient is right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cp_plans.plan import CPNeighbours
from ..errors import AttentionProviderError
from . import sharding
from .sharding import Shards
from .streams import Streams


class AddNeighbours:
    """Gives a module its first argument with its neighbours."""

    def __init__(self, streams: Streams, path: str, spec: CPNeighbours) -> None:
        self.streams, self.path, self.spec = streams, path, spec

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or not isinstance(args[0], Tensor):
            raise AttentionProviderError(
                f"the plan has neighbours for the first argument of '{self.path}', which was not given a tensor there. "
                "Name a module that is called with it by position."
            )
        return with_neighbours(self.streams, self.spec, args[0]), *args[1:]


class CutNeighbours:
    """Cuts off what came out for them."""

    def __init__(self, streams: Streams, spec: CPNeighbours) -> None:
        self.streams, self.spec = streams, spec

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        mesh, spec = self.streams.mesh, self.spec
        own = self.streams.shards((spec.stream,)).sizes[mesh.rank]
        return output.narrow(spec.dim, spec.reach if mesh.rank > 0 else 0, own)


def with_neighbours(streams: Streams, spec: CPNeighbours, tensor: Tensor) -> Tensor:
    """This rank's shard of a sequence, and the `reach` entries before and behind it where there are such.

    Raises:
        AttentionProviderError: some rank has fewer. On all ranks.
    """
    mesh, dim, reach = streams.mesh, spec.dim, spec.reach
    sizes = streams.shards((spec.stream,)).sizes
    if mesh.size == 1:
        return tensor
    if min(sizes) < reach:
        raise AttentionProviderError(
            f"'{spec.stream}' is split into {', '.join(map(str, sizes))}, and this model looks at {reach} of a "
            "neighbour's. Use fewer ranks."
        )
    edges = torch.cat([tensor.narrow(dim, 0, reach), tensor.narrow(dim, sizes[mesh.rank] - reach, reach)], dim=dim)
    every = sharding.gather(edges, Shards.contiguous(2 * reach * mesh.size, mesh.size), dim, mesh)
    parts = [tensor]
    if mesh.rank > 0:
        parts.insert(0, every.narrow(dim, (2 * mesh.rank - 1) * reach, reach))
    if mesh.rank < mesh.size - 1:
        parts.append(every.narrow(dim, 2 * (mesh.rank + 1) * reach, reach))
    return torch.cat(parts, dim=dim)
