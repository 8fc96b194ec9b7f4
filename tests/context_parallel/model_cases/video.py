"""Models of videos for which diffusers ships no plan; and Sana, the picture's."""

import torch

from diffusers_attn.tiny_models.case import BATCH, FRAMES, GRID, VIDEO_TOKENS

from .shipped import two_words

MODELS = {
    "hunyuan_video": None,
    "hunyuan_video, two words": None,
    "hunyuan_video, first frame given": None,
    "hunyuan_video15": None,
    "hunyuan_video15, without an image": None,
    "hunyuan_video_framepack": None,
    "hunyuan_video_framepack, one sample": None,
    "wan_vace": None,
    "wan_animate": None,
    "skyreels_v2": None,
    "skyreels_v2, image": None,
    "skyreels_v2_causal": None,
    "mochi": None,
    "mochi, two words": None,
    "anyflow": None,
    "cosmos": None,
    "cosmos, times and control": None,
    "cosmos2_5": None,
    "easyanimate": None,
    "easyanimate, two words": None,
    "consisid": None,
    "motif_video": None,
    "motif_video, two words": None,
    "motif_video, text alone": None,
    "motif_video, decoder": None,
    "allegro": None,
    "allegro, rotated and masked": None,
    "latte": None,
    "temporal": None,
    "kandinsky5": None,
    "kandinsky6": None,
    "kandinsky6, silent": None,
    "sana": None,
    "sana, control": None,
    "sana_sprint": None,
    "sana_video": None,
    "sana_video, first frame given": None,
    "sana_wm": None,
    "sana_wm, camera": None,
    "sana_wm, camera and coordinates": None,
    "sana_wm, camera, two heads": None,
    "sana_wm_refiner": None,
    "sana_wm_refiner, rotated by heads": None,
}


def two_words_masked(inputs, draw):
    """Fewer tokens than there are ranks, one of them padding in one sample."""
    two_words(inputs, draw)
    inputs["encoder_attention_mask"] = draw.mask((1, 2), 2)


def without_an_image(inputs, draw):
    inputs["image_embeds"] = torch.zeros_like(inputs["image_embeds"])


def one_sample(inputs, draw):
    """Its padding is cut off, and there is no mask."""
    for name, value in inputs.items():
        if value.ndim > 1 or name in ("timestep", "guidance"):
            inputs[name] = value[:1]


def image(inputs, draw):
    inputs["hidden_states"] = draw.normal(BATCH, 12, *inputs["hidden_states"].shape[2:])
    inputs["encoder_hidden_states"] = draw.normal(BATCH, 512, 32)
    inputs["encoder_hidden_states_image"] = draw.normal(BATCH, 17, 24)


def times_and_control(inputs, draw):
    inputs["timestep"] = (draw.steps()[:, None] + 4 * torch.arange(FRAMES))[:, None, :, None, None]
    inputs["block_controlnet_hidden_states"] = [draw.normal(BATCH, VIDEO_TOKENS, 64) for _ in range(2)]


def text_alone(inputs, draw):
    del inputs["image_embeds"], inputs["encoder_attention_mask"]


def rotated_and_masked(inputs, draw):
    """As the pipeline rotates: tables of angles, and a token's place in each. Half of the last frame is no video."""
    places = draw.grid(FRAMES, *GRID).T[:, None].unbind()
    tables = tuple(draw.rotation(size, 8) for size in (FRAMES, *GRID))
    mask = torch.ones(BATCH, FRAMES, 2 * GRID[0], 2 * GRID[1])
    mask[1, -1, GRID[0] :] = 0
    inputs |= {"image_rotary_emb": (tables, places), "attention_mask": mask.to(draw.dtype)}


def silent(inputs, draw):
    del inputs["audio_hidden_states"]


def control(inputs, draw):
    inputs["controlnet_block_samples"] = (draw.normal(BATCH, GRID[0] * GRID[1], 32),)


def first_frame_given(inputs, draw):
    """As the pipeline says that it has no noise: a time for every token. And control."""
    noise = torch.ones(BATCH, 1, FRAMES, *GRID)
    noise[:, :, 0] = 0
    inputs["timestep"] = draw.steps()[:, None, None, None, None] * noise
    inputs["controlnet_block_samples"] = (draw.normal(BATCH, VIDEO_TOKENS, 64),)


def camera(inputs, draw):
    """As the pipeline gives it: poses and intrinsics of every frame. The model makes rays of it in float32, which is
    done before. The last frame of one sample is left out."""
    from diffusers.models.transformers.transformer_sana_wm import _invert_SE3, _process_camera_conditions_ucpe

    turns, _ = torch.linalg.qr(draw.normal(BATCH, FRAMES, 3, 3))
    poses = torch.eye(4, dtype=draw.dtype).repeat(BATCH, FRAMES, 1, 1)
    poses[..., :3, :3], poses[..., :3, 3] = turns, draw.normal(BATCH, FRAMES, 3)
    intrinsics = draw.floats(6.0, 6.0, 3.5, 2.5).expand(BATCH, FRAMES, 4)
    inputs["camera_conditions"] = torch.cat([poses.flatten(2), intrinsics], dim=-1)
    rays, horizon = _process_camera_conditions_ucpe(inputs["camera_conditions"], BATCH, (FRAMES, *GRID), (1, 1, 1))
    rays = rays.reshape(BATCH, -1, 4, 4)
    horizon = horizon.permute(0, 4, 1, 2, 3).to(draw.dtype)
    inputs["cam_pos_embeds"] = {"absmap": horizon, "P": rays, "P_inv": _invert_SE3(rays)}
    inputs["frame_valid_mask"] = draw.mask((FRAMES, FRAMES - 1), FRAMES).float()


def camera_and_coordinates(inputs, draw):
    """Also coordinates of its rays behind every attention; and another form of the mask."""
    camera(inputs, draw)
    inputs["chunk_plucker"] = draw.normal(BATCH, 6, FRAMES, *GRID)
    inputs["frame_valid_mask"] = inputs["frame_valid_mask"][:, None, :, None, None]


def camera_and_one_time(inputs, draw):
    camera(inputs, draw)
    del inputs["frame_valid_mask"]  # which needs a time for each
    inputs["timestep"] = inputs["timestep"][..., :1]


def rotated_by_heads(inputs, draw):
    inputs["video_rotary_emb"] = tuple(
        part.reshape(VIDEO_TOKENS, 4, 8).transpose(0, 1).repeat(BATCH, 1, 1, 1)
        for part in draw.rotation(VIDEO_TOKENS, 32)
    )


VARIANTS = {
    "hunyuan_video, two words": ({}, two_words_masked),
    "hunyuan_video, first frame given": ({"image_condition_type": "token_replace"}, None),
    "hunyuan_video15, without an image": ({}, without_an_image),
    "hunyuan_video_framepack, one sample": ({}, one_sample),
    "skyreels_v2, image": ({"in_channels": 12, "image_dim": 24, "added_kv_proj_dim": 64}, image),
    "cosmos, times and control": ({"controlnet_block_every_n": 1}, times_and_control),
    "mochi, two words": ({}, two_words_masked),
    "easyanimate, two words": ({}, two_words),
    "motif_video, two words": ({}, two_words_masked),
    "motif_video, text alone": ({}, text_alone),
    "motif_video, decoder": ({"num_single_layers": 3, "num_decoder_layers": 2}, None),
    "allegro, rotated and masked": ({}, rotated_and_masked),
    "kandinsky6, silent": ({}, silent),
    "sana, control": ({}, control),
    "sana_video, first frame given": ({}, first_frame_given),
    "sana_wm, camera": ({}, camera),
    "sana_wm, camera and coordinates": (
        {"k_conv_only": False, "use_chunk_plucker_post_attn": True, "chunk_plucker_channels": 6, "conv_kernel_size": 2},
        camera_and_coordinates,
    ),
    "sana_wm, camera, two heads": ({"linear_head_dim": 32, "t_kernel_size": 5}, camera_and_one_time),
    "sana_wm_refiner, rotated by heads": ({"rope_type": "split"}, rotated_by_heads),
}
