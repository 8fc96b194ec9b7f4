"""One provider's attention to the keys that are at hand, on `[batch, seq, heads, head_dim]`.

Either complete and differentiable, or as a part: the output with its log-sum-exp, and the gradients from the output and
log-sum-exp of all parts. The same decisions and lowerings serve a part as serve a whole call.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ... import masks
from ...masks import MaskKind
from ...providers import catalog, lowering, registry, speeds
from ...providers.base import Params
from ...providers.catalog import SPECS
from ...providers.decision import decide
from ...providers.serving import AttentionCall, Serving
from ...tracing.symbolic import constant
from ..comm.collectives import depends_on
from ..sequences.block_masks import block_mask


class PartialKernel(NamedTuple):
    """A provider, with all that is the same for every part of a call. Plain values only."""

    provider: str
    options: tuple[tuple[str, object], ...] = ()
    scale: float | None = None
    """of the scores; None is `head_dim ** -0.5`."""
    needs_grad: bool = False
    block: int = 1
    """tokens, of queries as of keys, that an entry of a mask stands for."""
    by_place: tuple[str, ...] = ()
    """the options that depend on places in the sequence, so that a part of a sequence does not do."""

    def check(
        self, query: Tensor, key: Tensor, value: Tensor, mask_kind: MaskKind, is_causal: bool, partial: bool
    ) -> None:
        """Whether this provider serves such a call; `partial` where it is one of several, over parts of the keys.

        It looks at nothing in which ranks differ, so that all of them refuse or none, before data moves.

        Raises:
            AttentionProviderError: it does not.
        """
        self._plan(query, key, value, mask_kind, is_causal, "equal", partial)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Complete, differentiable attention."""
        if query.numel() == 0 or key.numel() == 0:
            # A product, so that gradients flow here as they do on ranks that have something to compute.
            sums = query.sum(dim=-1, keepdim=True) * key.sum(dim=(1, 2, 3), keepdim=True)
            return depends_on(sums * value.sum(dim=(1, 2), keepdim=True) * 0.0, mask)
        kind, mask = self._classify(query, key, self._by_token(mask))
        plan = self._plan(query, key, value, kind, is_causal, self._query_len(query, key, is_causal), False)
        params = self._params(query, key, plan, is_causal)
        adapter = registry.ADAPTERS[plan.provider]
        query, key, value = _transposed(plan, query, key, value)
        if plan.lowers:
            out = lowering.attention(query, key, value, mask, adapter=adapter, plan=plan, params=params)
        else:
            out = adapter.attention(query, key, value, mask, params=params)
        return _transposed(plan, out)[0]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Output `[batch, query_len, heads, value_head_dim]` and lse `[batch, query_len, heads]` over these keys.

        Args:
            mask: broadcastable to `[batch, heads, query_len, key_len]`, or None.
            is_causal: only for equal lengths.
        """
        if query.numel() == 0 or key.numel() == 0:
            wide = torch.promote_types(query.dtype, torch.float32)
            out = value.new_zeros(*query.shape[:3], value.shape[-1])
            lse = query.new_full(query.shape[:3], -math.inf, dtype=wide)
            return depends_on(out, key, value, mask), lse
        plan, mask, params = self._lower(query, key, value, mask, is_causal)
        value_dim = value.shape[-1]
        key, value = _repeated(plan, query, key, value)
        query, key, value = _transposed(plan, *_padded(plan, query, key, value))
        out, lse = registry.ADAPTERS[plan.provider].forward(query, key, value, mask, params)
        return _transposed(plan, out)[0][..., :value_dim], lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """These keys' share of the gradients of query, key and value; `out` and `lse` are those over all keys."""
        if query.numel() == 0 or key.numel() == 0:
            return (
                depends_on(torch.zeros_like(query), key, value, mask),
                depends_on(torch.zeros_like(key), grad_out, key),
                depends_on(torch.zeros_like(value), grad_out, value),
            )
        plan, mask, params = self._lower(query, key, value, mask, is_causal)
        kv_heads, query_dim, value_dim = key.shape[2], query.shape[-1], value.shape[-1]
        key, value = _repeated(plan, query, key, value)
        grad_out, query, key, value, out = _transposed(plan, *_padded(plan, grad_out, query, key, value, out))
        adapter = registry.ADAPTERS[plan.provider]
        grads = adapter.backward(grad_out, query, key, value, mask, out, lse, params)
        grad_query, grad_key, grad_value = _transposed(plan, *grads)
        if plan.repeat_kv:
            grad_key, grad_value = (grad.unflatten(2, (kv_heads, -1)).sum(dim=3) for grad in (grad_key, grad_value))
        return grad_query[..., :query_dim], grad_key[..., :query_dim], grad_value[..., :value_dim]

    def _lower(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Serving, Tensor | None, Params]:
        kind, mask = self._classify(query, key, self._by_token(mask))
        plan = self._plan(query, key, value, kind, is_causal, self._query_len(query, key, is_causal), True)
        if plan.causal == "mask":
            mask, is_causal = masks.and_causal(mask, query.shape[1], key.shape[1]), False
        return plan, mask, self._params(query, key, plan, is_causal)

    @property
    def block_kind(self) -> MaskKind:
        """As what this provider is given a mask by blocks. "auto" finds who takes it as what it is: token by token, a
        sequence that is worth choosing blocks of would need more memory than there is."""
        by_block = self.provider == "auto" or MaskKind.BLOCK in SPECS[self.provider].capabilities.masks
        return MaskKind.BLOCK if by_block else MaskKind.DENSE

    def _by_token(self, mask: Tensor | None) -> Any:
        """A mask by blocks as this provider takes it; any other as it is."""
        if mask is None or self.block == 1:
            return mask
        if self.block_kind == MaskKind.BLOCK:
            return block_mask(mask, self.block)
        return mask.repeat_interleave(self.block, dim=-2).repeat_interleave(self.block, dim=-1)

    def _classify(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[MaskKind, Any]:
        return masks.classify(mask, query.shape[0], query.shape[2], query.shape[1], key.shape[1])

    def _plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_kind: MaskKind,
        is_causal: bool,
        query_len: str,
        partial: bool,
    ) -> Serving:
        # Only "auto" asks which kernels are fast.
        long = True if self.provider == "auto" and key.shape[1] >= speeds.LONG else False
        call = (
            query.device, query.dtype, constant(query.shape[-1]), constant(value.shape[-1]), constant(query.shape[2]),
            constant(key.shape[2]), query_len, long, mask_kind, is_causal, False, self.needs_grad, False, self.options,
            partial,
        )  # fmt: skip
        return Serving(*_decide(self.provider, *call))

    def _query_len(self, query: Tensor, key: Tensor, is_causal: bool) -> str:
        """The query's length against the key's, where it matters. Where it does not it is not looked at: of uneven
        shards a rank's is longer than another's or not, by what remains, and each would be a graph."""
        return _compare(query, key) if is_causal or self.options else "equal"

    def _params(self, query: Tensor, key: Tensor, plan: Serving, is_causal: bool) -> Params:
        return Params(
            mask_kind=plan.mask_kind,
            is_causal=is_causal,
            scale=float(query.shape[-1]) ** -0.5 if self.scale is None else self.scale,
            default_scale=self.scale is None and not plan.pad_head_dim,
            dropout_p=0.0,
            gqa=query.shape[2] != key.shape[2] and not plan.repeat_kv,
            device_type=query.device.type,
            options=self.options,
            needs_grad=self.needs_grad,
        )


@torch._dynamo.assume_constant_result
def options_by_place(provider: str, options: tuple[tuple[str, object], ...]) -> tuple[str, ...]:
    """As that of the catalog, also while a compiler traces."""
    return catalog.options_by_place(provider, options)


# Dynamo calls this while tracing and takes its result, plain values, as constants. It would look through a cache.
@torch._dynamo.assume_constant_result
def _decide(provider: str, *call: Any) -> tuple[Any, ...]:
    return _decided(provider, *call)


@functools.lru_cache(maxsize=1024)
def _decided(provider: str, *call: Any) -> tuple[Any, ...]:
    """In eager mode every part of every layer's call asks again."""
    return tuple(decide(provider, AttentionCall(*call)))


def _compare(query: Tensor, key: Tensor) -> str:
    if query.shape[1] == key.shape[1]:
        return "equal"
    return "shorter" if query.shape[1] < key.shape[1] else "longer"


def _transposed(plan: Serving, *tensors: Tensor) -> list[Tensor]:
    """To the kernel's layout, or back from it."""
    return [tensor.transpose(1, 2) if plan.layout == "bhsd" else tensor for tensor in tensors]


def _padded(plan: Serving, *tensors: Tensor) -> list[Tensor]:
    """With head_dim filled up with zeros to what the kernel takes."""
    if not plan.pad_head_dim:
        return list(tensors)
    return [pad(tensor, (0, plan.pad_head_dim - tensor.shape[-1])) for tensor in tensors]


def _repeated(plan: Serving, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as the query, for a kernel that needs them so."""
    if not plan.repeat_kv:
        return key, value
    groups = query.shape[2] // key.shape[2]
    return key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
