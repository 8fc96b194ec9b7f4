"""SANA-WM: every layer has two branches, for video and camera, recurrent over frames or with softmax attention.

Cross-attention to replicated text is local; convolutions run over space and time.

The split entries are frames. Per-frame work stays local, such as the mean of a frame's pixels and the convolution over
space; the convolutions over time read a few frames beyond a shard. The recurrence passes a state from frame to frame,
which ranks could only compute one after the other. But each head has its own state, so ranks exchange frames for heads
around it, as Ulysses does around attention. Softmax layers have the same form and attend outside of any processor, so
they are treated the same way, with their own kernel, on every mesh. (Their kernel gets bfloat16 in a float32 model, so
a comparison with one process shows its rounding.)

Rotary embeddings and the camera's rays are used only inside these branches, and stay replicated.
"""

from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, Entry, ParamId, Plan

_FRAMES = CPInput(1, 3, sequence="frames", grouped=True)
_TIMES = CPInput(2, 4, sequence="frames", leave_other_dims=True)  # one for all frames, or one per frame
_BY_TOKEN = {"query": (1, 2), "key": (1, 2), "value": (1, 2)}
_BY_FRAME = {"beta": (2, 1), "decay": (2, 1)}


def _number_of_frames(latents: Any) -> int:
    """Number of frames. The model has no patches of several frames."""
    return int(latents.shape[2])


def _plan(model: Any) -> Plan:
    plan: dict[str, Any] = {
        "": {ParamId("hidden_states"): advanced.CPLength("frames", of=_number_of_frames)},
        "blocks.0": {ParamId("x"): _FRAMES},
        "blocks.*": [
            {
                ParamId("t"): _TIMES,
                ParamId("THW"): [advanced.CPLength("frames"), None, None],
                ParamId("plucker_emb"): _FRAMES,
                ParamId("frame_valid_mask"): CPInput(2, 5, sequence="frames", leave_other_dims=True),
            },
            # It has three forms: with pixels, without pixels, and without pixels and channels.
            {ParamId("frame_valid_mask"): CPInput(2, 3, sequence="frames", leave_other_dims=True)},
            {ParamId("frame_valid_mask"): CPInput(1, 2, sequence="frames", leave_other_dims=True)},
        ],
        "blocks.*.cross_attn": CPAttention(("frames",), key=()),
        "blocks.*.mlp?.t_conv?": advanced.CPHalo(2, model.config.t_kernel_size // 2, sequence="frames"),
        "final_layer": [{ParamId("t"): _TIMES}, CPOutput(1, 3, sequence="frames", grouped=True)],
    }
    # A short convolution runs once forwards and once backwards.
    in_time = advanced.CPHalo(1, max(model.config.conv_kernel_size - 1, 0), "frames", grouped=True, length="num_frames")
    for of in ("q", "k", "v"):
        plan |= {f"blocks.*.attn.conv_{of}{camera}?": in_time for camera in ("", "_cam")}
    for index, block in enumerate(model.blocks):
        every = model.config.softmax_every_n
        recurrent = every <= 0 or (index + 1) % every != 0
        plan[f"blocks.{index}.attn.attn"] = plan[f"blocks.{index}.attn.cam_attn"] = _by_heads(block, recurrent)
    return plan


def _by_heads(block: Any, recurrent: bool) -> list[Entry]:
    """Entries for one branch of a layer."""
    inputs: dict[ParamId | str | int, Any] = {
        ParamId("token_valid_mask"): advanced.CPGatherInput(1, 2, sequence="frames", grouped=True),
    }
    if recurrent:
        inputs |= {
            ParamId("num_frames"): advanced.CPLength("frames", full=True),
            ParamId("beta_valid_mask"): advanced.CPGatherInput(2, 4, sequence="frames"),
            ParamId("decay_valid_mask"): advanced.CPGatherInput(2, 3, sequence="frames"),
        }
    arguments = _BY_TOKEN | _BY_FRAME if recurrent else _BY_TOKEN
    return [inputs, advanced.CPHeads("frames", block.attn.heads, arguments, output=(1, 2))]


PLANS = {"SanaWMTransformer3DModel": _plan}
