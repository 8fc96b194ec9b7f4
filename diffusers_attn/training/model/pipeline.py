"""Loading the pipeline, and moving its models between devices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...safetensors_only import from_safetensors
from ..errors import TrainingError
from ..families import family_class
from ..settings.flag_names import option
from .base_precision import inner_tensors, load_transformer, pipeline_quantisation


def load_pipeline(
    model: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    ranks: Any,
    local_main: bool,
    transformer: str | None = None,
    base_precision: str | None = None,
    expert: str | None = None,
    whole: bool = False,
) -> Any:
    """Loads a diffusers pipeline on the CPU, frozen and in evaluation mode. VAEs are always in float32.

    Args:
        model: a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub. None: main.
        dtype: dtype of the transformer and the text encoders, as far as they are not quantised.
        ranks: all processes of the job.
        local_main: whether this process is the first of its machine, which downloads before the others load.
        transformer: folder or file with the transformer's weights. None: those of `model`.
        base_precision: quantisation of the transformer and the text encoders; see `TrainConfig`.
        whole: whether the transformers' own weights are trained, and are in float32.
        expert: the expert to train of a pipeline with two transformers. A missing or superfluous one is detected before
            weights are read.

    Raises:
        TrainingError: the pipeline cannot be loaded, has no transformer, or its class is not supported. An unsupported
            class is detected before weights are read.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    def load() -> Any:
        index = _check_class(model, revision, expert)
        parts = {name for name, each in index.items() if isinstance(each, (list, tuple)) and each[-1] is not None}
        given: dict[str, Any] = {}
        if transformer is not None:
            part = "transformer_2" if expert == "low" else denoiser(index)
            cls = getattr(diffusers, index[part][-1])
            given[part] = load_transformer(
                Path(transformer),
                cls,
                part=part,
                model=model,
                revision=revision,
                dtype=torch.float32 if whole else dtype,
                precision=base_precision,
            )
        in_float32 = ("vae", *sorted(parts & {"audio_vae", "vocoder"}))
        dtypes: dict[str, Any] = {**dict.fromkeys(in_float32, torch.float32), "default": dtype}
        if whole:
            dtypes |= dict.fromkeys(parts & {"transformer", "transformer_2", "unet"}, torch.float32)
        quantised = pipeline_quantisation(base_precision, dtype, parts - given.keys())
        if quantised is not None:
            given["quantization_config"] = quantised
        pipeline = from_safetensors(DiffusionPipeline, model, revision=revision, dtype=dtypes, **given)
        for component in pipeline.components.values():  # bitsandbytes quantises on the GPU
            if isinstance(component, nn.Module) and str(component.device) != "cpu":
                component.to("cpu")
        return pipeline

    pipeline, problem = None, None
    for turn in (True, False):
        if turn == local_main:
            try:
                pipeline = load()
            except (OSError, ValueError) as error:  # TrainingError is a ValueError
                problem = error
        if ranks.any(problem is not None):  # all processes raise together, so that none waits for a failed one
            if isinstance(problem, TrainingError):
                raise problem
            raise TrainingError(
                f"{option('model', model)} cannot be loaded: {problem or 'see the message of another process'}"
            ) from problem
    assert pipeline is not None
    if not isinstance(getattr(pipeline, denoiser(pipeline.components), None), nn.Module):
        raise TrainingError(
            f"{option('model', model)} is a {type(pipeline).__name__}, which has no transformer or UNet to train."
        )
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_class(model: str, revision: str | None, expert: str | None) -> dict[str, Any]:
    """Reads the pipeline's model_index.json. Raises TrainingError if it names unsupported classes."""
    import diffusers

    index: Any = diffusers.DiffusionPipeline.load_config(model, revision=revision)
    name, transformer = index.get("_class_name"), index.get(denoiser(index))
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline is not None and isinstance(transformer, (list, tuple)) and isinstance(transformer[-1], str):
        family = family_class(pipeline, transformer[-1])
        parts = {name: each for name, each in index.items() if isinstance(each, (list, tuple))}
        family.check_components({name: each[-1] is not None for name, each in parts.items()}, expert)
    return index


def denoiser(components: Mapping[str, Any]) -> str:
    """Name of the component that is trained: a transformer or a UNet."""
    return "transformer" if "transformer" in components else "unet"


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by component name."""
    return {
        name: each
        for name, each in pipeline.components.items()
        if name.startswith("text_encoder") and isinstance(each, nn.Module)
    }


def text_models(pipeline: Any) -> dict[str, nn.Module]:
    """The models that encode texts for the transformer, by component name: the text encoders, and the connectors of
    LTX-2, which its call runs again."""
    connectors = getattr(pipeline, "connectors", None)
    return text_encoders(pipeline) | ({} if connectors is None else {"connectors": connectors})


def drop_text_encoders(pipeline: Any) -> None:
    """Removes the text encoders to free memory. Afterwards the pipeline must be called with embeddings."""
    for name in text_encoders(pipeline):
        setattr(pipeline, name, None)


@contextmanager
def placed(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Moves modules to `device` within this context, and to the CPU afterwards."""
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
    """Casts latents to the VAE's dtype before decoding within this context, as not all pipelines do."""
    decode = vae.decode
    vae.decode = lambda latents, *args, **kwargs: decode(latents.to(vae.dtype), *args, **kwargs)
    try:
        yield
    finally:
        del vae.decode


def fingerprint(module: nn.Module, rounded: bool = False) -> str:
    """A fingerprint of a model's weights, from the first 256 values of each tensor. Fine-tuning changes it.

    Of quantised weights, it is that of their integers and scales.

    Args:
        module: the model.
        rounded: whether to round values to bfloat16 first. Weights in float32 and the same weights in bfloat16 then
            have equal fingerprints.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    plain = {
        f"{name}{inner}": each
        for name, tensor in module.state_dict().items()
        for inner, each in inner_tensors(tensor.detach()).items()
    }
    for name, tensor in sorted(plain.items()):
        beginning = tensor.flatten()[:256].to("cpu", torch.float32)
        dtype: Any = tensor.dtype
        if rounded and tensor.is_floating_point():
            beginning, dtype = beginning.bfloat16().float(), "rounded"
        digest.update(f"{name} {list(tensor.shape)} {dtype}".encode())
        digest.update(beginning.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
