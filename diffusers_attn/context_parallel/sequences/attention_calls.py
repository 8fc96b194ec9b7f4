"""Which shards the queries and keys of an attention call are."""

from __future__ import annotations

import torch

from ...errors import AttentionProviderError
from .active import active
from .find_by_length import check_lengths_suffice, find_by_length, joins
from .forwards import RunningForwards
from .module_names import active_module
from .roles import Role, SplitCall
from .sharding import Shards


class AttentionCalls(RunningForwards):
    """Finds the sequences of a call: by the role of the module that makes it, or else by its lengths."""

    def attention(self, query_len: int, key_len: int) -> SplitCall | None:
        """The shards of the queries and keys of a call.

        Args:
            query_len, key_len: tokens on this rank.

        Returns:
            None for a call that is complete on each rank: nothing is split, or its keys are replicated. Without a role,
            keys count as replicated if no sequences have their length, and the queries have another.

        Raises:
            AttentionProviderError: the lengths fit nothing, or more than one thing.
        """
        if not self.is_split:
            return None
        self.note_attention()
        if torch.compiler.is_compiling():
            return self._attention(query_len, key_len)
        signature = self.role, query_len, key_len  # the same for many layers
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
        """Whether the queries are shards, in a call that is complete on each rank according to `attention`."""
        if not self.is_split:
            return False
        if self.role is not None:
            names = self.present(self.role.query)
            return (
                bool(names) and query_len == self.local_length(names) and not (self.role.key and query_len == key_len)
            )
        return self._by_length(query_len, "the queries of an attention call") is not None

    def _by_length(self, length: int, what: str) -> Shards | None:
        return find_by_length(self, length, joins(tuple(self.lengths)), what)

    def _attention(self, query_len: int, key_len: int) -> SplitCall | None:
        if self.role is not None:
            query, key = self.present(self.role.query), self.present(self.role.key)
            role = self.role._replace(query=query, key=key)
            lengths = query_len, key_len
            if role == self.role or (query and key and lengths == (self.local_length(query), self.local_length(key))):
                return self._by_role(role, query_len, key_len)
        check_lengths_suffice(self, "an attention call")
        queries = self._by_length(query_len, "the queries of an attention call")
        keys = self._by_length(key_len, "the keys of an attention call")
        if queries is not None and keys is not None:
            single = [self.shards((name,)) for name in self.lengths]
            in_order = all(
                shards in single or all(len(spans) == 1 for spans in shards.spans) for shards in (queries, keys)
            )
            return SplitCall(queries, keys, in_order)
        if keys is None and query_len != key_len:
            return None
        raise self._mixed(query_len, key_len)

    def _by_role(self, role: Role, query_len: int, key_len: int) -> SplitCall | None:
        if not role.key:
            return None
        if role.prefix is not None:
            return self._after_prefix(role, self.lengths.get(role.prefix, 0), query_len, key_len)
        queries, keys = self.shards(role.query), self.shards(role.key)
        if (query_len, key_len) == (self.local_length(role.query), self.local_length(role.key)):
            return SplitCall(queries, keys, True)
        if query_len != key_len or self._may_have_shards_as_keys(role.query, query_len, key_len):
            return None
        raise self._mixed(query_len, key_len)

    def keys_to_compare(self, query_len: int, key_len: int) -> bool:
        """Whether ranks must compare the keys of a call that is complete on each rank according to `attention`.

        Without a role, always: only their length says that they are replicated. With a role, where the keys might be
        shards as well, such as the four keys of an IP-Adapter in a model with four tokens on some rank. All ranks give
        the same answer.
        """
        if self.role is None:
            return True
        query = self.present(self.role.query)
        return bool(self.role.key) and self._may_have_shards_as_keys(query, query_len, key_len)

    def _may_have_shards_as_keys(self, names: tuple[str, ...], query_len: int, key_len: int) -> bool:
        """Whether the queries are shards of some of these sequences, and the keys, on some rank, as many as these."""
        return any(
            query_len == self.local_length(join) and key_len in self.local_lengths(join)
            for join in joins(names)
            if join != names
        )

    def _after_prefix(self, role: Role, known: int, query_len: int, key_len: int) -> SplitCall | None:
        """A call whose first keys are replicated: `known` keys of a sequence, or more from a cache."""
        prefix = key_len - self.local_length(role.key)
        if query_len == self.local_length(role.query) and prefix >= known:
            keys = Shards.joint(self.contiguous(prefix), *[self.shards((name,)) for name in role.key])
            return SplitCall(self.shards(role.query), keys, True)
        if key_len <= known:
            return None
        raise self._mixed(query_len, key_len)

    def _mixed(self, query_len: int, key_len: int) -> AttentionProviderError:
        return AttentionProviderError(
            f"an attention call has {query_len} queries and {key_len} keys on rank {self.mesh.rank}, which is a mix of "
            f"tokens that are split and tokens that are replicated ({self.describe()}). Split every tensor that its "
            "queries and keys come from; or, if all of them are replicated, give the module CPAttention((), key=())."
        )
