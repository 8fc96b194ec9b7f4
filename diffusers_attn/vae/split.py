"""Splits a VAE over ranks (`split_vae`), and undoes it (`unsplit_vae`)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..context_parallel import job
from ..context_parallel.comm.group import Group
from ..context_parallel.comm.shared_groups import Lease
from ..context_parallel.mesh import ContextParallelMesh
from ..errors import AttentionProviderError
from .parts import SplitForward
from .row_unit import row_unit

SplitVae = bool | Literal["auto"]
"""Whether a pipeline's VAEs are split. "auto": those of `VIDEO_VAES` are."""

VIDEO_VAES = (
    "AutoencoderKLAllegro",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLCosmos",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMagvit",
    "AutoencoderKLMochi",
    "AutoencoderKLTemporalDecoder",
    "AutoencoderKLWan",
)
"""Classes that "auto" splits. They take seconds for a video, and tests hold them to the result of one process. An image
is decoded in some tens of milliseconds, of which the exchanges between layers would take a part."""


class VaeTarget(NamedTuple):
    """A VAE to split."""

    name: str
    """Name of the pipeline's component, with its class; for a single VAE, its class."""
    vae: nn.Module
    parts: tuple[str, ...]
    """Names of the modules to split: "encoder", "decoder" or both."""


class _Split(NamedTuple):
    """The changes made to one VAE. Holds no reference to the VAE itself, which would keep it alive."""

    parts: list[SplitForward]
    lease: Lease


_split: weakref.WeakKeyDictionary[nn.Module, _Split] = weakref.WeakKeyDictionary()


def split_vae(vae: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Splits the encoder and decoder of a diffusers VAE by rows over ranks. All these ranks must call it.

    Afterwards `vae.encode` and `vae.decode` return on every rank what they return in one process, up to rounding, in a
    share of the time and of the memory for activations. All ranks must call them, in the same order and with inputs of
    the same shape; the values are those of the first rank. Calls that record gradients are an error. `unsplit_vae`
    undoes this.

    Args:
        vae: an autoencoder of images or videos, on its device, whose modules `encoder` and `decoder` have inputs
            `[batch, channels, height, width]` or `[batch, channels, frames, height, width]`.
        mesh: the ranks that share the work: one dimension, or two named "ring" and "ulysses". None: all ranks.

    Raises:
        AttentionProviderError: the VAE cannot be split, or is split already.
    """
    target = check(VaeTarget(type(vae).__name__, vae, parts_of(vae, auto=False)))
    if not target.parts:
        raise AttentionProviderError(
            f"{type(vae).__name__} is no VAE of images or videos: it has no module 'encoder' or 'decoder' with "
            "convolutions of two or three dimensions."
        )
    parameter = next(vae.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    job.join(device)
    if mesh is None:
        axes = [Group(dist.group.WORLD.group_name, dist.get_rank(), dist.get_world_size())]  # type: ignore[union-attr]
    else:
        groups = ContextParallelMesh.from_mesh(mesh)
        axes = [group for group in (groups.ring, groups.ulysses) if group.size > 1]
    attach(target, axes, Lease(), required=True)


def unsplit_vae(vae: nn.Module) -> None:
    """Undoes `split_vae`. Does nothing if the VAE is not split."""
    split = _split.pop(vae, None)
    if split is not None:
        for part in split.parts:
            part.detach()
        split.lease.close()


def attach(
    target: VaeTarget,
    axes: Sequence[Group],
    lease: Lease,
    *,
    required: bool,
    broadcast: bool = True,
    compare: Callable[[Tensor], str] | None = None,
) -> None:
    """Splits a VAE; see `SplitForward` for the arguments.

    Args:
        target: the VAE.
        axes: groups of the ranks that share the work, of more than one rank each.
        lease: holds these groups.
        required, broadcast, compare: see `SplitForward`.
    """
    if not axes:
        return
    split = _split[target.vae] = _Split([], lease.another())
    for part in target.parts:
        forward = SplitForward(
            getattr(target.vae, part),
            f"{part} of {target.name}",
            tuple(axes),
            row_unit(target.vae) if part == "encoder" else 1,
            required=required,
            broadcast=broadcast,
            compare=compare,
        )
        forward.attach()
        split.parts.append(forward)


def check(target: VaeTarget) -> VaeTarget:
    """`target`. Raises AttentionProviderError if it is split already."""
    if target.vae in _split:
        raise AttentionProviderError(
            f"{target.name} is split by rows already. Call disable_context_parallel of its pipeline, or unsplit_vae, "
            "first."
        )
    return target


def find_vaes(components: Mapping[str, Any], choice: SplitVae) -> list[VaeTarget]:
    """The VAEs of a pipeline to split.

    Args:
        components: the pipeline's components by name.
        choice: see `SplitVae`.

    Raises:
        AttentionProviderError: `choice` is none of the accepted, or it is True and there is no VAE.
    """
    if not isinstance(choice, bool) and choice != "auto":
        raise AttentionProviderError(f"split_vae={choice!r}: True, False and 'auto' are accepted.")
    if choice is False:
        return []
    found: dict[int, VaeTarget] = {}
    for name, vae in components.items():
        if isinstance(vae, nn.Module) and _is_autoencoder(vae):
            parts = parts_of(vae, auto=choice == "auto")
            if parts:
                found.setdefault(id(vae), check(VaeTarget(f"{name} ({type(vae).__name__})", vae, parts)))
    if choice is True and not found:
        listed = ", ".join(f"{name} ({type(each).__name__})" for name, each in components.items()) or "no components"
        raise AttentionProviderError(
            f"split_vae=True, but there is no VAE of images or videos among {listed}. Leave split_vae out, give a "
            "pipeline, or call split_vae(vae)."
        )
    return list(found.values())


def parts_of(vae: nn.Module, *, auto: bool) -> tuple[str, ...]:
    """Names of the modules of a VAE that can be split; with `auto`, those where it pays."""
    names = {cls.__name__ for cls in type(vae).__mro__}
    if "Audio" in type(vae).__name__ or (auto and names.isdisjoint(VIDEO_VAES)):
        return ()
    kinds = (nn.Conv3d,) if auto else (nn.Conv2d, nn.Conv3d)
    halves = {name: getattr(vae, name, None) for name in ("encoder", "decoder")}
    return tuple(
        name
        for name, half in halves.items()
        if isinstance(half, nn.Module) and any(isinstance(each, kinds) for each in half.modules())
    )


def _is_autoencoder(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("diffusers.models.autoencoders.") for cls in type(module).__mro__)
