"""Kandinsky 5: self-attention over the video; cross-attention to text that all ranks have whole: local."""

from .plan import CPAbsent, CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Kandinsky5Transformer3DModel": {
        "": {
            ParamId("sparse_params"): CPAbsent(
                "every layer then chooses which blocks of the video see each other from queries and keys pooled over "
                "all of it, as a BlockMask that none of the strategies takes. Take a model whose attention_type is "
                "'regular', or run it on one device."
            )
        },
        "text_transformer_blocks.*.self_attention": CPAttention(query=()),
        "visual_transformer_blocks.0": {ParamId("visual_embed"): CPInput(1, 3, stream="video")},
        "visual_transformer_blocks.*": {ParamId("rope"): CPInput(1, stream="video")},
        "visual_transformer_blocks.*.self_attention": CPAttention(("video",)),
        "visual_transformer_blocks.*.cross_attention": CPAttention(("video",), key=()),
        # Behind it the tokens become frames, rows and columns again.
        "visual_transformer_blocks.-1": CPOutput(1, 3, stream="video"),
    },
}
