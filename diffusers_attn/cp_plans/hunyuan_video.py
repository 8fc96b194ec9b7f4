"""HunyuanVideo: video and text, joined in every block, with a mask of the text. The replicated text is refined first.

Blocks cut the text off by its length, counted from the end, where a length of zero would mean everything. With
`token_replace`, the first frame is given and modulated separately. Its tokens are a sequence of their own, so that a
rank has the right length of it.
"""

from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan


def joined(*video: str) -> Plan:
    """Attention of double and single blocks. Their key mask is replicated."""
    attention = CPAttention((*video, "text"), key_mask=True)
    return {
        "context_embedder.token_refiner.refiner_blocks.*.attn": CPAttention(query=()),
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence=video),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*.attn": attention,
        "single_transformer_blocks.*.attn": attention,
    }


def rotated(*video: str, lengths: InputPlan | None = None) -> Plan:
    """cos and sin of the video's tokens, split for every block, after the lengths of their sequences."""
    rotary, lengths = CPInput(0, 2, sequence=video), lengths or {}
    return {
        "transformer_blocks.*": {**lengths, ParamId("freqs_cis"): rotary},
        "single_transformer_blocks.*": {**lengths, ParamId("image_rotary_emb"): rotary},
    }


def _plan(model: Any) -> Plan:
    if model.config.image_condition_type == "token_replace":
        video = ("first_frame", "video")
        plan = rotated(*video, lengths={ParamId("num_tokens"): advanced.CPLength("first_frame")})
        return {**plan, **joined(*video), "proj_out": CPOutput(1, 3, sequence=video)}
    rotary = CPInput(0, 2, split_output=True, sequence="video")
    return {
        "rope": {ParamId(index=0): rotary, ParamId(index=1): rotary},
        **joined("video"),
        "proj_out": CPOutput(1, 3, sequence="video"),
    }


PLANS = {"HunyuanVideoTransformer3DModel": _plan}
