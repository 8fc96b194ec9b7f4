"""Splitting and gathering the tensors of a model by its layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from ..comm.collectives import depends_on
from . import sharding
from .find_by_length import check_lengths_suffice, find_by_length
from .forwards import RunningForwards


class SplitGather(RunningForwards):
    """The operations by which hooks split and gather tensors."""

    gathers_others = True
    """Whether gathered tensors within attention, and modules that compute heads separately, have the tokens of other
    ranks. If not, they have zeros in their place, by which `verify_cp_plan` checks that it would notice."""

    def split(
        self,
        name: str | tuple[str, ...],
        tensor: Tensor,
        dim: int,
        flattened: bool = False,
        already: tuple[str, ...] = (),
    ) -> Tensor:
        """This rank's shard of a tensor that is equal on all ranks.

        Args:
            name: the sequence of dimension `dim`, or several that are joined. The first one without a known length (or
                the first, if all are known) has the tokens that the other lengths leave.
            flattened: whether the dimension holds the sequence once for every sample.
            already: sequences whose tokens are split in the tensor already.

        Raises:
            AttentionProviderError: the other sequences have not been split, or are longer than the tensor; or some rank
                would have no token of a sequence. On all ranks.
        """
        if flattened:
            return self._split_flattened(name, tensor, dim % tensor.ndim)
        names = (name,) if isinstance(name, str) else name
        rest = next((each for each in names if each not in self.lengths), names[0])
        length = tensor.shape[dim]
        for other in names:
            known = 0 if other == rest else self.full_length(other)
            length -= self.local_length((other,)) if other in already else known
        if length < 0:
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} should hold {' and '.join(names)}, joined along dimension {dim}, and "
                f"they are longer: {self.describe()}. Was it split before?"
            )
        self._check_not_a_shard(rest, length)
        is_first = not self.lengths.are_known()
        self.shard_length(rest, length)
        spans, start = [], 0
        for each in names:
            if each in already:
                spans.append((start, self.local_length((each,))))
                start += self.local_length((each,))
                continue
            self._check_every_rank_has_some(each, tensor, dim)
            if each in self.replicated:
                spans.append((start, self.lengths[each]))
            elif self.has_placeholder(each, self.mesh.rank):
                spans.append((start, 1))
            else:
                spans += [(start + first, count) for first, count in self.shards((each,)).spans[self.mesh.rank]]
            start += self.lengths[each]
        shard = sharding.take(tensor, tuple(spans), dim)
        if is_first and torch.compiler.is_compiling():
            # The hook that begins the forward may be in the graph too, where it cannot see which thread runs it.
            for group in (self.mesh.ring, self.mesh.ulysses):
                if group.size > 1:
                    shard = depends_on(shard, shard, sent_over=group)
        # A contiguous tensor gives a contiguous shard. Otherwise a block would be compiled once for shards and once
        # more for outputs of other blocks.
        if tensor.is_contiguous() and not _has_contiguous_strides(shard):
            return shard.clone(memory_format=torch.contiguous_format)
        return shard

    def _check_not_a_shard(self, name: str, length: int) -> None:
        """Raises AttentionProviderError if the tensor is a rank's shard already. On all ranks, since all know all
        sizes."""
        known = self.lengths.get(name, length)
        if 0 < length != known and length in self.shards((name,)).sizes:
            raise AttentionProviderError(
                f"'{name}' was split before in this forward, from {known} tokens, and the tensor to split now has "
                f"{length}, as many as a rank's shard. Split it once: of blocks that pass it on, name the first alone "
                "('blocks.0', not 'blocks.*')."
            )

    def _check_every_rank_has_some(self, name: str, tensor: Tensor, dim: int) -> None:
        """Raises AttentionProviderError if a rank would have no token of `name`, and no placeholder. All ranks judge by
        the full length. Otherwise they would wait for the rank whose model fails."""
        length = self.lengths[name]
        if 0 < length < self.mesh.size and name not in self.replicated and name not in self.named:
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} is to be split along dimension {dim} over {self.mesh.size} ranks, and "
                f"'{name}' has a length of {length} there, too short for every rank to have a part. Use {length} "
                f"rank{'s' * (length > 1)} or fewer, or a larger size; or, in a plan of your own, name "
                "the sequence, CPInput(sequence=...): a rank without a token is then given a placeholder."
            )

    def _split_flattened(self, name: str | tuple[str, ...], tensor: Tensor, dim: int) -> Tensor:
        length = self.full_length(name) if isinstance(name, str) else 0
        if not length or tensor.shape[dim] % length:
            known = self.describe()
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} should have sequence {name!r} once for every sample in dimension {dim}"
                f", and this is no multiple of its length. {known[0].upper()}{known[1:]}."
            )
        return self.split(name, tensor.unflatten(dim, (-1, length)), dim + 1).flatten(dim, dim + 1)

    def gather(self, name: str | tuple[str, ...] | None, tensor: Tensor, dim: int) -> Tensor:
        """The full tensor, from every rank's shard.

        Args:
            name: the sequence of dimension `dim`, or several that are joined; None finds it by its length.

        Raises:
            AttentionProviderError: a sequence has not been split, or the length fits none, or more than one.
        """
        if name is None:
            check_lengths_suffice(self, "a CPOutput")
            shards = find_by_length(self, tensor.shape[dim], [(name,) for name in self.lengths], "a CPOutput")
            if shards is None:
                raise AttentionProviderError(
                    f"a tensor {list(tensor.shape)} is to be gathered along dimension {dim}, and no sequence has "
                    f"{tensor.shape[dim]} tokens on rank {self.mesh.rank} ({self.describe()}). Was it split?"
                )
            return sharding.gather(tensor, shards, dim, self.mesh).contiguous()
        names = (name,) if isinstance(name, str) else name
        for each in names:
            self.full_length(each)
        kept = self.kept(names)
        tensor = tensor if kept is None else kept.take_out(tensor, dim)
        shards = self.shards(names)
        if not self.gathers_others and self.is_in_attention:
            return sharding.alone(tensor, shards, dim, self.mesh.rank)
        return sharding.gather(tensor, shards, dim, self.mesh).contiguous()  # models call `view` on the result

    def split_groups(self, name: str | tuple[str, ...], tensor: Tensor, dim: int) -> Tensor:
        """As `split`, for a tensor in which every entry of the sequence is several consecutive tokens.

        Raises:
            AttentionProviderError: the sequence has fewer entries than there are ranks, or the tensor no multiple.
        """
        length = self.full_length(name) if isinstance(name, str) else 0
        if length < self.mesh.size or tensor.shape[dim] % length:
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} should have as many tokens for each of '{name}' in dimension {dim}, of "
                f"which every one of {self.mesh.size} ranks needs one; {self.describe()}. Use fewer ranks."
            )
        dim %= tensor.ndim
        return self.split(name, tensor.unflatten(dim, (length, -1)), dim).flatten(dim, dim + 1)

    def gather_groups(self, name: str | tuple[str, ...] | None, tensor: Tensor, dim: int) -> Tensor:
        """As `gather`, for a tensor that `split_groups` split."""
        names = name if isinstance(name, tuple) else (name or "",)
        self.full_length(names[0])
        dim %= tensor.ndim
        groups = tensor.unflatten(dim, (self.local_length(names), -1))
        return self.gather(name, groups, dim).flatten(dim, dim + 1)


def _has_contiguous_strides(tensor: Tensor) -> bool:
    """`is_contiguous` for a compiler, which also looks at the strides of dimensions with one entry."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True
