"""Transformers for molecules."""

from __future__ import annotations

import torch

from .case import BATCH, Draw, Inputs, case


@case(
    "rfd4_proteina",
    "RFD4ProteinaTransformer",
    notes="additive [batch, heads, tokens, tokens] bias, dense and different in every head",
    nlayers=2,
    token_dim=64,
    nheads=4,
    dim_cond=32,
    pair_repr_dim=32,
    latent_dim=8,
    token_type_emb_dim=8,
    t_emb_dim=32,
    seq_sep_dim=8,
    xt_pair_dist_dim=8,
    feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
    feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
    feats_pair_repr=("xt_bb_ca_pair_dists",),
    feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"),
    tri_mult_c=16,
    num_sequence_classes=11,
)
def rfd4_proteina(draw: Draw) -> Inputs:
    tokens = 35
    everywhere = torch.ones(BATCH, tokens, dtype=torch.bool, device=draw.device)
    return {
        "bb_ca": draw.normal(BATCH, tokens, 3),
        "local_latents": draw.normal(BATCH, tokens, 8),
        "bb_ca_time": draw.times(),
        "local_latents_time": draw.times(),
        "padding_mask": draw.mask((31, 23), tokens),
        "token_type": draw.integers(7, BATCH, tokens),
        "conditioning": {"is_in_context_conditioning": ~everywhere, "supports_local_latent": everywhere},
    }
