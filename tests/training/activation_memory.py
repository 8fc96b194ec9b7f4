"""How much memory a training step of Wan 1.3B (480p, 81 frames) needs beyond weights, gradients and optimizer.

Found out without that memory and in no time: tensors have shapes and no contents, and of four ranks only the first is
there.

    python -m tests.training.activation_memory     # prints MiB by strategy, as JSON

What is counted is what PyTorch's operators allocate. Symmetric memory is not, since keys are gathered by collectives
here.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_attn import apply_context_parallel, set_attention_provider
from diffusers_attn.context_parallel.mesh import ContextParallelMesh
from diffusers_attn.training.families.wan import Wan
from diffusers_attn.training.loss import RectifiedFlow
from diffusers_attn.training.model.lora import adapter_config

RANKS = 4
LAYERS = 2
"""of 30: the further ones add their inputs alone, which are exactly a rank's share."""
SHAPES = {"one process": None, "gather": (RANKS, 1), "ring": (RANKS, 1), "ulysses": (1, RANKS)}
CONFIG = {
    "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 8960, "num_layers": LAYERS, "cross_attn_norm": True,
}  # fmt: skip


class Peak(TorchDispatchMode):
    """Peak bytes of the tensors that operators within this context allocate."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {id(storage): storage for storage in (each.untyped_storage() for each in before)}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # that which was waited for, of which without contents a copy is made
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def trainee(mode: FakeTensorMode) -> nn.Module:
    """The model with its adapter: bfloat16, and float32 where it is trained, with gradients."""
    from diffusers import WanTransformer3DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # about modules that are better kept in float32
    with torch.device("meta"):
        model = WanTransformer3DModel(**CONFIG).to(torch.bfloat16).requires_grad_(False)
    model.add_adapter(adapter_config("lora", 32, None, Wan.lora_targets))
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    dtype = torch.float32 if parameter.requires_grad else parameter.dtype
                    there = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                    there.grad = torch.zeros_like(there) if parameter.requires_grad else None
                    module._parameters[name] = there
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=torch.float32)
    model.enable_gradient_checkpointing()
    return model.train()


def peak_of(strategy: str) -> float:
    """MiB of one step's forward and backward on the first rank."""
    mesh = None
    if (shape := SHAPES[strategy]) is not None:
        mesh = ContextParallelMesh.from_mesh(
            init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses")),
            rotate_method="alltoall" if strategy == "ring" else "allgather",
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = trainee(mode)
    with mode:
        set_attention_provider(model, "native")
        if mesh is not None:
            apply_context_parallel(model, mesh)
        clean, noise = torch.randn(1, 16, 21, 60, 104), torch.randn(1, 16, 21, 60, 104)
        text, u = torch.randn(1, 512, 4096, dtype=torch.bfloat16), torch.rand(1)
        objective = RectifiedFlow(lambda tokens: 3.0)
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        with Peak([clean, noise, text, u, *model.parameters(), *model.buffers(), *gradients]) as peak:
            with torch.autocast("cpu", torch.bfloat16):
                level = objective.level(u, 21 * 30 * 52)
                noisy = objective.noisy(clean, noise, level)
                prediction = model(noisy.bfloat16(), level.timestep, text, return_dict=False)[0]
                loss = objective.loss(prediction, clean, noise, level).mean()
            loss.backward()
    return round(peak.peak / 2**20, 1)


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    print(json.dumps({strategy: peak_of(strategy) for strategy in SHAPES}))


if __name__ == "__main__":
    main()
