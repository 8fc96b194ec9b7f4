"""Motif-Video: video, image and text, joined in every block, with a mask; some blocks also attend to the text.

That attention takes the text's part of tokens and mask by the image's length, so all three are split separately, and
the mask with them. Blocks cut image and text off by their length, counted from the end, where a length of zero would
mean everything. The last blocks, if any, decode: the initial video, joined with the current one, without text or mask.
"""

from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, Entry, ParamId, Plan

_CONDITION = ("image", "text")
_JOINED = ("video", *_CONDITION)


def _plan(model: Any) -> Plan:
    single, decoders = model.config.num_single_layers, model.config.num_decoder_layers
    # After "rope", which sets the video's length.
    blocks: Entry = {
        ParamId("image_embed_seq_len"): advanced.CPLength("image"),
        ParamId("attention_mask"): CPInput(3, 4, sequence=_JOINED),
    }
    plan: dict[str, Any] = {
        "rope": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence="video"),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence="video"),
        },
        "transformer_blocks.*": blocks,
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence=_CONDITION),
        },
        "transformer_blocks.*.attn": CPAttention(_JOINED),
        "transformer_blocks.*.cross_attn?": CPAttention(("video",), key=("text",)),
        "proj_out": CPOutput(1, 3, sequence="video"),
    }
    for block in range(single - decoders):
        plan |= {
            f"single_transformer_blocks.{block}": blocks,
            f"single_transformer_blocks.{block}.attn": CPAttention(_JOINED),
            f"single_transformer_blocks.{block}.cross_attn?": CPAttention(("video",), key=("text",)),
        }
    for block in range(single - decoders, single):
        plan[f"single_transformer_blocks.{block}.attn"] = CPAttention(("video", "video"))
    if decoders:
        plan[f"single_transformer_blocks.{single - decoders}"] = {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video")
        }
    return plan


PLANS = {"MotifVideoTransformer3DModel": _plan}
