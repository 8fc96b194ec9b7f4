"""The sequences that one model's forward has split, and which of them a tensor holds.

Hooks record how long each sequence was when it was split. From these lengths every rank knows what all ranks hold, so
that uneven shards need no exchange of sizes. Which sequences an attention call joins is the plan's to say. Where it
does not, lengths tell, or the call is refused: on all ranks, since all judge by what all have.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from ...tracing.symbolic import equal
from ..comm.transport import Transport
from ..mesh import ContextParallelMesh
from . import sharding
from .active import active
from .lengths import Lengths
from .module_names import active_module
from .placeholders import LocalTokens
from .sharding import Shards


class Role(NamedTuple):
    """What a plan says of an attention module."""

    query: tuple[str, ...]
    """the sequences of its queries, in the order in which they are joined."""
    key: tuple[str, ...]
    """of its keys; none: keys that every rank has whole."""
    outer_mask: bool = False
    """whether its mask is made of one value per token, multiplied, from tokens that are split."""
    key_mask: bool = False
    """whether its mask is of all keys, alike for all heads and queries, and may be padded behind them."""
    row_mask: bool = False
    """whether its mask is of this rank's queries and all keys, alike for all heads, and may be padded behind them."""
    prefix: str | None = None
    """the sequence, or name of a cache, whose keys come before and are whole on every rank."""


REPLICATED = Role((), ())
"""of a module that has all tokens of whatever it attends to."""


class SplitCall(NamedTuple):
    """What the queries and keys of an attention call are shards of."""

    queries: Shards
    keys: Shards
    in_order: bool
    """whether the order of joined sequences is known, and with it the place of every token."""


class TrackerState(NamedTuple):
    """What a forward found out about its sequences."""

    lengths: dict[str, int]
    blocks: dict[str, int]


class _Forward(NamedTuple):
    """A forward that runs, and what there was before it."""

    frame: FrameType | None
    """of the call of the model; None where it is being compiled."""
    outer: SequenceTracker | None
    """the model within whose forward this one runs, in the same thread."""
    state: TrackerState | None
    """of that forward, where it is one of the same model."""
    role: Role | None
    depth: int
    """how many attention modules of the same model were running."""


class SequenceTracker:
    """One model's sequences on one mesh. Lengths are those of the latest forward."""

    def __init__(self, mesh: ContextParallelMesh, transport: Transport | None = None) -> None:
        self.mesh = mesh
        self.transport = Transport() if transport is None else transport
        """how keys and values get to the other ranks of a ring, and why so."""
        self.model = "model"
        """its class, for errors."""
        self.lengths = Lengths()
        self.blocks: dict[str, int] = {}
        """of sequences that are split between blocks only, in the latest forward: how many tokens a block has."""
        self.named: set[str] = set()
        """sequences that the plan names: of these, a rank without a token is given a placeholder."""
        self.balanced: set[str] = set()
        """sequences of which each rank has a part of the front and one of the back."""
        self.replicated: set[str] = set()
        """sequences of which every rank has all tokens. Of their keys, and where they are gathered, it takes its shard,
        as of what is split: so nothing counts twice, and the mean of gradients over the ranks is right."""
        self.others_seen = True
        """whether modules that compute by heads, and what is gathered within attention, have the tokens of other ranks;
        if not, zeros in their place, by which `verify_cp_plan` knows that it would notice."""
        self.strict = True
        """whether attention that is computed elsewhere is an error; if not, `verify_cp_plan` sees what comes of it."""
        self.role: Role | None = None
        """of the attention module that is running, where the plan says it."""
        self.reached = False
        """whether, in the running forward, any attention was answered here, or is local because the plan says so."""
        self._forwards: list[_Forward] = []
        self._outer: list[Role | None] = []
        self._reached: list[bool] = []
        """for each attention module that is running, whether a call of it was answered here, or need not be."""
        self._calls: dict[tuple[Role | None, int, int], SplitCall | None] = {}
        self._made: dict[int, tuple[Any, Any]] = {}

    def begin(self) -> None:
        """Forgets the sequences of an earlier forward."""
        # New ones, rather than empty ones: a graph would depend on what was in them.
        self.lengths, self.blocks, self._calls, self._made = Lengths(), {}, {}, {}

    def start(self, frame: FrameType | None = None) -> None:
        """A forward of the model starts: until it ends, all attention of this thread is the model's.

        Args:
            frame: of the call, by which a forward that was interrupted is known to be over.
        """
        outer = active.tracker
        if outer is not None and outer.is_over():
            outer = None
        nested = outer is self
        if not nested:
            self._forget_running()
        self._forwards.append(_Forward(frame, outer, self.state() if nested else None, self.role, len(self._outer)))
        self.role = None
        self.reached = False
        self.begin()
        active.tracker = self

    def end(self) -> None:
        """The forward ends, or is left by an error: what ran before it goes on."""
        if not self._forwards:
            return
        before = self._forwards.pop()
        self._cut(before.depth)
        self.role = before.role
        self._made.clear()
        if before.state is not None:
            self._replace(before.state)
        active.tracker = before.outer

    def is_over(self) -> bool:
        """Whether this model's forward was left without a word: `KeyboardInterrupt` runs no hook that would say so."""
        if not self._forwards or not _has_returned(self._forwards[-1].frame):
            return False
        self._forget_running()
        return True

    @contextlib.contextmanager
    def again(self, state: TrackerState, role: Role | None) -> Iterator[None]:
        """Computes a part of an earlier forward once more, as gradient checkpointing does in a backward: with the
        lengths and the attention module of then."""
        reached = self.reached
        self._forwards.append(_Forward(None, active.tracker, self.state(), self.role, len(self._outer)))
        self._replace(state)
        self.role, active.tracker = role, self
        try:
            yield
        finally:  # also where the checkpoint stops in the middle, since it has all that it needs
            self.end()
            self.reached = reached

    def state(self) -> TrackerState:
        """What is known of the latest forward's sequences, to keep."""
        return TrackerState(dict(self.lengths), dict(self.blocks))

    def restore(self, state: TrackerState) -> None:
        """Knows of the running forward what is known after it: it was recorded, and its hooks do not run again."""
        self.lengths.update(state.lengths)
        self.blocks.update(state.blocks)

    def _replace(self, state: TrackerState) -> None:
        if (dict(self.lengths), self.blocks) != (state.lengths, state.blocks):
            self.begin()
            self.restore(state)

    def _forget_running(self) -> None:
        self._forwards.clear()
        self._outer.clear()
        self._reached.clear()
        self.role = None

    def _cut(self, depth: int) -> None:
        while len(self._outer) > depth:
            self._outer.pop()
            self._reached.pop()

    @property
    def is_split(self) -> bool:
        """Whether, at this point of the forward, any sequence is split between ranks."""
        return self.lengths.are_known() and self.mesh.size > 1

    @property
    def has_begun(self) -> bool:
        """Whether a forward of the model runs in any thread, or a part of one is computed again."""
        return len(self._forwards) > 0

    @property
    def is_running(self) -> bool:
        """Whether this thread is within a forward of the model, or computes a part of one again."""
        return active.tracker is self

    def enter(self, role: Role | None) -> None:
        """An attention module begins: in a forward, or where checkpointing recomputes one. Of one that the plan says
        nothing of, within one that has all tokens, it is known that it has them, too."""
        self._outer.append(self.role)
        if role is None and self.role == REPLICATED:
            role = REPLICATED
        self._reached.append(not self.is_split or role == REPLICATED)
        self.role = role
        active.tracker = self

    def leave(self, needs_none: bool = False) -> bool:
        """It ends.

        Args:
            needs_none: whether it is known that none of its attention has to be answered here.

        Returns:
            Whether any was; or else, whether none need be, since nothing was split when it began.
        """
        self.role = self._outer.pop()
        reached = self._reached.pop() or needs_none
        if reached:
            self._note()
        if not self._outer and not self._forwards:
            active.tracker = None
        return reached

    def _note(self) -> None:
        """Attention was answered here, in whatever runs."""
        self.reached = True
        if self._reached:
            self._reached[-1] = True

    def once(self, of: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns for an object that all layers of a forward are given: made for the first of them, and
        kept for the others until the forward ends."""
        if torch.compiler.is_compiling():
            return make()
        if id(of) not in self._made:
            self._made[id(of)] = of, make()
        return self._made[id(of)][1]

    def split(
        self,
        name: str | tuple[str, ...],
        tensor: Tensor,
        dim: int,
        flattened: bool = False,
        already: tuple[str, ...] = (),
    ) -> Tensor:
        """This rank's shard of `tensor`, whose dimension `dim` is the sequence `name`; or several that are joined, of
        which one, that was not split before or else the first, is as long as the others leave; or, `flattened`, the
        sequence once for every sample. Of those in `already`, the tensor has this rank's shard.

        Raises:
            AttentionProviderError: the others were not split before, or are longer than all; or some rank would have
                none of a sequence. On all ranks.
        """
        if flattened:
            return self._split_flattened(name, tensor, dim % tensor.ndim)
        names = (name,) if isinstance(name, str) else name
        rest = next((each for each in names if each not in self.lengths), names[0])
        length = tensor.shape[dim]
        for other in names:
            known = 0 if other == rest else self._known_length(other)
            length -= self._seen((other,)) if other in already else known
        if length < 0:
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} is to be {' and '.join(names)}, joined along dimension {dim}, and they "
                f"are longer: {self._known()}. Was it split before?"
            )
        self._check_not_a_shard(rest, length)
        self.shard_length(rest, length)
        spans, start = [], 0
        for each in names:
            if each in already:
                spans.append((start, self._seen((each,))))
                start += self._seen((each,))
                continue
            self._check_every_rank_has_some(each, tensor, dim)
            if each in self.replicated:
                spans.append((start, self.lengths[each]))
            elif self._stands_in(each, self.mesh.rank):
                spans.append((start, 1))
            else:
                spans += [(start + first, count) for first, count in self.shards((each,)).spans[self.mesh.rank]]
            start += self.lengths[each]
        shard = sharding.take(tensor, tuple(spans), dim)
        # Of a tensor without gaps, a shard without gaps: else a block would be compiled once for what was split before
        # it and once more for what other blocks compute.
        if tensor.is_contiguous() and not _has_contiguous_strides(shard):
            return shard.clone(memory_format=torch.contiguous_format)
        return shard

    def _check_not_a_shard(self, name: str, length: int) -> None:
        """Raises AttentionProviderError where what is to be split is a rank's shard already. On all ranks, since all
        know all sizes."""
        known = self.lengths.get(name, length)
        if 0 < length != known and length in self.shards((name,)).sizes:
            raise AttentionProviderError(
                f"'{name}' was split before in this forward, from {known} tokens, and what is to be split now has "
                f"{length}, as many as a rank's shard. Split it once: of blocks that pass it on, name the first alone "
                "('blocks.0', not 'blocks.*')."
            )

    def _check_every_rank_has_some(self, name: str, tensor: Tensor, dim: int) -> None:
        """Raises AttentionProviderError where a rank would have no token of `name`, and gets no placeholder. All ranks
        judge by the whole length: the others would wait for the one in which the model's code fails."""
        length = self.lengths[name]
        if 0 < length < self.mesh.size and name not in self.replicated and name not in self.named:
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} is to be split along dimension {dim} over {self.mesh.size} ranks, and "
                f"'{name}' has a length of {length} there, too short for every rank to have a part. Use {length} "
                f"rank{'s' * (length > 1)} or fewer, or a larger size; or, in a plan of your own, name "
                "the sequence, CPInput(sequence=...): a rank without a token is then given a placeholder."
            )

    def _split_flattened(self, name: str | tuple[str, ...], tensor: Tensor, dim: int) -> Tensor:
        length = self._known_length(name) if isinstance(name, str) else 0
        if not length or tensor.shape[dim] % length:
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} is to have sequence {name!r} once for every sample in dimension {dim}, "
                f"and that is no multiple of its length. {self._known()[0].upper()}{self._known()[1:]}."
            )
        return self.split(name, tensor.unflatten(dim, (-1, length)), dim + 1).flatten(dim, dim + 1)

    def shard_length(self, name: str, length: int) -> int:
        """How much of the sequence `name`, which has `length` tokens, this rank's model sees."""
        if self.lengths.get(name) != length:
            block = self.blocks.get(name, 1)
            if block > 1 and (length % block or length < block * self.mesh.size):
                raise AttentionProviderError(
                    f"'{name}' has {length} tokens, and attention goes by blocks of {block}, of which every one of "
                    f"{self.mesh.size} ranks needs one. Give the model a size that divides into blocks, or use fewer "
                    "ranks."
                )
            self.lengths[name] = length
            self._calls = {}
        return self._seen((name,))

    def seen_length(self, name: str) -> int:
        """How many tokens of the sequence `name` this rank's model sees in the running forward."""
        return self._seen((name,))

    def global_length(self, name: str, seen: int) -> int:
        """The length of the sequence `name`, of which this rank's model sees so many tokens.

        Raises:
            AttentionProviderError: it sees another number of them. On all ranks, unless these see different ones.
        """
        length = self._known_length(name)
        if seen != self._seen((name,)):
            raise AttentionProviderError(
                f"a number of {seen} is to be the length of this rank's part of '{name}', which is "
                f"{self._seen((name,))}; {self._known()}. Was it made of what is split?"
            )
        return length

    def keep_blocks(self, name: str, size: int) -> None:
        """Has the sequence `name` split between blocks of `size` tokens only.

        Raises:
            AttentionProviderError: it has been split in another way.
        """
        if name in self.lengths and self.blocks.get(name, 1) != size:
            raise AttentionProviderError(
                f"'{name}' is to be split between blocks of {size} tokens, and was split before that was said. Give "
                'advanced.CPBlocks for an argument of the model, "", or of a module that runs before.'
            )
        self.check_in_order(name, "attention by blocks")
        self.blocks[name] = size

    def splits_blocks(self, names: tuple[str, ...]) -> bool:
        """Whether attention goes by blocks of one of these sequences, on more than one rank."""
        return self.mesh.size > 1 and any(name in self.blocks for name in names)

    def log_base(self, name: str, base: float) -> float:
        """The base to which the length of this rank's shard has the logarithm that the sequence's length has to `base`.

        Raises:
            AttentionProviderError: there is none, since some rank has a single token or none. On all ranks.
        """
        length, sizes = self._known_length(name), self.shards((name,)).sizes
        if self.mesh.size > 1 and min(sizes) < 2:
            raise AttentionProviderError(
                f"'{name}' has {length} tokens for {self.mesh.size} ranks, and this model's scores are scaled by the "
                "logarithm of how many a rank has, which tells nothing of one. Use fewer ranks."
            )
        return (
            base
            if self.mesh.size == 1
            else math.exp(math.log(base) * math.log(sizes[self.mesh.rank]) / math.log(length))
        )

    def gather(self, name: str | tuple[str, ...] | None, tensor: Tensor, dim: int) -> Tensor:
        """The whole of what has this rank's shard in dimension `dim`: of the sequence `name`, of several that are
        joined, or of the one that is so long."""
        if name is None:
            self._check_without_placeholders("a CPOutput")
            shards = self._by_length(tensor.shape[dim], [(name,) for name in self.lengths], "a CPOutput")
            if shards is None:
                raise AttentionProviderError(
                    f"a tensor {list(tensor.shape)} is to be gathered along dimension {dim}, and no sequence has "
                    f"{tensor.shape[dim]} tokens on rank {self.mesh.rank} ({self._known()}). Was it split?"
                )
            return sharding.gather(tensor, shards, dim, self.mesh).contiguous()
        names = (name,) if isinstance(name, str) else name
        for each in names:
            self._known_length(each)
        kept = self.kept(names)
        tensor = tensor if kept is None else kept.take_out(tensor, dim)
        shards = self.shards(names)
        if not self.others_seen and self._outer:
            return sharding.alone(tensor, shards, dim, self.mesh.rank)
        return sharding.gather(tensor, shards, dim, self.mesh).contiguous()  # models view what they compute

    def split_groups(self, name: str | tuple[str, ...], tensor: Tensor, dim: int) -> Tensor:
        """As `split`, where every entry of the sequence is several tokens. Raises AttentionProviderError where there
        are fewer entries than ranks, or no such tokens."""
        length = self._known_length(name) if isinstance(name, str) else 0
        if length < self.mesh.size or tensor.shape[dim] % length:
            raise AttentionProviderError(
                f"a tensor {list(tensor.shape)} is to have as many tokens for each of '{name}' in dimension {dim}, of "
                f"which every one of {self.mesh.size} ranks needs one; {self._known()}. Use fewer ranks."
            )
        dim %= tensor.ndim
        return self.split(name, tensor.unflatten(dim, (length, -1)), dim).flatten(dim, dim + 1)

    def gather_groups(self, name: str | tuple[str, ...] | None, tensor: Tensor, dim: int) -> Tensor:
        """As `gather`, of what `split_groups` split."""
        names = name if isinstance(name, tuple) else (name or "",)
        self._known_length(names[0])
        dim %= tensor.ndim
        groups = tensor.unflatten(dim, (self._seen(names), -1))
        return self.gather(name, groups, dim).flatten(dim, dim + 1)

    def shards(self, names: tuple[str, ...]) -> Shards:
        """Who holds what of these sequences, joined."""
        return Shards.joint(*[self._shards_of(name) for name in names] or [self._contiguous(0)])

    def _shards_of(self, name: str) -> Shards:
        if name in self.balanced:
            return Shards.zigzag(self.lengths[name], self.mesh.size)
        return self._contiguous(self.lengths[name], self.blocks.get(name, 1))

    def check_in_order(self, name: str, what: str) -> None:
        """Raises AttentionProviderError where ranks do not have one part each of this sequence, which `what` needs. On
        all ranks."""
        if name in self.balanced:
            raise AttentionProviderError(
                f"the plan splits '{name}' with balanced=True, a part of its front and one of its back for each rank, "
                f"and {what} needs it in order. Leave balanced out."
            )

    def _contiguous(self, length: int, block: int = 1) -> Shards:
        return Shards.contiguous(length, self.mesh.size, block)

    def kept(self, names: tuple[str, ...], prefix: int = 0) -> LocalTokens | None:
        """Which tokens of these sequences, joined as this rank's model sees them, are its own; None for all. Before
        them may be a `prefix` of so many tokens that every rank has whole."""
        spans = list(self._contiguous(prefix).spans[self.mesh.rank]) if prefix else []
        start, partial = prefix, prefix > 0
        for name in names:
            shards = self.shards((name,))
            if name in self.replicated:
                spans += [(start + first, count) for first, count in shards.spans[self.mesh.rank]]
                start, partial = start + self.lengths[name], True
            elif self._stands_in(name, self.mesh.rank):
                start, partial = start + 1, True
            else:
                spans.append((start, shards.sizes[self.mesh.rank]))
                start += shards.sizes[self.mesh.rank]
        return LocalTokens(start, tuple(spans)) if partial else None

    def present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these sequences that this forward has: a model may do without reference images."""
        return tuple(name for name in names if name in self.lengths)

    def _stands_in(self, name: str, rank: int) -> bool:
        if name in self.replicated or name not in self.named:
            return False
        return self.lengths[name] > 0 == self.shards((name,)).sizes[rank]

    def _seen(self, names: tuple[str, ...]) -> int:
        """How many tokens of these sequences this rank's model sees."""
        kept = self.kept(names)
        return self.shards(names).sizes[self.mesh.rank] if kept is None else kept.seen

    def _check_without_placeholders(self, what: str) -> None:
        """Lengths do not tell own tokens from placeholders, or from those that are whole. Raises AttentionProviderError
        on all ranks if one has any."""
        replicated = [name for name in self.lengths if name in self.replicated]
        if replicated:
            raise AttentionProviderError(
                f"every rank has all of '{replicated[0]}', and the plan does not say which sequences {what} is of. "
                "Name them: CPOutput(sequence=...), CPAttention((...))."
            )
        short = [name for name in self.lengths if self._stands_in(name, self.mesh.size - 1)]
        if short:
            raise AttentionProviderError(
                f"'{short[0]}' has {self.lengths[short[0]]} tokens for {self.mesh.size} ranks, and the plan does not "
                f"say which sequences {what} is of. Name them: CPOutput(sequence=...), CPAttention((...))."
            )

    def attention(self, query_len: int, key_len: int) -> SplitCall | None:
        """What the queries and keys of a call are shards of, from their lengths on this rank; None for a call that is
        complete on each rank, since nothing is split or its keys are whole. Without a role, keys are taken to be whole
        if no split sequences are as long and the queries are others.

        Raises:
            AttentionProviderError: the lengths fit nothing, or more than one thing.
        """
        if not self.is_split:
            return None
        self._note()
        if torch.compiler.is_compiling():
            return self._attention(query_len, key_len)
        # Every layer asks the same.
        signature = self.role, query_len, key_len
        if signature not in self._calls:
            if self.is_over():
                active.tracker = None
                return None
            try:
                self._calls[signature] = self._attention(query_len, key_len)
            except AttentionProviderError as error:
                raise AttentionProviderError(f"{error} The call is made by {active_module()}.") from None
        return self._calls[signature]

    def splits_queries(self, query_len: int, key_len: int) -> bool:
        """Whether the queries are shards of a call of which `attention` says that it is complete on each rank."""
        if not self.is_split:
            return False
        if self.role is not None:
            names = self.present(self.role.query)
            return bool(names) and query_len == self._seen(names) and not (self.role.key and query_len == key_len)
        return self._by_length(query_len, self._joins(), "the queries of an attention call") is not None

    def _joins(self) -> list[tuple[str, ...]]:
        """All ways to join sequences, in their order."""
        counts = range(1, len(self.lengths) + 1)
        return [names for count in counts for names in itertools.combinations(self.lengths, count)]

    def _attention(self, query_len: int, key_len: int) -> SplitCall | None:
        if self.role is not None:
            query, key = self.present(self.role.query), self.present(self.role.key)
            role = self.role._replace(query=query, key=key)
            if role == self.role or (query and key and (query_len, key_len) == (self._seen(query), self._seen(key))):
                return self._by_role(role, query_len, key_len)
        self._check_without_placeholders("an attention call")
        joins = self._joins()
        queries = self._by_length(query_len, joins, "the queries of an attention call")
        keys = self._by_length(key_len, joins, "the keys of an attention call")
        if queries is not None and keys is not None:
            tracker = [self.shards((name,)) for name in self.lengths]
            in_order = all(
                shards in tracker or all(len(spans) == 1 for spans in shards.spans) for shards in (queries, keys)
            )
            return SplitCall(queries, keys, in_order)
        if keys is None and query_len != key_len:
            return None
        raise self._mixed(query_len, key_len)

    def _by_role(self, role: Role, query_len: int, key_len: int) -> SplitCall | None:
        if not role.key:
            return None
        if role.prefix is not None:
            return self._behind_prefix(role, self.lengths.get(role.prefix, 0), query_len, key_len)
        queries, keys = self.shards(role.query), self.shards(role.key)
        if (query_len, key_len) == (self._seen(role.query), self._seen(role.key)):
            return SplitCall(queries, keys, True)
        if query_len != key_len:
            return None
        raise self._mixed(query_len, key_len)

    def _behind_prefix(self, role: Role, known: int, query_len: int, key_len: int) -> SplitCall | None:
        """Of keys after some that are whole: so many that are `known` of a sequence, or more that are in a cache."""
        prefix = key_len - self._seen(role.key)
        if query_len == self._seen(role.query) and prefix >= known:
            keys = Shards.joint(self._contiguous(prefix), *[self.shards((name,)) for name in role.key])
            return SplitCall(self.shards(role.query), keys, True)
        if key_len <= known:
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
        candidates = [self.shards(names) for names in joins]
        found = [shards for shards in candidates if shards.sizes[self.mesh.rank] == length]
        if not found:
            return None
        known = found[-1].sizes
        for sizes in [shards.sizes for shards in candidates]:
            if not equal(sizes, known) and any(one == other for one, other in zip(sizes, known)):
                raise AttentionProviderError(
                    f"{what}, {length} tokens on rank {self.mesh.rank}, could be shards of {sum(known)} tokens or "
                    f"of {sum(sizes)} ({self._known()}). Say in the plan which: name the sequences (sequence='text') "
                    "of CPInput and CPOutput, and give the attention modules' with CPAttention."
                )
        return found[-1]

    def _known_length(self, name: str) -> int:
        if name not in self.lengths:
            raise AttentionProviderError(
                f"no tensor of sequence '{name}' has been split before it is gathered or joined: {self._known()}."
            )
        return self.lengths[name]

    def _known(self) -> str:
        lengths = ", ".join(f"{name}: {length}" for name, length in self.lengths.items())
        return f"split in this forward are {lengths or 'none'}"


def _has_returned(frame: FrameType | None) -> bool:
    """Whether the function that ran in `frame` has returned, or was left by an error. Its variables are gone then."""
    if frame is None:
        return False
    try:
        frame.clear()
    except RuntimeError:  # "cannot clear an executing frame"
        return False
    return True


def _has_contiguous_strides(tensor: Tensor) -> bool:
    """`is_contiguous` for a compiler, which also looks at the strides of dimensions with one entry."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True
