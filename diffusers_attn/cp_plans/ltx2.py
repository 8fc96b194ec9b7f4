"""LTX 2: video and audio, both split. Each attends to itself and to the other; attention to replicated text is local.

If the audio were replicated, its attention to the video would be the only call with replicated queries and split keys.
"""

from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan


def _rotary(sequence: str) -> InputPlan:
    # [batch, tokens, channels]; with rope_type="split", [batch, heads, tokens, channels].
    split = CPInput(-2, split_output=True, sequence=sequence)
    return {ParamId(index=0): split, ParamId(index=1): split}


def _time(sequence: str) -> CPInput:
    # One per token if frames are given, else one per sample.
    return CPInput(1, 2, sequence=sequence, leave_other_dims=True)


PLANS: dict[str, Plan] = {
    "LTX2VideoTransformer3DModel": {
        "": {
            # Reshaping rotated queries and times infers a dimension, which needs at least one token.
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("audio_hidden_states"): CPInput(1, 3, sequence="audio"),
            ParamId("timestep"): _time("video"),
            ParamId("audio_timestep"): _time("audio"),
            ParamId("video_keyframes_mask"): CPInput(1, 3, sequence="video"),
            # Queries by keys: a rank takes its queries' rows.
            ParamId("video_self_attention_mask"): CPInput(1, 3, sequence="video"),
        },
        "rope": _rotary("video"),
        "cross_attn_rope": _rotary("video"),
        "audio_rope": _rotary("audio"),
        "cross_attn_audio_rope": _rotary("audio"),
        "transformer_blocks.*.attn1": CPAttention(("video",), row_mask=True),
        "transformer_blocks.*.audio_attn1": CPAttention(("audio",)),
        "transformer_blocks.*.attn2": CPAttention(("video",), key=()),
        "transformer_blocks.*.audio_attn2": CPAttention(("audio",), key=()),
        "transformer_blocks.*.audio_to_video_attn": CPAttention(("video",), key=("audio",)),
        "transformer_blocks.*.video_to_audio_attn": CPAttention(("audio",), key=("video",)),
        "proj_out": CPOutput(1, 3, sequence="video"),
        "audio_proj_out": CPOutput(1, 3, sequence="audio"),
    },
}
