"""MiniMax H3: text, audio and video, packed into one sequence.

The model packs them, and takes video and audio out again, by their positions in the full sequence. So the sequence is
split after the former and gathered before the latter.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "MiniMaxH3Transformer3DModel": {
        "rope": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence="packed"),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence="packed"),
        },
        # The text attends to itself before it is packed.
        "token_refiner.refiner_blocks.*.attn": CPAttention(query=()),
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="packed")},
        "transformer_blocks.*": {ParamId("adaln_indices"): CPInput(0, 1, sequence="packed")},
        "transformer_blocks.*.attn": CPAttention(("packed",)),
        "norm_out": {ParamId("timestep_indices"): CPInput(0, 1, sequence="packed")},
        "proj_out": CPOutput(1, 3, sequence="packed"),
        "audio_proj_out": CPOutput(1, 3, sequence="packed"),
    },
}
