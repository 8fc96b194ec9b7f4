"""PRX: the image attends to text and image. The text is the same before every block, and split before each."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "PRXTransformer2DModel": {
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="image")},
        "blocks.*": {
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
            ParamId("image_rotary_emb"): CPInput(2, 6, sequence="image"),
            ParamId("attention_mask"): CPInput(1, 2, sequence="text"),
        },
        "blocks.*.attention": CPAttention(("image",), key=("text", "image")),
        "final_layer": CPOutput(1, 3, sequence="image"),
    },
}
