"""The models that compute the samples of a batch separately, so that groups of ranks may divide it.

`tests/guidance/test_batched.py` computes each of them sample by sample. A class that is not named here computes a batch
whole: `LuminaNextDiT2DModel`, `SanaWMTransformer3DModel` and `UVit2DModel` differ by float32 rounding, and
`HunyuanVideoFramepackTransformer3DModel` pads samples to a common length.
"""

from __future__ import annotations

from torch import nn

BATCHED = frozenset(
    """
    AceStepTransformer1DModel AllegroTransformer3DModel AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel
    AuraFlowTransformer2DModel BriaFibo2Transformer2DModel BriaFiboTransformer2DModel BriaTransformer2DModel
    ChromaTransformer2DModel ChronoEditTransformer3DModel CogVideoXTransformer3DModel CogView3PlusTransformer2DModel
    CogView4Transformer2DModel ConsisIDTransformer3DModel ControlNetModel CosmosTransformer3DModel
    DiTTransformer2DModel DreamLiteTransformer2DModel DreamLiteUNetModel EasyAnimateTransformer3DModel
    ErnieImageTransformer2DModel Flux2Transformer2DModel Flux3Transformer2DModel FluxControlNetModel
    FluxTransformer2DModel GlmImageTransformer2DModel HeliosTransformer3DModel HunyuanDiT2DControlNetModel
    HunyuanDiT2DModel HunyuanImageTransformer2DModel HunyuanVideo15Transformer3DModel HunyuanVideoTransformer3DModel
    I2VGenXLUNet Ideogram4Transformer2DModel JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel
    Kandinsky3UNet Kandinsky6SRTransformer3DModel Kandinsky6Transformer3DModel Krea2Transformer2DModel
    LTX2VideoTransformer3DModel LTXVideoTransformer3DModel LatteTransformer3DModel LongCatAudioDiTTransformer
    LongCatImageTransformer2DModel Lumina2Transformer2DModel MiniMaxMusic3RVQDepthDecoder
    MiniMaxMusic3Transformer1DModel MochiTransformer3DModel NucleusMoEImageTransformer2DModel
    OvisImageTransformer2DModel PRXTransformer2DModel PixArtTransformer2DModel PriorTransformer
    QwenImage21Transformer2DModel QwenImageControlNetModel QwenImageTransformer2DModel RFD4ProteinaTransformer
    SD3ControlNetModel SD3Transformer2DModel SanaControlNetModel SanaTransformer2DModel SanaVideoTransformer3DModel
    SanaWMLTX2RefinerTransformer3DModel SkyReelsV2Transformer3DModel StableAudio3DiTModel StableAudioDiTModel
    StableCascadeUNet Transformer2DModel UNet2DConditionModel UNet2DModel UNet3DConditionModel UNetControlNetXSModel
    UNetSpatioTemporalConditionModel WanAnimateTransformer3DModel WanTransformer3DModel WanVACETransformer3DModel
    ZImageTransformer2DModel
    """.split()
)


def divides_batch(model: nn.Module) -> bool:
    """Whether the samples of a batch may be computed apart."""
    return type(model).__name__ in BATCHED
