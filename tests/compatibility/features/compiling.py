"""Compilation by `apply_compile`, torch.compile and diffusers' own method, before and after this library is put on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_attn import apply_compile

from ..feature import Feature, draw_wan
from ..ways import Counting


def _compiled(change: Callable[..., None], **options: Any) -> Feature:
    def put(pipe: Any) -> None:
        torch._dynamo.reset()
        pipe.backend = Counting()
        change(pipe, backend=pipe.backend, **options)

    return Feature(put, draw=_draw, not_under=("vae", "whole", "blocks", "blocks over ranks"))


def _draw(pipe: Any) -> list[Tensor]:
    before = pipe.backend.calls
    results = draw_wan(pipe)
    assert pipe.backend.calls > before, "nothing compiled has run"
    return results


def _ours(pipe: Any, **options: Any) -> None:
    apply_compile(pipe.transformer, **options)


def _repeated(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile_repeated_blocks(**options)


def _in_place(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile(**options)


def _replaced(pipe: Any, **options: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, **options)


FEATURES = {
    "`apply_compile(transformer)`": _compiled(_ours),
    "`compile_repeated_blocks(fullgraph=True)`": _compiled(_repeated, fullgraph=True),
    "`transformer.compile()`": _compiled(_in_place),
    "`torch.compile(transformer)`": _compiled(_replaced),
}
