"""What happens to a pipeline besides: other sizes and batches, callbacks, threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_attn import attention_provider

from ... import tiny_pipelines
from ...guidance import families
from ..feature import Feature, wan


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


@functools.cache
def _alone() -> Tensor:
    return families.draw(wan(), "wan", seed=1)


def _beside_another(pipe: Any) -> list[Tensor]:
    """Calls a pipeline while another one is called in another thread, with a provider of its own. They wait for each
    other after each step, so that each has its steps within the other's call."""
    results, meeting = [], threading.Barrier(2, timeout=120)

    def meet(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        meeting.wait()
        return {}

    def other() -> None:
        with attention_provider("_native_math"):
            results.append(families.draw(wan(), "wan", seed=1, callback_on_step_end=meet))

    alone, thread = _alone(), threading.Thread(target=other)
    thread.start()
    try:
        own = families.draw(pipe, "wan", callback_on_step_end=meet)
    except BaseException:
        meeting.abort()
        raise
    finally:
        thread.join()
    assert (results[0] - alone).abs().max() < 1e-10 * alone.abs().max(), "the other pipeline's result is wrong"
    return [own]


def video() -> Any:
    pipe = tiny_pipelines.make("wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_video(pipe: Any) -> list[Tensor]:
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


COMPILED = ("whole", "blocks", "blocks over ranks")


def _of_vae(put: Callable[[Any], None], changes: bool) -> Feature:
    return Feature(put, build=video, draw=draw_video, plain=draw_video if changes else None, tolerance=1e-3,
                   not_under=COMPILED)  # fmt: skip


FEATURES = {
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
    "another pipeline in another thread at once": Feature(draw=_beside_another, orders=("before",)),
    "tiles of the VAE": _of_vae(_tiling, True),
    "slices of the VAE": _of_vae(lambda pipe: pipe.vae.enable_slicing(), False),
}
NOT_RUN = {
    "gradient checkpointing": "compared with gradients, in `tests/parallelize/test_enable.py`",
    "a server that takes another strategy for each request": "`tests/parallelize/test_switching.py` has every strategy "
    "after each other, also after requests that fail",
}
