"""A server that takes another strategy for each request: every picture is that of one process, also after requests that
fail in the middle, and between requests the pipeline is as it was before the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusers_attn import apply_compile, disable_context_parallel, enable_context_parallel

from ..guidance import families
from ..vae.cases import CASES as VAES

STRATEGIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Ulysses": lambda meshes: {"mesh": meshes.heads[4]},
    "ring": lambda meshes: {"mesh": meshes.lines[4], "rotate_method": "alltoall", "inputs": "check"},
    "guidance": lambda _: {"guidance_degree": 2},
    "weights": lambda meshes: {"mesh": meshes.heads[4], "shard_weights": True},
    "gather": lambda meshes: {"mesh": meshes.lines[4], "rotate_method": "allgather", "provider": "_native_math"},
    "samples": lambda _: {"data_degree": 2},
    "both": lambda meshes: {"mesh": meshes.square, "inputs": "trust"},
    "weights and guidance": lambda _: {"guidance_degree": 2, "shard_weights": True},
    "VAE": lambda meshes: {"mesh": meshes.square, "split_vae": True},
}
"""Options of enable_context_parallel, from the meshes of the pool."""


def pipeline() -> Any:
    pipe = families.build("wan")
    pipe.register_modules(vae=VAES["wan"].make().eval())
    return pipe


@torch.no_grad()
def answer(pipe: Any, **options: Any) -> list[Tensor]:
    """Latents, and a video decoded from others."""
    torch.manual_seed(0)
    latents = torch.randn(VAES["wan"].latents)
    return [families.draw(pipe, "wan", steps=2, **options), pipe.vae.decode(latents, return_dict=False)[0]]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, wanted, strict=True))


def traces(pipe: Any) -> dict[str, Any]:
    """What a strategy might leave on the modules of a pipeline."""
    models = {name: each for name, each in pipe.components.items() if isinstance(each, nn.Module)}
    return {
        f"{name}.{path}": (
            type(module),
            sorted(vars(module)),
            {key: dict(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)},
            [(key, type(each), each.dtype, each.requires_grad) for key, each in module.named_parameters(recurse=False)],
            type(getattr(module, "processor", None)),
            dict(getattr(module, "config", {})),
        )
        for name, model in models.items()
        for path, module in model.named_modules()
    }


class UserLeftError(Exception):
    pass


def _leave(*args: Any) -> dict[str, Any]:
    raise UserLeftError


def serve(meshes: Any, order: list[str], compiled: bool) -> dict[str, Any]:
    """What is wrong after each request."""
    pipe = pipeline()
    wanted = answer(pipe)
    if compiled:
        torch._dynamo.reset()
        apply_compile(pipe.transformer, backend="eager", fullgraph=False)
        answer(pipe)
    before, wrong = traces(pipe), {}
    for number, name in enumerate(order):
        enable_context_parallel(pipe, verbose=False, **STRATEGIES[name](meshes))
        if number % 3 == 1:
            with contextlib.suppress(UserLeftError):
                answer(pipe, callback_on_step_end=_leave)
        errors = {"over ranks": error(answer(pipe), wanted)}
        disable_context_parallel(pipe)
        errors["after"] = error(answer(pipe), wanted)
        left = {key: (value, before.get(key)) for key, value in traces(pipe).items() if value != before.get(key)}
        if max(errors.values()) > 1e-5 or left or set(traces(pipe)) != set(before):
            wrong[f"{number}, {name}"] = errors, left
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_each_strategy_once(pool: Any, compiled: bool) -> None:
    for wrong in pool.run(4, serve, order=list(STRATEGIES), compiled=compiled):
        assert wrong == {}


@pytest.mark.thorough
@pytest.mark.parametrize("first", STRATEGIES)
def test_each_strategy_after_each_other(pool: Any, first: str) -> None:
    others = [name for name in STRATEGIES if name != first]
    order = [name for other in others for name in (first, other)]
    for wrong in pool.run(4, serve, order=order, compiled=False):
        assert wrong == {}
