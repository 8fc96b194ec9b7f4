"""Mochi: video and text, joined in every block, with a mask of the text. Both have embedders of their own, before.

diffusers' processor attends sample by sample, each with as much of the text as is no padding; bound to a provider, it
makes one call of it with a key mask (see processors/mochi.py), which is what can be split. Padding has to be behind the
text, where tokenizers put it: diffusers moves what is in front of it to where the padding was, from rank to rank.
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
