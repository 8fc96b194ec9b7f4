"""What happens to a pipeline besides: copies, files, other sizes and batches, callbacks, threads."""

from __future__ import annotations

import copy
import io
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffusers_attn.nested import mapped

from ... import tiny_pipelines
from ...guidance import families
from ..feature import Feature, draw_wan


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


def _calls(*calls: dict[str, Any]) -> Callable[[Any], list[Tensor]]:
    return lambda pipe: [families.draw(pipe, "wan", **call) for call in calls]


def _changes_latents(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
    return {"latents": kept["latents"] * 1.5}


def _interrupts(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 1
    return {}


def _in_a_thread(pipe: Any) -> list[Tensor]:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(families.draw(pipe, "wan")))
    thread.start()
    thread.join()
    return results


def _in_threads_one_after_the_other(pipe: Any) -> list[Tensor]:
    return [families.draw(pipe, "wan"), *_in_a_thread(pipe), families.draw(pipe, "wan", seed=1)]


def _video() -> Any:
    pipe = tiny_pipelines.make("wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw_video(pipe: Any) -> list[Tensor]:
    with torch.no_grad():
        call = pipe(
            prompt_embeds=torch.ones(2, 4, 32), negative_prompt_embeds=torch.zeros(2, 4, 32), num_frames=5, height=48,
            width=64, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return [call.frames]


def _tiling(pipe: Any) -> None:
    pipe.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24, tile_sample_stride_width=24
    )


_COMPILED = ("whole", "blocks", "blocks over ranks")


def _of_vae(put: Callable[[Any], None], changes: bool) -> Feature:
    return Feature(put, build=_video, draw=_draw_video, plain=_draw_video if changes else None, tolerance=1e-3,
                   not_under=_COMPILED)  # fmt: skip


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
    "other sizes between calls": Feature(
        draw=_calls({}, {"height": 112}, {"num_frames": 9, "width": 64}, {}), orders=("before",)
    ),
    "several prompts, several videos of one": Feature(
        draw=_calls({"prompts": 2}, {"num_videos_per_prompt": 2}, {}), orders=("before",)
    ),
    "a callback that changes latents": Feature(
        draw=_calls({"callback_on_step_end": _changes_latents}, {}), orders=("before",)
    ),
    "a callback that interrupts": Feature(draw=_calls({"callback_on_step_end": _interrupts}, {}), orders=("before",)),
    "calls in another thread": Feature(draw=_in_threads_one_after_the_other, orders=("before",)),
    "tiles of the VAE": _of_vae(_tiling, True),
    "slices of the VAE": _of_vae(lambda pipe: pipe.vae.enable_slicing(), False),
    "`torch.export`": _of_transformer(),
    "`torch.export(strict=True)`": _of_transformer(strict=True),
    "`torch.export` of the VAE's decoder": Feature(
        build=_video,
        draw=_exported(lambda pipe: pipe.vae.decoder, _draw_video),
        orders=("before",),
        tolerance=1e-3,
        not_under=_COMPILED,
    ),
}
NOT_RUN = {
    "`device_map`": "it needs GPUs",
    "gradient checkpointing": "compared with gradients, below",
}
