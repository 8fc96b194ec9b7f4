"""Norms over rows: mean and variance of the full image, from those of each shard."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .row_split import FUNCTIONS, RowSplit
from .unsplittable import unsplittable

_MOST = 2**25
"""Elements that are converted to float32 at once."""


def group_norm(
    input: RowSplit, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    """`F.group_norm` of a tensor that is split in a dimension after the channels."""
    if not isinstance(input, RowSplit) or input.rows.dim == 1:
        raise unsplittable("a group norm over split channels")
    if input.rows.dim == 0:
        return input.like(F.group_norm(input.local, num_groups, weight, bias, eps))
    split = input.without_halo().populated("a group norm")
    rows, team = split.rows, split.team
    local = split.local.contiguous()
    if torch.is_autocast_enabled(local.device.type):  # which may choose another dtype for this norm
        local = local.to(F.group_norm(local.flatten(2)[..., :1], num_groups, weight, bias, eps).dtype)
    batch, channels = local.shape[:2]
    mean, spread = _moments(local.view(batch * num_groups, -1))
    means, spreads = team.gather(torch.stack([mean, spread])).unbind(1)
    # Chan's formula merges means and variances without the cancellation of E[x^2] - E[x]^2.
    share = _shares(rows.bounds, means.dtype, means.device)
    mean = (means * share).sum(0)
    variance = ((spreads + (means - mean).square()) * share).sum(0)

    def of_channels(values: Tensor) -> Tensor:
        return values.view(batch, num_groups, 1).expand(-1, -1, channels // num_groups).reshape(-1)

    def of_batch(values: Tensor | None, default: float) -> Tensor:
        return mean.new_full((batch * channels,), default) if values is None else values.to(mean.dtype).repeat(batch)

    # A batch norm with given statistics computes in their dtype and writes in that of its input, in one kernel.
    out = F.batch_norm(
        local.view(1, batch * channels, -1), of_channels(mean), of_channels(variance), of_batch(weight, 1.0),
        of_batch(bias, 0.0), False, 0.0, eps,
    )  # fmt: skip
    return split.like(out.view(local.shape))


@functools.lru_cache(maxsize=256)
def _shares(bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Each shard's share of the rows, `[shards, 1]`. Kept, since a copy from the host would wait."""
    counts = [end - start for start, end in itertools.pairwise(bounds)]
    return torch.tensor(counts, dtype=dtype, device=device).div_(bounds[-1]).unsqueeze(1)


def _moments(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each row of `groups`, in float32 at least."""
    wide = torch.promote_types(groups.dtype, torch.float32)
    parts = groups.split(max(1, _MOST // max(1, groups.shape[1])))
    found = [torch.var_mean(part.to(wide), dim=1, correction=0) for part in parts]
    variance, mean = (torch.cat(each) for each in zip(*found))
    return mean, variance


def _instance_norm(
    input: RowSplit,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if use_input_stats:
        return group_norm(input, input.shape[1], weight, bias, eps)
    return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _batch_norm(
    input: RowSplit,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or input.rows.dim == 1:
        raise unsplittable("a batch norm in training (call vae.eval())")
    return input.like(F.batch_norm(input.local, running_mean, running_var, weight, bias, False, momentum, eps))


FUNCTIONS[F.group_norm] = group_norm
FUNCTIONS[F.instance_norm] = _instance_norm
FUNCTIONS[F.batch_norm] = _batch_norm
