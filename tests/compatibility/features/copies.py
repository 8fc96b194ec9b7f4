"""Copies of a pipeline or its transformer: in memory, in files, on the Hub, and as exported programs."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import torch
from huggingface_hub import constants, hf_api
from torch import Tensor

from diffusers_attn.nested import mapped

from ...training.hub import hub
from ..feature import Feature, draw_wan
from .life import COMPILED, draw_video, video


def _transformer(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Puts what `change` makes of the transformer in its place."""

    def put(pipe: Any) -> None:
        pipe.transformer = change(pipe.transformer)

    return put


def _pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _saved(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, torch_dtype=torch.float64)


def _pushed(pipe: Any) -> list[Tensor]:
    """Calls a pipeline, and returns the bytes of the files that `push_to_hub` uploads, too."""
    results = draw_wan(pipe)
    with (
        hub() as there,
        mock.patch.multiple(
            constants,
            ENDPOINT=there.address,
            HUGGINGFACE_CO_URL_TEMPLATE=there.address + "/{repo_id}/resolve/{revision}/{filename}",
            HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=True,
        ),
        mock.patch.object(hf_api.api, "endpoint", there.address),
    ):
        pipe.transformer.push_to_hub("me/model", token="of nobody")
        files = there.files["me/model"]
    names = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert [name for name in sorted(files) if name != ".gitattributes"] == names
    return results + [torch.frombuffer(bytearray(files[name]), dtype=torch.uint8).double() for name in names]


def _exported(part: Callable[[Any], Any], draw: Callable[[Any], Any], **options: Any) -> Callable[[Any], list[Tensor]]:
    """Calls a pipeline, exports a module of it for the arguments of its first call, and runs the program."""

    def results(pipe: Any) -> list[Tensor]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        record = part(pipe).register_forward_pre_hook(
            lambda _, *call: calls.append(mapped(call, torch.clone)), with_kwargs=True
        )
        drawn = draw(pipe)
        record.remove()
        args, kwargs = calls[0]
        with torch.no_grad():
            program = torch.export.export(part(pipe), args, kwargs, **options).module()
            result = program(*args, **kwargs)
        return [*drawn, result[0] if isinstance(result, tuple) else result]

    return results


def _of_transformer(**options: Any) -> Feature:
    return Feature(draw=_exported(lambda pipe: pipe.transformer, draw_wan, **options), orders=("before",))


FEATURES = {
    "`from_pipe`": Feature(lambda pipe: diffusers.WanPipeline.from_pipe(pipe, torch_dtype=torch.float64)),
    "`copy.deepcopy`": Feature(_transformer(copy.deepcopy)),
    "`torch.save` and `torch.load`": Feature(_transformer(_pickled)),
    "`save_pretrained` and `from_pretrained`": Feature(_transformer(_saved)),
    "`push_to_hub`": Feature(draw=_pushed, orders=("before",)),
    "`torch.export`": _of_transformer(),
    "`torch.export(strict=True)`": _of_transformer(strict=True),
    "`torch.export` of the VAE's decoder": Feature(
        build=video,
        draw=_exported(lambda pipe: pipe.vae.decoder, draw_video),
        orders=("before",),
        tolerance=1e-3,
        not_under=COMPILED,
    ),
}
