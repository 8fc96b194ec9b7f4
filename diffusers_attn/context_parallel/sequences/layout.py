"""Which tokens of each sequence each rank has, in one forward of one model.

Hooks record the length of each sequence when it is split. From these lengths every rank computes the shards of all
ranks, so that uneven shards need no exchange of sizes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...errors import AttentionProviderError
from ..mesh import ContextParallelMesh
from .lengths import Lengths
from .placeholders import LocalTokens
from .roles import Role, SplitCall
from .sharding import Shards


class LayoutState(NamedTuple):
    """The lengths and blocks of a forward, to keep."""

    lengths: dict[str, int]
    blocks: dict[str, int]


class SequenceLayout:
    """The sequences of one model on one mesh. Lengths are those of the latest forward."""

    def __init__(self, mesh: ContextParallelMesh) -> None:
        self._meshes: dict[ContextParallelMesh, str] = {}
        self.use(mesh)
        self.named: set[str] = set()
        """Sequences that the plan names. A rank without a token of one receives a placeholder."""
        self.balanced: set[str] = set()
        """Sequences whose shards have one part from the front and one from the back."""
        self.replicated: set[str] = set()
        """Sequences that are complete on every rank. In the keys of a longer call and in gathered tensors, each rank
        contributes only its shard, as for a split sequence, so that no token counts twice and the mean of gradients
        over the ranks is right."""
        self.clear()

    @property
    def mesh(self) -> ContextParallelMesh:
        """The ranks that share the sequences of the next forward."""
        found: ContextParallelMesh = getattr(self, self._mesh)
        return found

    def use(self, mesh: ContextParallelMesh) -> None:
        """Splits later forwards over the ranks of `mesh`."""
        # Each mesh has an attribute of its own, since Dynamo makes a number symbolic if an attribute changes it.
        name = self._meshes.setdefault(mesh, f"_mesh_{len(self._meshes)}")
        setattr(self, name, mesh)
        self._mesh = name

    def clear(self) -> None:
        """Forgets the sequences of an earlier forward."""
        # New objects, since a compiled graph would depend on the earlier contents of cleared ones.
        self.lengths = Lengths()
        self.blocks: dict[str, int] = {}
        """Tokens per block, for sequences that are split between blocks only."""
        self._forget_computed()

    def _forget_computed(self) -> None:
        """Clears the values that are computed from the lengths once per forward."""
        self._shards: dict[tuple[str, ...], Shards] = {}
        self._local_tokens: dict[tuple[tuple[str, ...], int], LocalTokens | None] = {}
        self._calls: dict[tuple[Role | None, int, int], SplitCall | None] = {}

    def state(self) -> LayoutState:
        """The lengths and blocks of the latest forward."""
        return LayoutState(dict(self.lengths), dict(self.blocks))

    def restore(self, state: LayoutState) -> None:
        """Adds the lengths and blocks of a forward that was recorded, whose hooks do not run when it is replayed."""
        self.lengths.update(state.lengths)
        self.blocks.update(state.blocks)
        self._forget_computed()

    @property
    def is_split(self) -> bool:
        """Whether, at this point of the forward, any sequence is split between ranks."""
        return self.lengths.are_known() and self.mesh.size > 1

    # Recording lengths.

    def shard_length(self, name: str, length: int) -> int:
        """Records that the sequence `name` has `length` tokens. Returns the number in this rank's model.

        Raises:
            AttentionProviderError: the length does not divide into blocks as `keep_blocks` demands.
        """
        if self.lengths.get(name) != length:
            block = self.blocks.get(name, 1)
            if block > 1 and (length % block or length < block * self.mesh.size):
                raise AttentionProviderError(
                    f"'{name}' has {length} tokens, and attention computes blocks of {block}; each of "
                    f"{self.mesh.size} ranks needs one block or more. Give the model a size that divides into blocks, "
                    "or use fewer ranks."
                )
            self.lengths[name] = length
            self._forget_computed()
        return self.local_length((name,))

    def keep_blocks(self, name: str, size: int) -> None:
        """Makes the sequence `name` split only between blocks of `size` tokens.

        Raises:
            AttentionProviderError: the sequence has been split in another way.
        """
        if name in self.lengths and self.blocks.get(name, 1) != size:
            raise AttentionProviderError(
                f"'{name}' must be split between blocks of {size} tokens, and was split otherwise before. Give "
                'advanced.CPBlocks for an argument of the model, "", or of a module that runs before the split.'
            )
        self.check_in_order(name, "attention by blocks")
        self.blocks[name] = size

    # Lengths.

    def full_length(self, name: str) -> int:
        """Tokens of a sequence on all ranks. Raises AttentionProviderError if it has not been split."""
        if name not in self.lengths:
            raise AttentionProviderError(
                f"no tensor of sequence '{name}' has been split before it is gathered or joined: {self.describe()}."
            )
        return self.lengths[name]

    def local_length(self, names: tuple[str, ...]) -> int:
        """Tokens of joined sequences in this rank's model, with placeholders and replicated tokens."""
        kept = self.kept(names)
        return self.shards(names).sizes[self.mesh.rank] if kept is None else kept.seen

    def local_lengths(self, names: tuple[str, ...]) -> list[int]:
        """`local_length` on every rank."""
        lengths = [0] * self.mesh.size
        for name in names:
            for rank, size in enumerate(self.shards((name,)).sizes):
                replicated = name in self.replicated
                lengths[rank] += self.lengths[name] if replicated else size + self.has_placeholder(name, rank)
        return lengths

    def global_length(self, name: str, local: int) -> int:
        """The full length of the sequence `name`.

        Args:
            local: the number of its tokens in this rank's model, for comparison.

        Raises:
            AttentionProviderError: the number is another. On all ranks, unless they were given different numbers.
        """
        length, expected = self.full_length(name), self.local_length((name,))
        if local != expected:
            raise AttentionProviderError(
                f"Expected local length {expected} of '{name}', got {local}; {self.describe()}. Compute it from a "
                "tensor that is split."
            )
        return length

    def log_base(self, name: str, base: float) -> float:
        """Rescales the base of log(length), so that the local length gives the value that the full length gives.

        Raises:
            AttentionProviderError: a rank has fewer than two tokens, whose logarithm is not positive. On all ranks.
        """
        length, sizes = self.full_length(name), self.shards((name,)).sizes
        if self.mesh.size == 1:
            return base
        if min(sizes) < 2:
            raise AttentionProviderError(
                f"'{name}' has {length} tokens for {self.mesh.size} ranks, and this model scales scores by the "
                "logarithm of a rank's number, which must be 2 or more. Use fewer ranks."
            )
        return math.exp(math.log(base) * math.log(sizes[self.mesh.rank]) / math.log(length))

    def describe(self) -> str:
        """The split sequences and their lengths, for errors."""
        lengths = ", ".join(f"{name}: {length}" for name, length in self.lengths.items())
        return f"split in this forward are {lengths or 'none'}"

    # Shards.

    def shards(self, names: tuple[str, ...]) -> Shards:
        """The shards of all ranks, of these sequences joined."""
        if torch.compiler.is_compiling():
            return self._make_shards(names)
        if names not in self._shards:
            self._shards[names] = self._make_shards(names)
        return self._shards[names]

    def _make_shards(self, names: tuple[str, ...]) -> Shards:
        return Shards.joint(*[self._shards_of(name) for name in names] or [self.contiguous(0)])

    def _shards_of(self, name: str) -> Shards:
        if name in self.balanced:
            return Shards.zigzag(self.lengths[name], self.mesh.size)
        return self.contiguous(self.lengths[name], self.blocks.get(name, 1))

    def contiguous(self, length: int, block: int = 1) -> Shards:
        """The shards of a sequence of `length` tokens, in order."""
        return Shards.contiguous(length, self.mesh.size, block)

    def splits_blocks(self, names: tuple[str, ...]) -> bool:
        """Whether any of these sequences is split between blocks, on more than one rank."""
        return self.mesh.size > 1 and any(name in self.blocks for name in names)

    def check_in_order(self, name: str, what: str) -> None:
        """Raises AttentionProviderError unless each rank has one part of the sequence `name`, which `what` needs. On
        all ranks."""
        if name in self.balanced:
            raise AttentionProviderError(
                f"the plan splits '{name}' with balanced=True, a part of its front and one of its back for each rank, "
                f"and {what} needs it in order. Leave balanced out."
            )

    # This rank's own tokens.

    def present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The sequences among `names` that this forward has split. A model may run without reference images."""
        return tuple(name for name in names if name in self.lengths)

    def kept(self, names: tuple[str, ...], prefix: int = 0) -> LocalTokens | None:
        """This rank's own tokens among the tokens in its model; None if all are its own.

        Args:
            names: the sequences that are joined.
            prefix: number of replicated tokens before them.
        """
        if torch.compiler.is_compiling():
            return self._make_local_tokens(names, prefix)
        signature = names, prefix
        if signature not in self._local_tokens:
            self._local_tokens[signature] = self._make_local_tokens(names, prefix)
        return self._local_tokens[signature]

    def _make_local_tokens(self, names: tuple[str, ...], prefix: int) -> LocalTokens | None:
        spans = list(self.contiguous(prefix).spans[self.mesh.rank]) if prefix else []
        start, partial = prefix, prefix > 0
        for name in names:
            shards = self.shards((name,))
            if name in self.replicated:
                spans += [(start + first, count) for first, count in shards.spans[self.mesh.rank]]
                start, partial = start + self.lengths[name], True
            elif self.has_placeholder(name, self.mesh.rank):
                start, partial = start + 1, True
            else:
                spans.append((start, shards.sizes[self.mesh.rank]))
                start += shards.sizes[self.mesh.rank]
        return LocalTokens(start, tuple(spans)) if partial else None

    def has_placeholder(self, name: str, rank: int) -> bool:
        """Whether a rank has a placeholder in place of tokens of this sequence."""
        if name in self.replicated or name not in self.named:
            return False
        return self.lengths[name] > 0 == self.shards((name,)).sizes[rank]
