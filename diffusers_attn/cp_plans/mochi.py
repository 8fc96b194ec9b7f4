"""Mochi: video and text, joined in every block, with a mask of the text. Each is embedded by its own module.

diffusers' processor attends sample by sample, each with its valid text tokens only. Bound to a provider, it makes one
call with a key mask instead (see processors/mochi.py), which can be split. Padding must come after the text, where
tokenizers put it: diffusers moves tokens after padding to its place, possibly to another rank.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "MochiTransformer3DModel": {
        "rope": {
            ParamId(index=0): CPInput(0, 3, split_output=True, sequence="video"),
            ParamId(index=1): CPInput(0, 3, split_output=True, sequence="video"),
        },
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*": {ParamId("encoder_attention_mask"): CPInput(1, 2, sequence="text")},
        "transformer_blocks.*.attn1": CPAttention(("video", "text")),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
