"""Kandinsky 6: video and audio, both split. Each attends to itself and to the other; attention to its text is local.

Without audio, there is only the video.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Kandinsky6Transformer3DModel": {
        "video_text_transformer_blocks.*.attn": CPAttention(query=()),
        "audio_text_transformer_blocks.*.attn": CPAttention(query=()),
        "visual_transformer_blocks.0": {
            # Rotating queries infers a dimension, which needs at least one token.
            ParamId("vis"): CPInput(1, 3, sequence="video"),
            ParamId("aud"): CPInput(1, 3, sequence="audio"),
        },
        "visual_transformer_blocks.*": {
            ParamId("vis_rope"): CPInput(0, sequence="video"),
            ParamId("aud_rope"): CPInput(0, sequence="audio"),
        },
        "visual_transformer_blocks.*.video_dec_block.self_attention": CPAttention(("video",)),
        "visual_transformer_blocks.*.audio_dec_block.self_attention": CPAttention(("audio",)),
        "visual_transformer_blocks.*.video_dec_block.cross_attention": CPAttention(("video",), key=()),
        "visual_transformer_blocks.*.audio_dec_block.cross_attention": CPAttention(("audio",), key=()),
        "visual_transformer_blocks.*.va_cross_attention": CPAttention(("video",), key=("audio",)),
        "visual_transformer_blocks.*.av_cross_attention": CPAttention(("audio",), key=("video",)),
        # After it, the video's tokens become frames, rows and columns again.
        "visual_transformer_blocks.-1": [CPOutput(1, 3, sequence="video"), CPOutput(1, 3, sequence="audio")],
    },
}
