"""The adapter that is trained: put on, taken out of whatever wraps the model, and written for diffusers to load."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data.disk import write_file
from .errors import TrainingError
from .flag_names import option
from .randomness import derived_seed

ADAPTER = "default"
KINDS = ("lora", "rslora", "dora", "loha", "lokr")
IN_DIFFUSERS_FORMAT = ("lora", "rslora", "dora")
INITIALISATIONS = ("default", "gaussian", "orthogonal", "olora")
MOVES_BASE = ("olora",)
"""initialisations that do not begin with nothing, and take it off the base model's weights instead."""
OF_MATRICES = ("orthogonal", "olora")
"""initialisations for linear layers only."""


def adapter_config(
    kind: str,
    rank: int,
    alpha: float | None,
    targets: Sequence[str],
    init: str = "default",
    dropout: float = 0.0,
) -> Any:
    """The configuration of an adapter, in PEFT's words.

    Args:
        kind: one of `KINDS`.
        rank: of the matrices that are trained.
        alpha: the adapter counts `alpha / rank` (of "rslora", `alpha / sqrt(rank)`); None is `rank`.
        targets: names of layers, or ends of them: "to_q", "attn.to_out.0"; or one regular expression for whole names.
        init: how the first matrix starts, one of `INITIALISATIONS`; only for "lora", "rslora" and "dora".
        dropout: of the adapter's input.

    Raises:
        TrainingError: a kind or initialisation that is none of these, or that do not go together.
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
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # what files usually have
            target_modules=names,
            init_lora_weights=True if init == "default" else init,  # type: ignore[arg-type]
            lora_dropout=dropout,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
        )
    if init != "default":
        raise TrainingError(f"adapter_init={init!r} is for {', '.join(IN_DIFFUSERS_FORMAT)}, not for adapter={kind!r}.")
    config = peft.LoHaConfig if kind == "loha" else peft.LoKrConfig
    return config(r=rank, alpha=alpha, target_modules=names, rank_dropout=0.0, module_dropout=dropout)  # type: ignore[arg-type]


def is_expression(targets: Sequence[str]) -> bool:
    """Whether `targets` is one regular expression for whole names, and not names or ends of them."""
    return len(targets) == 1 and bool(set(targets[0]) & set("*+?()|[]{}^$\\"))


def move_base(transformer: nn.Module, initial: Mapping[str, Tensor]) -> None:
    """Takes an adapter's beginning off the base model's weights, as an initialisation of `MOVES_BASE` does: for a run
    that is resumed, whose own beginning it must be, to the last bit.

    Args:
        transformer: with an adapter whose beginning changed nothing.
        initial: what `adapter_weights` was behind the initialisation.
    """
    for name, layer in transformer.named_modules():
        beginning = f"{name}.lora_A.{ADAPTER}.weight"
        if beginning in initial:
            weight: Tensor = layer.get_base_layer().weight
            down, up = (initial[f"{name}.lora_{part}.{ADAPTER}.weight"].to(weight.device) for part in "AB")
            scaling = layer.scaling[ADAPTER]
            moved = weight.data.float()
            moved -= scaling * up @ down
            weight.data = moved.to(weight.dtype)


def linear_layers(transformer: nn.Module) -> list[str]:
    """The ends of their names, as targets are given: "to_q", "to_out.0"."""
    names = (name.split(".") for name, each in transformer.named_modules() if isinstance(each, nn.Linear))
    return sorted({".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] for parts in names})


def add_adapter(transformer: nn.Module, config: Any, seed: int) -> list[nn.Parameter]:
    """Freezes a model and adds an adapter in float32, whatever the model's own dtype is.

    Args:
        config: from `adapter_config`.
        seed: of the adapter's first weights, which are the same on every process.

    Returns:
        The adapter's parameters, which are all that is trained.

    Raises:
        TrainingError: no layer has such a name.
    """
    transformer.requires_grad_(False)
    init = getattr(config, "init_lora_weights", None)
    if init in MOVES_BASE:
        config.init_lora_weights = True  # at first: PEFT rounds what it makes here to the dtype of the base
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
    """Of a model that may be wrapped: those that are trained, by the names that they have without wrappers."""
    prefix = "module."  # of DDP
    found = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix(prefix).replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
            found[name] = parameter
    return found


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, of all parts where FSDP2 sharded it: then every process must call this."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous()


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole `tensor` as `like` is: on its device, and this process's part of it where FSDP2 sharded it."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(tensor.to(placed.to_local().device), placed.device_mesh, placed.placements)


def adapter_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by name, whole, on the CPU. With FSDP2 every process must call this."""
    return {name: whole(parameter.data) for name, parameter in trained_parameters(transformer).items()}


def load_adapter_weights(transformer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets what `adapter_weights` returned.

    Raises:
        TrainingError: they are of another adapter.
    """
    parameters = trained_parameters(transformer)
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))
        raise TrainingError(
            f"the checkpoint is of another adapter: {len(odd)} of its {len(weights)} tensors are missing here or "
            f"there, for instance {odd[0]}. Give the same --adapter, --rank and --targets, or another --output_dir."
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != tuple(weights[name].shape):
            raise TrainingError(
                f"the checkpoint has {name} as {list(weights[name].shape)}, and here it is {list(parameter.shape)}. "
                "Give the same --rank, or another --output_dir."
            )
        with torch.no_grad():
            parameter.copy_(sharded_like(weights[name].to(parameter.dtype), parameter))


def save_adapter(
    pipeline: Any, weights: Mapping[str, Tensor], folder: Path, kind: str, initial: Mapping[str, Tensor] | None = None
) -> Path:
    """Writes an adapter, there whole or not at all.

    Those that diffusers knows are written by the pipeline's own `save_lora_weights`, for `load_lora_weights`; "loha"
    and "lokr" in PEFT's format, for `load_adapter`.

    Args:
        pipeline: its transformer has the adapter's configuration.
        weights: from `adapter_weights`.
        folder: is made.
        kind: of the adapter.
        initial: of an initialisation of `MOVES_BASE`, what `adapter_weights` was behind it. What is written is then the
            difference to the original base model, an adapter of twice the rank.

    Returns:
        The file.
    """
    from peft import get_peft_model_state_dict

    transformer = pipeline.transformer
    config = copy.deepcopy(transformer.peft_config[ADAPTER])
    layers = get_peft_model_state_dict(transformer, state_dict=dict(weights), adapter_name=ADAPTER)
    if initial is not None:
        began = get_peft_model_state_dict(transformer, state_dict=dict(initial), adapter_name=ADAPTER)
        layers = _difference(layers, began)
        config.r *= 2
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the same scaling for twice the rank
    if kind in IN_DIFFUSERS_FORMAT:
        config.init_lora_weights = True  # who loads it needs no beginning, and must not move the base
    about = _plain(config.to_dict())
    if kind in IN_DIFFUSERS_FORMAT:
        file = folder / "pytorch_lora_weights.safetensors"

        def write(unfinished: Path) -> None:
            type(pipeline).save_lora_weights(
                unfinished.parent,
                weight_name=unfinished.name,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=about,
            )
    else:
        file = folder / "adapter_model.safetensors"
        write_file(folder / "adapter_config.json", lambda path: path.write_text(json.dumps(about, indent=2)))

        def write(unfinished: Path) -> None:
            from safetensors.torch import save_file

            save_file({key: each.contiguous() for key, each in layers.items()}, unfinished)

    write_file(file, write, "the adapter")
    return file


def _difference(layers: Mapping[str, Tensor], began: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter whose product is that of `layers` less that of `began`: `[B, -B0] [A; A0]` is `B A - B0 A0`."""
    joined = {}
    for name, each in layers.items():
        if ".lora_A." in name:
            each = torch.cat([each, began[name]], dim=0)
        elif ".lora_B." in name:
            each = torch.cat([each, -began[name]], dim=1)
        joined[name] = each.contiguous()
    return joined


def load_adapter(transformer: nn.Module, folder: str | Path) -> None:
    """Puts an adapter on a model that `save_adapter` wrote in PEFT's format ("loha", "lokr")."""
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    transformer.add_adapter(PeftConfig.from_pretrained(str(folder)), ADAPTER)  # type: ignore[operator]
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    set_peft_model_state_dict(transformer, weights, adapter_name=ADAPTER)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON takes it: sets sorted, enumerations as their values."""
    plain = {}
    for key, value in config.items():
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        plain[key] = getattr(value, "value", value)
    return plain
