"""The pipeline: loaded, and its parts put where they are needed and taken away where not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import TrainingError
from .families import family_class
from .flag_names import option


def load_pipeline(model: str, *, revision: str | None, dtype: torch.dtype, ranks: Any, local_main: bool) -> Any:
    """A pipeline of diffusers, on the CPU, in evaluation mode. The VAE is float32 always: it runs once per example.

    Args:
        model: a folder, or a name on the Hub.
        dtype: of transformer and text encoders.
        ranks: all processes; of each machine's, the one with `local_main` downloads first.

    Raises:
        TrainingError: it cannot be loaded, has no transformer, or is of a class that is not trained; the last before
            any weights are read.
    """
    from diffusers import DiffusionPipeline

    def load() -> Any:
        _check_class(model, revision)
        return DiffusionPipeline.from_pretrained(
            model, revision=revision, dtype={"vae": torch.float32, "default": dtype}
        )

    pipeline, problem = None, None
    for turn in (True, False):
        if turn == local_main:
            try:
                pipeline = load()
            except (OSError, ValueError) as error:  # of which TrainingError is one
                problem = error
        if ranks.any(problem is not None):  # and nobody waits for one that is not coming
            if isinstance(problem, TrainingError):
                raise problem
            raise TrainingError(
                f"{option('model', model)} cannot be loaded: {problem or 'see the other processes'}"
            ) from problem
    assert pipeline is not None
    if not isinstance(getattr(pipeline, "transformer", None), nn.Module):
        raise TrainingError(
            f"{option('model', model)} is a {type(pipeline).__name__}, which has no transformer to train."
        )
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_class(model: str, revision: str | None) -> None:
    """Raises TrainingError where the pipeline's index names classes that are not trained. Reads no weights."""
    import diffusers

    index: dict[str, Any] = diffusers.DiffusionPipeline.load_config(model, revision=revision)
    name, transformer = index.get("_class_name"), index.get("transformer")
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline is not None and isinstance(transformer, (list, tuple)) and isinstance(transformer[-1], str):
        family = family_class(pipeline, transformer[-1])
        parts = {name: each for name, each in index.items() if isinstance(each, (list, tuple))}
        family.check_components({name: each[-1] is not None for name, each in parts.items()})


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Those of a pipeline, by the names of its components."""
    return {
        name: each
        for name, each in pipeline.components.items()
        if name.startswith("text_encoder") and isinstance(each, nn.Module)
    }


def drop_text_encoders(pipeline: Any) -> None:
    """Frees their memory. The pipeline is called with embeddings from then on."""
    for name in text_encoders(pipeline):
        setattr(pipeline, name, None)


@contextmanager
def placed(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Within, they are on `device`; then on the CPU again."""
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def decoding_in_its_dtype(vae: Any) -> Iterator[None]:
    """Within, a VAE decodes latents of another dtype in its own: not all pipelines see to that."""
    decode = vae.decode
    vae.decode = lambda latents, *args, **kwargs: decode(latents.to(vae.dtype), *args, **kwargs)
    try:
        yield
    finally:
        del vae.decode


def fingerprint(module: nn.Module, rounded: bool = False) -> str:
    """Of a model's weights: of the beginning of each tensor, which another model or a fine-tuned one has otherwise.

    Args:
        rounded: to bfloat16, so that the same weights in float32 and in bfloat16 have one fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        beginning = tensor.detach().flatten()[:256].to("cpu", torch.float32)
        dtype: Any = tensor.dtype
        if rounded and tensor.is_floating_point():
            beginning, dtype = beginning.bfloat16().float(), "rounded"
        digest.update(f"{name} {list(tensor.shape)} {dtype}".encode())
        digest.update(beginning.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
