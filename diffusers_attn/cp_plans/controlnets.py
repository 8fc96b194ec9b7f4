"""ControlNets: half of a transformer's blocks, of the same classes, with a result for every block.

Sequences are split as in the transformer that a ControlNet controls. Each result is gathered: the pipeline scales and
adds results before it gives them to the transformer, whose plan splits them again.
"""

from typing import Any

from .hunyuan_dit import PLANS as HUNYUAN_DIT
from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan
from .qwenimage import PLANS as QWENIMAGE
from .sana import GATHERED, split_rows

IMAGE = CPInput(1, 3, sequence="image")
RESULT = CPOutput(1, 3, sequence="image")
JOINED = ("text", "image")


def _sana(model: Any) -> Plan:
    return {**split_rows(model), "controlnet_blocks.*": GATHERED}


def _sd3(model: Any) -> Plan:
    image: InputPlan = {ParamId(index=0): CPInput(1, 3, split_output=True, sequence="image")}
    common: Plan = {"pos_embed?": image, "pos_embed_input": image, "controlnet_blocks.*": RESULT}
    if model.context_embedder is None:  # 3.5: blocks of the image alone, which may be embedded before the call
        tokens = CPInput(1, 3, sequence="image", leave_other_dims=True)
        return {
            **common,
            "": {ParamId("hidden_states"): tokens},
            "transformer_blocks.*.attn": CPAttention(("image",)),
        }
    return {
        **common,
        "context_embedder": {ParamId(index=0): CPInput(1, 3, split_output=True, sequence="text")},
        "transformer_blocks.*.attn": CPAttention(("image", "text")),
        "transformer_blocks.*.attn2?": CPAttention(("image",)),
    }


PLANS: dict[str, Any] = {
    "FluxControlNetModel": {
        "": {ParamId("hidden_states"): IMAGE},
        "controlnet_x_embedder": {ParamId(index=0): IMAGE},
        # A union of ControlNets puts a token for its mode before the text: both are split where they are joined.
        "pos_embed": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence=JOINED),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence=JOINED),
        },
        "transformer_blocks.0": {ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text")},
        "transformer_blocks.*.attn": CPAttention(JOINED),
        "single_transformer_blocks.*.attn": CPAttention(JOINED),
        "controlnet_blocks.*": RESULT,
        "controlnet_single_blocks.*": RESULT,
    },
    "SD3ControlNetModel": _sd3,
    "QwenImageControlNetModel": {
        path: entry for path, entry in QWENIMAGE["QwenImageTransformer2DModel"].items() if path not in ("", "proj_out")
    }
    | {"controlnet_blocks.*": RESULT},
    "HunyuanDiT2DControlNetModel": {
        path: entry for path, entry in HUNYUAN_DIT["HunyuanDiT2DModel"].items() if path not in ("", "proj_out")
    }
    | {"controlnet_blocks.*": RESULT},
    "SanaControlNetModel": _sana,
}
