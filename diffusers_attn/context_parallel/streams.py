"""The sequences that one model's forward has split, and which of them a tensor holds.

Hooks record how long each sequence was when it was split. From these lengths every rank knows what all ranks hold, so
that uneven shards need no exchange of sizes. Which sequences an attention call joins is the plan's to say. Where it
does not, lengths tell, or the call is refused: on all ranks, since all judge by what all have.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AttentionProviderError
from . import sharding
from .mesh import ContextParallelMesh
from .running import running
from .sharding import Shards


class Role(NamedTuple):
    """What a plan says of an attention module."""

    query: tuple[str, ...]
    """the streams of its queries, in the order in which they are joined."""
    key: tuple[str, ...]
    """of its keys; none: keys that every rank has whole."""
    outer_mask: bool = False
    """whether its mask is made of one value per token, multiplied, from tokens that are split."""


class SplitCall(NamedTuple):
    """What the queries and keys of an attention call are shards of."""

    queries: Shards
    keys: Shards
    in_order: bool
    """whether the order of joined streams is known, and with it the place of every token."""


class Streams:
    """One model's sequences on one mesh. Lengths are those of the latest forward."""

    def __init__(self, mesh: ContextParallelMesh) -> None:
        self.mesh = mesh
        self.lengths: dict[str, int] = {}
        self.role: Role | None = None
        """of the attention module that is running, where the plan says it."""
        self._outer: list[Role | None] = []
        self._calls: dict[tuple[Role | None, int, int], SplitCall | None] = {}

    def begin(self) -> None:
        """Forgets the sequences of an earlier forward."""
        self.lengths.clear()
        self._calls.clear()
        self._outer.clear()
        self.role = running.streams = None

    def enter(self, role: Role | None) -> None:
        """An attention module begins: in a forward, or where checkpointing recomputes one."""
        self._outer.append(self.role)
        self.role = role
        running.streams = self

    def leave(self) -> None:
        """It ends."""
        self.role = self._outer.pop()
        running.streams = self if self._outer else None

    def split(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """This rank's shard of `tensor`, whose dimension `dim` is the sequence `name`."""
        if self.lengths.get(name) != tensor.shape[dim]:
            self.lengths[name] = tensor.shape[dim]
            self._calls.clear()
        return sharding.split(tensor, self.shards((name,)), dim, self.mesh.rank)

    def gather(self, name: str | None, tensor: Tensor, dim: int) -> Tensor:
        """The whole of what has this rank's shard in dimension `dim`: of the sequence `name`, or of the one that is so
        long."""
        if name is None:
            shards = self._by_length(tensor.shape[dim], [(name,) for name in self.lengths], "a CPOutput")
            if shards is None:
                raise AttentionProviderError(
                    f"a tensor {list(tensor.shape)} is to be gathered along dimension {dim}, and no sequence has "
                    f"{tensor.shape[dim]} tokens on rank {self.mesh.rank} ({self._known()}). Was it split?"
                )
            return sharding.gather(tensor, shards, dim, self.mesh)
        if name not in self.lengths:
            raise AttentionProviderError(
                f"no tensor of stream '{name}' has been split before it is gathered: {self._known()}."
            )
        return sharding.gather(tensor, self.shards((name,)), dim, self.mesh)

    def shards(self, names: tuple[str, ...]) -> Shards:
        """Who holds what of these sequences, joined."""
        shards = [Shards.contiguous(self.lengths[name], self.mesh.size) for name in names]
        return Shards.joint(*shards or [Shards.contiguous(0, self.mesh.size)])

    def attention(self, query_len: int, key_len: int) -> SplitCall | None:
        """What the queries and keys of a call are shards of, from their lengths on this rank; None for a call that is
        complete on each rank, since nothing is split or its keys are whole. Without a role, keys are taken to be whole
        if no split sequences are as long and the queries are others.

        Raises:
            AttentionProviderError: the lengths fit nothing, or more than one thing.
        """
        if not self.lengths or self.mesh.size == 1:
            return None
        if torch.compiler.is_compiling():
            return self._attention(query_len, key_len)
        # Every layer asks the same.
        signature = self.role, query_len, key_len
        if signature not in self._calls:
            self._calls[signature] = self._attention(query_len, key_len)
        return self._calls[signature]

    def _attention(self, query_len: int, key_len: int) -> SplitCall | None:
        if self.role is not None and all(name in self.lengths for name in self.role.query + self.role.key):
            return self._by_role(self.role, query_len, key_len)
        joins = [
            names for count in range(1, len(self.lengths) + 1) for names in itertools.combinations(self.lengths, count)
        ]
        queries = self._by_length(query_len, joins, "the queries of an attention call")
        keys = self._by_length(key_len, joins, "the keys of an attention call")
        if queries is not None and keys is not None:
            in_order = all(len(runs) == 1 for shards in (queries, keys) for runs in shards.runs)
            return SplitCall(queries, keys, in_order)
        if keys is None and query_len != key_len:
            return None
        raise self._mixed(query_len, key_len)

    def _by_role(self, role: Role, query_len: int, key_len: int) -> SplitCall | None:
        if not role.key:
            return None
        queries, keys = self.shards(role.query), self.shards(role.key)
        if (query_len, key_len) == (queries.sizes[self.mesh.rank], keys.sizes[self.mesh.rank]):
            return SplitCall(queries, keys, True)
        if query_len != key_len:
            return None
        raise self._mixed(query_len, key_len)

    def _mixed(self, query_len: int, key_len: int) -> AttentionProviderError:
        return AttentionProviderError(
            f"an attention call has {query_len} queries and {key_len} keys on rank {self.mesh.rank}, which is a mix of "
            f"tokens that are split and tokens that are whole ({self._known()}). Split all that its queries and keys "
            "come from; or, if all of it is whole, say so with CPAttention."
        )

    def _by_length(self, length: int, joins: list[tuple[str, ...]], what: str) -> Shards | None:
        """The one of `joins` with so many tokens on this rank, None if there is none.

        Refused where any rank could take it for another: it is by this that ranks agree.
        """
        different = {shards.sizes: shards for shards in map(self.shards, joins)}
        found = [sizes for sizes in different if sizes[self.mesh.rank] == length]
        if not found:
            return None
        for sizes in different:
            if sizes != found[0] and any(one == other for one, other in zip(sizes, found[0])):
                raise AttentionProviderError(
                    f"{what}, {length} tokens on rank {self.mesh.rank}, could be shards of {sum(found[0])} tokens or "
                    f"of {sum(sizes)} ({self._known()}). Say in the plan which: name the sequences (stream='text') of "
                    "CPInput and CPOutput, and give the attention modules' with CPAttention."
                )
        return different[found[0]]

    def _known(self) -> str:
        lengths = ", ".join(f"{name}: {length}" for name, length in self.lengths.items())
        return f"split in this forward are {lengths or 'none'}"
