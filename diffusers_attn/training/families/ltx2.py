"""LTX-2: videos of 8n + 1 frames with their sound; each has latents of its own, and both have noise of one level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..loss import Level
from ..settings.flag_names import option
from ..transfers import to_device
from .latents import Latents, Waveform
from .ltx import LTXVideo

FFT_LENGTH = 1024
"""Samples of a frame of the spectrogram. (Lightricks' trainer, https://github.com/Lightricks/LTX-2.)"""
QUIETEST = 1e-5
"""Smallest value of a spectrogram before the logarithm."""
OF_THE_VIDEO = ("attn1", "attn2")
"""Attention layers of a block that only the video needs."""


class LTX2(LTXVideo):
    """`LTX2Pipeline` with an `LTX2VideoTransformer3DModel`.

    With an `audio_weight` of 0 the video is trained alone: it does not attend to the sound, and the layers of the sound
    get no adapter.
    """

    text_length = 1024
    fps = 24.0
    pipelines = ("LTX2Pipeline",)
    learns_sound = True

    def check(self) -> None:
        self.conditioned = self.sound_rate is not None
        if self.sound_rate is None:
            self.without_gradient = "audio|a2v|av_cross_attn"
            self.lora_targets = tuple(f"{layer}.{each}" for layer in OF_THE_VIDEO for each in LTXVideo.lora_targets)

    def _text_length(self, wanted: int | None) -> int:
        found = super()._text_length(wanted)
        registers = self.pipeline.connectors.config.video_connector_num_learnable_registers
        if registers and found % registers:
            raise TrainingError(
                f"{option('max_sequence_length', found)}: this pipeline encodes multiples of {registers} text tokens."
            )
        return found

    @property
    def sound_rate(self) -> int | None:
        return self.pipeline.audio_vae.config.sample_rate if self.audio_weight else None

    @property
    def latents(self) -> dict[str, Latents]:
        if self.sound_rate is None:
            return super().latents
        audio = Latents(self.normalise_audio, self.audio_prediction, self.audio_loss, self.audio_weight)
        return {**super().latents, "audio_": audio}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return super().encoders | ({} if self.sound_rate is None else {"audio_vae": self.pipeline.audio_vae})

    @property
    def other_models(self) -> list[nn.Module]:
        return [*super().other_models, self.pipeline.connectors, self.pipeline.audio_vae, self.pipeline.vocoder]

    # ---- Data. As in Lightricks' trainer, latents are the means of both VAEs' distributions.

    def encode(self, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        found = {"latents_mean": super().encode(pixels)["latents_mean"]}
        if self.sound_rate is not None:
            found["latents_audio_mean"] = self._encode_sound(given["sound"], pixels.shape[2])
        return found

    def _encode_sound(self, waveform: Tensor, frames: int) -> Tensor:
        """Latents [batch, channels, length, mel bins] of sound [batch, channels, samples], for a video of `frames`
        frames: as many as the pipeline draws."""
        pipeline, vae = self.pipeline, self.pipeline.audio_vae
        factor = pipeline.audio_vae_temporal_compression_ratio
        length = round(frames / self.fps * pipeline.audio_sampling_rate / pipeline.audio_hop_length / factor)
        # The first latent has one frame of the spectrogram, each of the others `factor`.
        spectrogram = self._spectrogram(waveform)[:, :, : factor * (length - 1) + 1]
        with torch.no_grad():
            posterior = vae.encode(spectrogram.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean.float().cpu()

    def _spectrogram(self, waveform: Tensor) -> Tensor:
        """The log-mel spectrogram [batch, channels, length, mel bins] of sound [batch, channels, samples]."""
        from transformers import audio_utils

        config = self.pipeline.audio_vae.config
        filters = audio_utils.mel_filter_bank(
            FFT_LENGTH // 2 + 1,
            config.mel_bins,
            min_frequency=0.0,
            max_frequency=config.sample_rate / 2,
            sampling_rate=config.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        window = audio_utils.window_function(FFT_LENGTH, "hann")
        found = [
            audio_utils.spectrogram(
                each,
                window,
                FFT_LENGTH,
                config.mel_hop_length,
                power=1.0,
                mel_filters=filters,
                mel_floor=QUIETEST,
                log_mel="log",
            ).T
            for each in waveform.flatten(0, 1).numpy()
        ]
        return torch.from_numpy(np.stack(found)).unflatten(0, waveform.shape[:2])

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """The text inputs of the transformer: what the connectors make of the text encoder's layers, which is a
        hundredth of their size."""
        encoded = super().encode_text(captions)
        connectors = self.pipeline.connectors
        with torch.no_grad():
            text, audio_text, mask = connectors(
                *(encoded[name].to(connectors.device) for name in self.encoded),
                padding_side=self.pipeline.tokenizer.padding_side,
            )
        return {
            "prompt_embeds": text.cpu(),
            "audio_prompt_embeds": audio_text.cpu(),
            "prompt_attention_mask": mask.cpu(),
        }

    def normalise_audio(self, latents: Tensor) -> Tensor:
        """Scales the latents of the sound to the transformer's range."""
        pipeline, vae = self.pipeline, self.pipeline.audio_vae
        packed = pipeline._pack_audio_latents(latents)
        mean, std = to_device(vae.latents_mean, packed), to_device(vae.latents_std, packed)
        return self.audio_prediction(pipeline._normalize_audio_latents(packed, mean, std), latents.shape)

    # ---- The transformer

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        pipeline = self.pipeline
        if self.sound_rate is None:  # the transformer needs some, to which the video does not attend
            audio = noisy.new_zeros(len(noisy), 1, self.config.audio_in_channels)
        else:
            audio = pipeline._pack_audio_latents(text["audio_noisy"])
        return {
            "hidden_states": pipeline._pack_latents(noisy, self.config.patch_size, self.config.patch_size_t),
            "audio_hidden_states": audio,
            "encoder_hidden_states": text["prompt_embeds"],
            "audio_encoder_hidden_states": text["audio_prompt_embeds"],
            "timestep": timestep,
            "sigma": timestep,
            "encoder_attention_mask": text["prompt_attention_mask"],
            "audio_encoder_attention_mask": text["prompt_attention_mask"],
            "num_frames": noisy.shape[-3],
            "height": noisy.shape[-2],
            "width": noisy.shape[-1],
            "fps": self.fps,
            "audio_num_frames": audio.shape[1],
            "isolate_modalities": self.sound_rate is None,
            "use_cross_timestep": True,
        }

    def audio_prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        """Converts the transformer's output for the sound to the shape of its latents."""
        return self.pipeline._unpack_audio_latents(output, *shape[-2:])

    def audio_loss(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of the sound. A mask is one of the video's pixels."""
        return self.objective.loss(prediction, clean, noise, level)

    # ---- Generation

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
        # The pipeline's call runs the connectors.
        arguments = super().encode_text([prompt])
        if guided:
            negative = super().encode_text([negative_prompt or ""])
            arguments |= {f"negative_{name}": each for name, each in negative.items()}
        return arguments

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": scale, "audio_guidance_scale": scale}

    def drawn_sound(self, output: Any) -> Waveform:
        return Waveform(output.audio[0], self.pipeline.vocoder.config.output_sampling_rate)
