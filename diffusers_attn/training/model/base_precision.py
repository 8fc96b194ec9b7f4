"""The frozen base model in fewer bits: int8 and fp8 by torchao, nf4 by bitsandbytes, as diffusers loads them.

Weights of linear layers are quantised when they are loaded. In each forward they are dequantised to the run's dtype, so
activations, gradients and the adapter are computed as without quantisation. Text encoders are quantised in the same way
while captions are encoded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...safetensors_only import from_safetensors
from ..errors import TrainingError
from ..settings.choices import QUANTISED
from ..settings.config import TrainConfig
from ..settings.flag_names import option


def check_base_precision(config: TrainConfig, device: torch.device, sharded: bool) -> None:
    """Checks the settings that choose the base model's weights and their place, without loading anything.

    Args:
        config: the settings.
        device: device of the run.
        sharded: whether FSDP2 shards the weights.

    Raises:
        TrainingError: a package or a GPU is missing, or FSDP2 cannot shard the weights.
    """
    if config.offload != "none" and sharded:
        raise TrainingError(
            f"{option('offload', config.offload)} with FSDP2, which moves weights itself. Leave it out, and set "
            "fsdp_offload_params in Accelerate's configuration."
        )
    if config.transformer is not None and not Path(config.transformer).exists():
        raise TrainingError(f"{option('transformer', config.transformer)}: there is no such file or folder.")
    packed = config.transformer is not None and Path(config.transformer).suffix == ".gguf"
    if packed and importlib.util.find_spec("gguf") is None:
        raise TrainingError(
            f"{option('transformer', config.transformer)} needs a package that is not installed: `pip install gguf`."
        )
    if sharded and packed:
        raise TrainingError(
            f"{option('transformer', config.transformer)} with FSDP2: quantised weights cannot be sharded. Start with "
            "DDP, for example from examples/accelerate_configs."
        )
    if config.base_precision not in QUANTISED:
        return
    asked = option("base_precision", config.base_precision)
    package = QUANTISED[config.base_precision]
    if importlib.util.find_spec(package) is None:
        raise TrainingError(f"{asked} needs a package that is not installed: `pip install {package}`.")
    if package == "bitsandbytes" and device.type == "cpu":
        raise TrainingError(
            f"{asked} needs a GPU, on which diffusers quantises with bitsandbytes. Give --base_precision int8, which "
            "CPUs support."
        )
    if packed:
        raise TrainingError(
            f"{asked} with {option('transformer', config.transformer)}: the weights of a GGUF file are quantised "
            "already. Leave --base_precision out."
        )
    if sharded:
        raise TrainingError(
            f"{asked} with FSDP2: quantised weights cannot be sharded. Leave it out, or start with DDP, for example "
            "from examples/accelerate_configs."
        )


def base_dtype(config: TrainConfig, mixed_precision: str) -> torch.dtype:
    """The dtype of the base model's weights that are not quantised, and of its activations without autocast."""
    return torch.bfloat16 if mixed_precision == "bf16" or config.base_precision == "bf16" else torch.float32


def quantisation(precision: str | None, dtype: torch.dtype, library: Literal["diffusers", "transformers"]) -> Any:
    """The quantisation config of a model for `from_pretrained`; None without quantisation.

    Args:
        precision: `base_precision` of the settings.
        dtype: dtype to which weights are dequantised.
        library: library of the model.
    """
    if precision not in QUANTISED:
        return None
    module: Any = importlib.import_module(library)
    if precision == "nf4":
        return module.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return module.TorchAoConfig(Int8WeightOnlyConfig() if precision == "int8" else Float8WeightOnlyConfig())


def pipeline_quantisation(precision: str | None, dtype: torch.dtype, components: Iterable[str]) -> Any:
    """The quantisation of a pipeline's transformers and text encoders, for its `from_pretrained`; None without one.

    Args:
        precision, dtype: as in `quantisation`.
        components: names of the pipeline's components.
    """
    if precision not in QUANTISED:
        return None
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    encoders = {name for name in components if name.startswith("text_encoder")}
    configs = {name: quantisation(precision, dtype, "transformers") for name in encoders}
    for name in {"transformer", "transformer_2", "unet"}.intersection(components):
        configs[name] = quantisation(precision, dtype, "diffusers")
    return PipelineQuantizationConfig(quant_mapping=configs)


def load_transformer(
    path: Path,
    cls: type[Any],
    *,
    part: str,
    model: str,
    revision: str | None,
    dtype: torch.dtype,
    precision: str | None,
) -> nn.Module:
    """Loads a transformer from a folder, a GGUF file or a single safetensors file.

    Args:
        path: folder in diffusers' format, quantised or not; or a file ending in .gguf or .safetensors.
        cls: class of the transformer.
        part: the pipeline's component that it replaces.
        model: pipeline with the transformer's configuration, which a file lacks.
        revision: branch, tag or commit of the pipeline.
        dtype: dtype of weights that are not quantised.
        precision: `base_precision` of the settings.

    Raises:
        TrainingError: the path is of another kind, or has weights of another model.
    """
    asked = option("transformer", str(path))
    config = quantisation(precision, dtype, "diffusers")
    if path.is_dir():
        from diffusers import ModelMixin

        assert issubclass(cls, ModelMixin)
        if "quantization_config" in cls.load_config(path):
            if config is not None:
                raise TrainingError(
                    f"{option('base_precision', precision)} with {asked}, whose weights are quantised already. Leave "
                    "--base_precision out."
                )
        given = {} if config is None else {"quantization_config": config}
        quantised_or_not: nn.Module = from_safetensors(cls, path, torch_dtype=dtype, **given)
        return quantised_or_not
    if path.suffix not in (".gguf", ".safetensors"):
        raise TrainingError(f"{asked}: a folder or a file that ends in .gguf or .safetensors is accepted.")
    if not hasattr(cls, "from_single_file"):
        raise TrainingError(f"{asked}: diffusers does not load a {cls.__name__} from a single file. Give a folder.")
    if path.suffix == ".gguf":
        from diffusers import GGUFQuantizationConfig

        config = GGUFQuantizationConfig(compute_dtype=dtype)
    try:
        found: nn.Module = cls.from_single_file(
            str(path), config=model, subfolder=part, config_revision=revision, torch_dtype=dtype,
            quantization_config=config,
        )  # fmt: skip
    except Exception as error:  # diffusers meets the keys of another model with errors of many types
        raise TrainingError(
            f"{asked} cannot be loaded as the {cls.__name__} of {model}: {type(error).__name__}: {error}"
        ) from error
    missing = [name for name, each in found.named_parameters() if each.device.type == "meta"]
    if missing:
        raise TrainingError(f"{asked} lacks {len(missing)} weights of {model}, for example {missing[0]}.")
    return found


def is_quantised(module: nn.Module) -> bool:
    """Whether diffusers loaded a model with quantised weights."""
    return getattr(module, "hf_quantizer", None) is not None


def inner_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors of which a tensor consists: of a quantised one its integers and scales, by name."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return {"": tensor.as_subclass(torch.Tensor)}
    found = {}
    for name in flatten()[0]:
        for inner, each in inner_tensors(getattr(tensor, name)).items():
            found[f".{name}{inner}"] = each
    return found


def check_adapter_kind(config: TrainConfig, transformer: nn.Module) -> None:
    """Raises TrainingError for an adapter that needs the base model's weights if these are quantised."""
    if not is_quantised(transformer):
        return
    of_base = option("base_precision", config.base_precision) if config.base_precision else "a quantised base model"
    if config.adapter not in ("lora", "rslora"):
        raise TrainingError(
            f"{option('adapter', config.adapter)} with {of_base}: it needs the base model's own weights. Give "
            "--adapter lora or rslora."
        )
    if config.adapter_init == "olora":
        raise TrainingError(
            f"{option('adapter_init', config.adapter_init)} with {of_base}: it would change quantised weights. Give "
            "another --adapter_init."
        )
