"""HiDream: image and three texts, joined in every block: T5's, the last layer of Llama's, and a layer per block.

The texts are split where they are projected. From their lengths, the model then makes ids for them and appends these to
the image's ids, which are replicated there. So the rotary embedding has the ids of this rank's text already. Ids of
text are all zero.
"""

from typing import Any

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_TEXT = ("t5", "llama", "llama")
_JOINED = ("image", *_TEXT)


def _projected(sequence: str) -> CPInput:
    # Zero tokens cannot be divided into samples.
    return CPInput(1, 3, split_output=True, sequence=sequence)


def _plan(model: Any) -> Plan:
    last = len(model.caption_projection) - 1
    return {
        "x_embedder": {ParamId(index=0): CPInput(1, 3, split_output=True, sequence="image")},
        **{f"caption_projection.{layer}": {ParamId(index=0): _projected("llama")} for layer in range(last)},
        f"caption_projection.{last}": {ParamId(index=0): _projected("t5")},
        "pe_embedder": {ParamId(index=0): CPInput(1, 6, split_output=True, sequence=_JOINED, split_already=_TEXT)},
        # Images that are not square are padded, and their keys multiplied by ones and zeros.
        "double_stream_blocks.*": {ParamId("hidden_states_masks"): CPInput(1, 2, sequence="image")},
        "single_stream_blocks.*": {
            ParamId("hidden_states_masks"): CPInput(1, 2, sequence=_JOINED, split_already=_TEXT),
        },
        "double_stream_blocks.*.block.attn1": CPAttention(_JOINED),
        "single_stream_blocks.*.block.attn1": CPAttention(_JOINED),
        "final_layer": CPOutput(1, 3, sequence="image"),
    }


PLANS = {"HiDreamImageTransformer2DModel": _plan}
