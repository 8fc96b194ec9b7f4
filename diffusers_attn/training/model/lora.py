"""The trained adapter: adding it to a model, reading its weights from a wrapped model, and saving it for diffusers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.disk import write_file
from ..errors import TrainingError
from ..randomness import derived_seed
from ..settings.choices import IN_DIFFUSERS_FORMAT, INITIALISATIONS, KINDS
from ..settings.flag_names import option
from .comfyui import save_comfyui
from .whole import class_of

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name of the file that a pipeline's `load_lora_weights` looks for in a folder."""
MOVES_BASE = ("olora",)
"""Initialisations with a nonzero adapter, which is subtracted from the base model's weights."""
OF_MATRICES = ("orthogonal", "olora")
"""Initialisations for linear layers only."""


def adapter_config(
    kind: str,
    rank: int,
    alpha: float | None,
    targets: Sequence[str],
    init: str = "default",
    dropout: float = 0.0,
) -> Any:
    """The PEFT configuration of an adapter.

    Args:
        kind: one of `KINDS`.
        rank: rank of the trained matrices; of "oft" the size of the rotated blocks; "ia3" has none.
        alpha: numerator of the adapter's scale, `alpha / rank` ("rslora": `alpha / sqrt(rank)`). None: `rank`.
        targets: names of layers or ends of names, such as "to_q" or "attn.to_out.0"; or one regular expression that
            matches entire names.
        init: initialisation of the weights, one of `INITIALISATIONS`; only for "lora", "rslora" and "dora".
        dropout: dropout probability of the adapter's input; "ia3" has none.

    Returns:
        A `peft.PeftConfig`.

    Raises:
        TrainingError: an unknown kind or initialisation, or a combination that does not exist.
    """
    import peft

    if kind not in KINDS:
        raise TrainingError(f"adapter={kind!r}: accepted are {', '.join(map(repr, KINDS))}.")
    if init not in INITIALISATIONS:
        raise TrainingError(f"adapter_init={init!r}: accepted are {', '.join(map(repr, INITIALISATIONS))}.")
    names: Any = targets[0] if is_expression(targets) else list(targets)
    alpha = float(rank) if alpha is None else alpha
    if kind in IN_DIFFUSERS_FORMAT:
        return peft.LoraConfig(
            r=rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # files usually have an int
            target_modules=names,
            init_lora_weights=True if init == "default" else init,  # type: ignore[arg-type]
            lora_dropout=dropout,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
        )
    if init != "default":
        raise TrainingError(f"adapter_init={init!r} is for {', '.join(IN_DIFFUSERS_FORMAT)}, not for adapter={kind!r}.")
    if kind == "oft":
        return peft.OFTConfig(oft_block_size=rank, target_modules=names, module_dropout=dropout)
    if kind == "ia3":
        return peft.IA3Config(target_modules=names, feedforward_modules=[])
    config = peft.LoHaConfig if kind == "loha" else peft.LoKrConfig
    return config(r=rank, alpha=alpha, target_modules=names, rank_dropout=0.0, module_dropout=dropout)  # type: ignore[arg-type]


def is_expression(targets: Sequence[str]) -> bool:
    """Whether `targets` is one regular expression rather than names or ends of names."""
    return len(targets) == 1 and bool(set(targets[0]) & set("*+?()|[]{}^$\\"))


def move_base(transformer: nn.Module, initial: Mapping[str, Tensor]) -> None:
    """Subtracts an adapter's initial weights from the base model, as an initialisation of `MOVES_BASE` does.

    A resumed run needs the same base weights to the last bit, so it takes the initial weights from the checkpoint.

    Args:
        transformer: a model whose adapter was initialised without changing the base.
        initial: `adapter_weights` of the original run right after initialisation.
    """
    for name, layer in transformer.named_modules():
        if f"{name}.lora_A.{ADAPTER}.weight" in initial:
            weight: Tensor = layer.get_base_layer().weight
            down, up = (initial[f"{name}.lora_{part}.{ADAPTER}.weight"].to(weight.device) for part in "AB")
            scaling = layer.scaling[ADAPTER]
            moved = weight.data.float()
            moved -= scaling * up @ down
            weight.data = moved.to(weight.dtype)


def linear_layers(transformer: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, in the form of targets: "to_q", "to_out.0"."""
    names = (name.split(".") for name, each in transformer.named_modules() if isinstance(each, nn.Linear))
    return sorted({".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] for parts in names})


def add_adapter(transformer: nn.Module, config: Any, seed: int) -> list[nn.Parameter]:
    """Freezes a model and adds an adapter in float32, independent of the model's dtype.

    Args:
        transformer: the model.
        config: from `adapter_config`.
        seed: seed of the adapter's initial weights, which are the same on every process.

    Returns:
        The adapter's parameters, the only ones with `requires_grad`.

    Raises:
        TrainingError: no layer matches the targets.
    """
    transformer.requires_grad_(False)
    init = getattr(config, "init_lora_weights", None)
    if init in MOVES_BASE:
        config.init_lora_weights = True  # olora_init runs below, since PEFT would round its result to the base's dtype
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "adapter"))
        try:
            transformer.add_adapter(config, ADAPTER)  # type: ignore[operator]
        except ValueError as error:
            targets = config.target_modules
            targets = targets if isinstance(targets, str) else sorted(targets)
            raise TrainingError(
                f"{option('targets', targets)}: {error} Its linear layers end in "
                f"{', '.join(linear_layers(transformer))}."
            ) from error
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if init == "olora":
        with torch.no_grad():
            for layer in transformer.modules():
                if ADAPTER in getattr(layer, "lora_A", ()):
                    layer.olora_init(ADAPTER)  # type: ignore[operator]
    return trained


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name. DDP's, compile's and checkpointing's wrappers are left out of the names."""
    found = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("module.").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
            found[name] = parameter
    return found


def full_copy(tensor: Tensor) -> Tensor:
    """A copy of the full tensor on the CPU. If FSDP2 sharded it, every process must call this."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous()


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Puts a full tensor on the device of `like`, and shards it if FSDP2 sharded `like`."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(tensor.to(placed.to_local().device), placed.device_mesh, placed.placements)


def adapter_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's full parameters by name, on the CPU. With FSDP2 every process must call this."""
    return {name: full_copy(parameter.data) for name, parameter in trained_parameters(transformer).items()}


def load_adapter_weights(transformer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads weights that `adapter_weights` returned.

    Raises:
        TrainingError: names or shapes are those of another adapter.
    """
    parameters = trained_parameters(transformer)
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))
        raise TrainingError(
            f"the checkpoint is from another adapter: {len(odd)} names of tensors differ, for example {odd[0]}. Give "
            "the same --adapter, --rank and --targets, or another --output_dir."
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != tuple(weights[name].shape):
            raise TrainingError(
                f"{name} has shape {list(weights[name].shape)} in the checkpoint and {list(parameter.shape)} here. "
                "Give the same --rank, or another --output_dir."
            )
        with torch.no_grad():
            parameter.copy_(sharded_like(weights[name].to(parameter.dtype), parameter))


def save_adapter(
    pipeline: Any,
    weights: Mapping[str, Tensor],
    folder: Path,
    kind: str,
    transformer: nn.Module,
    initial: Mapping[str, Tensor] | None = None,
    comfyui: bool = False,
) -> Path:
    """Saves an adapter atomically.

    "lora", "rslora" and "dora" are written in diffusers' format, for the pipeline's `load_lora_weights`, or for
    `load_lora_adapter` of its transformer if the pipeline has no such method. The other kinds are written in PEFT's
    format for `load_adapter`.

    Args:
        pipeline: the pipeline whose transformer has the adapter.
        weights: from `adapter_weights`.
        folder: folder for the file; created if missing.
        kind: type of the adapter, one of `KINDS`.
        transformer: the transformer that has the adapter.
        initial: `adapter_weights` right after an initialisation of `MOVES_BASE`. The saved adapter then has twice the
            rank and applies to the original base model.
        comfyui: whether to write it with ComfyUI's names as well, into another file.

    Returns:
        The adapter's file.
    """
    from peft import get_peft_model_state_dict

    trained: Any = transformer
    config = copy.deepcopy(trained.peft_config[ADAPTER])
    layers = get_peft_model_state_dict(trained, state_dict=dict(weights), adapter_name=ADAPTER)
    if initial is not None:
        initial_layers = get_peft_model_state_dict(trained, state_dict=dict(initial), adapter_name=ADAPTER)
        layers = _difference(layers, initial_layers)
        config.r *= 2
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the same scaling for twice the rank
    if kind in IN_DIFFUSERS_FORMAT:
        config.init_lora_weights = True  # loading must not run the initialisation, which may change the base
    metadata = _json_values(config.to_dict())
    if kind in IN_DIFFUSERS_FORMAT:
        file = folder / LORA_FILE

        def write(unfinished: Path) -> None:
            part = "unet" if trained is getattr(pipeline, "unet", None) else "transformer"
            of_part = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
            writer_of(type(pipeline)).save_lora_weights(unfinished.parent, weight_name=unfinished.name, **of_part)
    else:
        file = folder / "adapter_model.safetensors"
        write_file(folder / "adapter_config.json", lambda path: path.write_text(json.dumps(metadata, indent=2)))

        def write(unfinished: Path) -> None:
            from safetensors.torch import save_file

            save_file({key: each.contiguous() for key, each in layers.items()}, unfinished)

    write_file(file, write, "the adapter")
    if comfyui:
        scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        save_comfyui(layers, class_of(transformer).__name__, scaling, folder)
    return file


def loads_adapters(pipeline: type) -> bool:
    """Whether a pipeline class has `load_lora_weights`. Otherwise only its transformer has `load_lora_adapter`."""
    return hasattr(pipeline, "load_lora_weights")


def writer_of(pipeline: type) -> Any:
    """The class whose `save_lora_weights` writes adapters of a pipeline class: the class itself, or the loader of
    another pipeline if it has none. The files are the same, with names that begin with "transformer."."""
    if loads_adapters(pipeline):
        return pipeline
    from diffusers.loaders.lora_pipeline import HunyuanVideoLoraLoaderMixin

    return HunyuanVideoLoraLoaderMixin


def _difference(layers: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter for the difference of two adapters' products: `[B, -B0] [A; A0] = B A - B0 A0`."""
    joined = {}
    for name, each in layers.items():
        if ".lora_A." in name:
            each = torch.cat([each, initial[name]], dim=0)
        elif ".lora_B." in name:
            each = torch.cat([each, -initial[name]], dim=1)
        joined[name] = each.contiguous()
    return joined


def load_adapter(transformer: nn.Module, folder: str | Path) -> None:
    """Adds a saved adapter in PEFT's format ("loha", "lokr", "oft" or "ia3") to a model.

    Args:
        transformer: the base model.
        folder: folder with `adapter_config.json` and `adapter_model.safetensors`, as `save_adapter` wrote them.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    transformer.add_adapter(PeftConfig.from_pretrained(str(folder)), ADAPTER)  # type: ignore[operator]
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    set_peft_model_state_dict(transformer, weights, adapter_name=ADAPTER)


def _json_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with sets as sorted lists and enumerations as their values."""
    plain = {}
    for key, value in config.items():
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        plain[key] = getattr(value, "value", value)
    return plain
