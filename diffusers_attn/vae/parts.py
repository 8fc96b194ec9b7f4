"""The `forward` of a VAE's encoder or decoder, split by rows over ranks.

All work between latents and pixels is in these two modules. What a VAE does around them (tiles and their blending,
slices of a batch, the loop over frames, quantisation layers) runs on every rank as in one process: each tile and each
frame is split, and gathered at once. Features that a causal VAE keeps between frames stay split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..context_parallel.comm import one_thread, rank_progress
from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.group import Group
from ..context_parallel.comm.process_groups import resolve
from ..errors import AttentionProviderError
from ..nested import updated
from ..tracing.export import refuse_export
from . import attend, convolution, functions, matmul, norms, shortcuts, views  # noqa: F401  (register their rules)
from .row_split import RowSplit
from .rows import Rows, spread
from .team import Team


class SplitForward:
    """Replaces the `forward` of an encoder or decoder.

    Args:
        module: the encoder or decoder.
        name: its name for errors, such as "decoder of AutoencoderKLWan".
        axes: groups of the ranks that share the work.
        unit: number of rows that must stay on one rank, such as the rows of an image that become one row of latents.
        broadcast: whether all ranks use the first rank's image or latents.
        compare: a fingerprint of a tensor's values. If it is given, values that differ between ranks are an error.
        required: whether a forward that records gradients is an error. Otherwise every rank computes it in full.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        axes: tuple[Group, ...],
        unit: int,
        *,
        required: bool,
        broadcast: bool = True,
        compare: Callable[[Tensor], str] | None = None,
    ) -> None:
        self.module, self.name, self.axes, self.unit = module, name, axes, unit
        self.required, self.broadcast, self.compare = required, broadcast, compare
        self.before = module.forward
        self.had_own = "forward" in vars(module)
        self.is_on = True
        self._run = torch.compiler.disable(self._run_eagerly)

    def attach(self) -> None:
        """Replaces the module's forward."""
        vars(self.module)["forward"] = self

    def detach(self) -> None:
        """Restores the module's forward. If another tool has wrapped this one since, it passes calls on."""
        self.is_on = False
        if vars(self.module).get("forward") is self:
            if self.had_own:
                vars(self.module)["forward"] = self.before
            else:
                del vars(self.module)["forward"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.before,)  # copies of the module are not split

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_on:
            return self.before(*args, **kwargs)
        refuse_export(f"the {self.name}", "its rows are split", "Call unsplit_vae (or disable_context_parallel)")
        return self._run(*args, **kwargs)

    __code__ = __call__.__code__  # torch.export names a graph by the code of a module's forward

    def _run_eagerly(self, *args: Any, **kwargs: Any) -> Any:
        place, sample = _sample(args, kwargs)
        if sample is None or isinstance(sample, RowSplit) or sample.ndim not in (4, 5):
            return self.before(*args, **kwargs)
        ranks = Team(self.axes, 1).size
        units = sample.shape[-2] // self.unit
        shards = min(ranks, units)
        if shards < 2 or self._records_gradients(sample):
            return self.before(*args, **kwargs)
        team = Team(self.axes, shards)
        one_thread.take([axis.name for axis in self.axes], self.module)
        sample = self._same_on_all_ranks(sample.detach(), team)
        dim = sample.ndim - 2
        rows = Rows(dim, spread(sample.shape[dim], shards, self.unit))
        own = sample.narrow(dim, rows.bounds[team.shard], rows.count(team.shard)).contiguous()
        split = RowSplit(own, rows, team)
        if isinstance(place, int):
            args = (*args[:place], split, *args[place + 1 :])
        else:
            kwargs[place] = split
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled blocks cannot take such tensors
            return _gathered(self.before(*args, **kwargs))

    def _records_gradients(self, sample: Tensor) -> bool:
        records = torch.is_grad_enabled() and (
            sample.requires_grad or any(each.requires_grad for each in self.module.parameters())
        )
        if records and self.required:
            raise AttentionProviderError(
                f"the {self.name} is split over ranks, which records no gradients. Call it under torch.no_grad(), or "
                "pass split_vae=False to enable_context_parallel to train with it."
            )
        return records

    def _same_on_all_ranks(self, sample: Tensor, team: Team) -> Tensor:
        """The image or latents, equal on all ranks. Hosts compare shapes while devices go on computing."""
        rank_progress.note(f"the {self.name}")
        call = f"{self.name} of {tuple(sample.shape)}, {sample.dtype}"
        if self.compare is not None:
            call += f", values {self.compare(sample)}"
        found = everyone(call, [resolve(axis.name) for axis in self.axes])
        if len(set(found)) > 1:
            listed = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(found))
            raise AttentionProviderError(
                f"the ranks called the VAE with different inputs. {listed}. Call it in the same way on all ranks."
            )
        return team.first(sample) if self.broadcast else sample


def _same(value: Any) -> Any:
    return value


def _sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor | None]:
    """The image or the latents among the arguments of an encoder or decoder: the first tensor."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in given:
        if isinstance(value, Tensor):
            return place, value
    return 0, None


def _gathered(out: Any) -> Any:
    """The result with full tensors. Lists and plain dicts are caches, which stay split."""
    if isinstance(out, RowSplit):
        return out.full()
    if isinstance(out, tuple):
        return tuple(_gathered(each) for each in out)
    if isinstance(out, Mapping) and type(out) is not dict:
        return updated(out, {name: _gathered(each) for name, each in out.items()})
    return out
