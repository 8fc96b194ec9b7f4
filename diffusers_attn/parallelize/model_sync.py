"""Describes models, so that ranks that share a sequence can check that their models are equal.

Two ranks with different LoRAs, scales or providers compute a mixture of two models, which no shape reveals. So models
are described completely when context parallelism is enabled. In every forward, only adapters with their scales and
processors are described again: they can change between forwards, and reading them is cheap.

Values of weights are not read in every forward, since the host would wait for its device. Values of adapters are read
when adapters are added or removed, and, outside of training, after one of these signs of a change:

- A weight's version: PyTorch counts writes in place.
- A weight's address: `weight.data = other` and `torch.utils.swap_tensors` change it.
- A call of `model.state_dict()`: hot-swapping an adapter (`load_lora_weights(..., hotswap=True)`, PEFT's
  `hotswap_adapter`) begins with it. It then writes through `weight.data`, which changes neither version nor address.

Other writes through `weight.data`, such as `weight.data.copy_(other)`, leave no sign. After such a write, and to
compare adapters in training, call `disable_context_parallel(model)` and `enable_context_parallel(model)` on all ranks,
which compares the values of all adapters.
"""

from __future__ import annotations

import hashlib
import operator
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..cp_plans.plan import Plan, entries
from .fingerprint import fingerprint, fingerprint_of_all
from .weight_kinds import WeightKinds

_MOST_MOVES = 4
"""Number of consecutive changes of addresses without a change of values, after which addresses are ignored."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def versions() -> dict[str, str]:
    """Versions of the libraries that affect results and exchanges."""
    import diffusers

    from .. import __version__

    found = {"diffusers_attn": __version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__}
    return {f"version of {name}": version for name, version in found.items()}


def described_plan(plan: Plan) -> dict[str, str]:
    """Descriptions of a plan's entries by name."""
    found: dict[str, str] = {}
    for path, spec in entries(plan):
        name = f"plan entry {path!r}"
        text = _ADDRESS.sub("", repr(spec))
        found[name] = f"{found[name]}, {text}" if name in found else text
    return found


def described_model(model: nn.Module, weights: bool) -> dict[str, str]:
    """Names, shapes and dtypes of parameters and buffers. With `weights`, also fingerprints of their values, for
    which the host waits."""
    found = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    buffers = ((name, each) for name, each in model.named_buffers())
    for name, tensor in (*model.named_parameters(), *buffers):
        values = f", values {fingerprint(tensor.detach())}" if weights and _is_complete(tensor) else ""
        found[f"weight {name}"] = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{values}"
    return found


def _is_complete(tensor: Tensor) -> bool:
    """Whether this rank has all values of `tensor`: it is neither a shard (FSDP2) nor on the meta device."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


class Adapters:
    """Describes the current adapters and processors of a model. Holds no reference to the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._configs: list[Any] | None = None
        """Names and configurations of the adapters at the last look-up of layers."""
        self._layers: list[tuple[str, Any]] = []
        """PEFT's layers, by name."""
        self._attention: list[tuple[str, Any]] = []
        """Modules with a processor, by name."""
        self._state: list[Any] = []
        """Their state at the last description."""
        self._kinds = WeightKinds(model, [])
        self._scalings: list[dict[str, Any]] = []
        """The scales of each layer, by adapter."""
        self._weights: list[Tensor] = []
        """Weights of the adapters at the last description, without tensors of inference mode, which have no version."""
        self._versions: list[int] = []
        self._complete: list[Tensor] = []
        """Weights of the adapters at the last description that have an address."""
        self._addresses: list[int] = []
        self._moves = 0
        """Number of consecutive changes of addresses without a change of values."""
        self._is_suspect = False
        """Whether values may have changed without another sign."""
        self._checksums: dict[str, str] = {}
        self._described: dict[str, str] = {}

    def may_have_changed(self, *_: Any) -> None:
        """Makes the next forward outside of training read the values of adapters. A pre-hook of `state_dict`."""
        self._is_suspect = True

    def describe(self, in_training: bool) -> dict[str, str]:
        """The properties that must be equal on all ranks, by name. Returns the same object until one of them changes.

        Args:
            in_training: ignores changes of the weights' values, which come with every step.
        """
        model: Any = self._model()
        if model is None:
            return {}
        configs = [each for item in (getattr(model, "peft_config", None) or {}).items() for each in item]
        known = self._configs
        if known is None or len(known) != len(configs) or any(map(operator.is_not, known, configs)):
            self._configs, self._state, self._is_suspect = configs, [], True
            named = list(model.named_modules())
            self._layers = [(name, each) for name, each in named if hasattr(each, "adapter_layer_names")]
            self._attention = [(name, each) for name, each in named if hasattr(each, "processor")]
            self._scalings = [layer.scaling for _, layer in self._layers if hasattr(layer, "scaling")]
            self._kinds = WeightKinds(model, [module for _, module in self._attention])
        state = [*self._current_state(), self._kinds.current_state(in_training)]
        if state != self._state or (not in_training and self._are_written()):
            self._state = state
            self._described = {**self._describe(), **self._kinds.describe(in_training)}
        return self._described

    def _are_written(self) -> bool:
        """Whether the values of adapters may have changed since the last description."""
        if self._is_suspect or [each._version for each in self._weights] != self._versions:
            return True
        # Offloading moves weights in every forward, and reading their values each time would be slow.
        return self._moves < _MOST_MOVES and [each.data_ptr() for each in self._complete] != self._addresses

    def _current_state(self) -> list[Any]:
        """The current state, as plain values that compare quickly."""
        processors = [module.processor for _, module in self._attention]
        return [
            # Tensors are compared by version: reading their values would make the host wait.
            [
                (name, id(scale), scale._version) if scale.__class__ is Tensor else (name, scale)
                for scaling in self._scalings
                for name, scale in scaling.items()
            ],
            [(layer._disable_adapters, *layer._active_adapter) for _, layer in self._layers],
            [layer.merged_adapters and tuple(layer.merged_adapters) for _, layer in self._layers],
            processors,
            [_scale(each) for each in processors],
        ]

    def _find_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of adapters, with the adapters' names."""
        for _, layer in self._layers:
            for name in layer.adapter_layer_names:
                for adapter, part in (getattr(layer, name, None) or {}).items():
                    for tensor in [part] if isinstance(part, Tensor) else part.parameters():
                        yield adapter, tensor
        for _, module in self._attention:
            if isinstance(module.processor, nn.Module):
                for tensor in module.processor.parameters():
                    yield "of attention processors", tensor

    def _describe(self) -> dict[str, str]:
        weights = list(self._find_weights())
        self._weights = [each for _, each in weights if not each.is_inference()]
        self._complete = [each for _, each in weights if _is_complete(each)]
        versions, addresses = [each._version for each in self._weights], [each.data_ptr() for each in self._complete]
        have_moved = addresses != self._addresses
        if self._is_suspect or versions != self._versions or have_moved or len(weights) != len(versions):
            before, self._checksums = self._checksums, _checksums_of(weights)
            self._moves = self._moves + 1 if have_moved and before == self._checksums else 0
            self._versions, self._addresses, self._is_suspect = versions, addresses, False
        found: dict[str, str] = {}
        scales = [dict(getattr(layer, "scaling", _NO_SCALES)) for _, layer in self._layers]
        for adapter in sorted({name for each in scales for name in each} | set(self._checksums)):
            rows = [
                (name, f"{float(scale[adapter]):.6g}", adapter in _names(layer._active_adapter))
                for (name, layer), scale in zip(self._layers, scales)
                if adapter in scale
            ]
            each_scale = sorted({scale for _, scale, _ in rows})
            active = sum(is_active for *_, is_active in rows)
            by_layer = f" (by layer {_digest(rows)})" if len(each_scale) > 1 or active not in (0, len(rows)) else ""
            found[f"adapter {adapter!r}"] = (
                f"active in {active} of {len(rows)} layers, scale {' '.join(each_scale[:4]) or 'none'}{by_layer}, "
                f"weights {self._checksums.get(adapter, 'none')}"
            )
        merged = sorted({name for _, layer in self._layers for name in layer.merged_adapters})
        disabled = sum(bool(layer._disable_adapters) for _, layer in self._layers)
        if self._layers:
            found["adapters merged into the model"] = ", ".join(merged) or "none"
            found["adapters switched off"] = f"in {disabled} of {len(self._layers)} layers"
        kinds = [_processor(name, module.processor) for name, module in self._attention]
        if kinds:
            found["attention processors"] = (
                f"{', '.join(sorted({kind for _, kind in kinds}))} (by module {_digest(kinds)})"
            )
        return found


def _checksums_of(weights: list[tuple[str, Tensor]]) -> dict[str, str]:
    """A checksum of each adapter's weights."""
    by_adapter: dict[str, list[Tensor]] = {}
    for adapter, tensor in weights:
        by_adapter.setdefault(adapter, []).append(tensor.detach())
    return {
        adapter: fingerprint_of_all(tensors) if all(map(_is_complete, tensors)) else "sharded"
        for adapter, tensors in by_adapter.items()
    }


def _scale(processor: Any) -> Any:
    scale = getattr(processor, "scale", None)
    return scale.copy() if scale.__class__ is list else scale


_NO_SCALES: dict[str, Any] = {}


def _processor(name: str, processor: Any) -> tuple[str, str]:
    choice, scale = getattr(processor, "choice", None), _scale(processor)
    bound = "" if choice is None else f" bound to {choice!r}"
    return name, f"{type(processor).__name__}{bound}{'' if scale is None else f' of scale {scale}'}"


def _names(active: Any) -> tuple[str, ...]:
    return (active,) if isinstance(active, str) else tuple(active or ())


def _digest(value: Any) -> str:
    return hashlib.blake2b(_ADDRESS.sub("", repr(value)).encode(), digest_size=8).hexdigest()
