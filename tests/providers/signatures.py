"""The functions of the attention packages that adapters call: their parameters, read from the sources of the versions.

Facts about other people's packages, most of which can be neither installed nor imported without a GPU. In each, what
stands before "/" must be given, what follows may be, and what follows "*" only by name.
"""

from __future__ import annotations

import inspect

PARAMETERS = {
    "flash-attn 2.6.3": {
        "_flash_attn_forward": ("q k v dropout_p softmax_scale causal window_size softcap alibi_slopes return_softmax"),
        "_flash_attn_varlen_forward": (
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal / window_size "
            "softcap alibi_slopes return_softmax block_table leftpad_k seqused_k"
        ),
        "_flash_attn_backward": (
            "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size softcap alibi_slopes "
            "deterministic / rng_state"
        ),
        "_flash_attn_varlen_backward": (
            "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
            "softmax_scale causal window_size softcap alibi_slopes deterministic / rng_state"
        ),
    },
    "flash-attn 2.7.0": {
        "_flash_attn_forward": (
            "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
            "return_softmax"
        ),
        "_flash_attn_varlen_forward": (
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal / "
            "window_size_left window_size_right softcap alibi_slopes return_softmax block_table leftpad_k seqused_k"
        ),
        "_flash_attn_backward": (
            "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right "
            "softcap alibi_slopes deterministic / rng_state"
        ),
        "_flash_attn_varlen_backward": (
            "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
            "softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic / rng_state"
        ),
    },
    "flash-attn 2.8.3": {
        "_flash_attn_forward": (
            "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
            "return_softmax"
        ),
        "_flash_attn_varlen_forward": (
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal / "
            "window_size_left window_size_right softcap alibi_slopes return_softmax block_table leftpad_k seqused_k "
            "zero_tensors"
        ),
        "_flash_attn_backward": (
            "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right "
            "softcap alibi_slopes deterministic / rng_state"
        ),
        "_flash_attn_varlen_backward": (
            "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
            "softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic / rng_state "
            "zero_tensors"
        ),
    },
    "flash-attn-3 3.0.0": {
        "_flash_attn_forward": (
            "q k v / k_new v_new qv out_ cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q "
            "max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale "
            "v_descale softmax_scale causal window_size_left window_size_right attention_chunk softcap "
            "rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin"
        ),
        "_flash_attn_backward": (
            "dout q k v out softmax_lse / cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk "
            "dv softmax_scale is_causal window_size_left window_size_right softcap deterministic sm_margin"
        ),
    },
    "flash-attn-4 4.0.0b36": {
        "_flash_attn_fwd": (
            "q k v / qv cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k min_seqlen_k "
            "page_table softmax_scale causal softcap window_size_left window_size_right learnable_sink tile_mn "
            "mma_pv_is_rs intra_wg_overlap num_threads num_splits pack_gqa _arch score_mod mask_mod "
            "block_sparse_tensors return_lse out lse aux_tensors aux_scalars q_descale k_descale v_descale "
            "gather_kv_indices scheduler_metadata seqlen_k_per_split disable_scheduler_metadata "
            "gather_bwd_recompute_p"
        ),
        "_flash_attn_bwd": (
            "q k v out dout lse / softmax_scale causal softcap window_size_left window_size_right m_block_size "
            "n_block_size num_threads pack_gqa num_stages_Q num_stages_dO SdP_swapAB dKV_swapAB dQ_swapAB "
            "AtomLayoutMSdP AtomLayoutNdKV AtomLayoutMdQ V_in_regs cu_seqlens_q cu_seqlens_k seqused_q seqused_k "
            "max_seqlen_q max_seqlen_k deterministic dq dk dv score_mod score_mod_bwd mask_mod aux_tensors "
            "aux_scalars block_sparse_tensors dlse learnable_sink"
        ),
    },
    "sageattention 2.2.0": {
        "sageattn": "q k v / tensor_layout is_causal sm_scale return_lse",
        "sageattn_varlen": ("q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k / is_causal sm_scale smooth_k"),
        "sageattn_qk_int8_pv_fp16_triton": (
            "q k v / tensor_layout quantization_backend is_causal attn_mask sm_scale smooth_k return_lse"
        ),
        "sageattn_qk_int8_pv_fp16_cuda": (
            "q k v / tensor_layout is_causal qk_quant_gran sm_scale pv_accum_dtype smooth_k smooth_v return_lse"
        ),
        "sageattn_qk_int8_pv_fp8_cuda": (
            "q k v / tensor_layout is_causal qk_quant_gran sm_scale pv_accum_dtype smooth_k smooth_v return_lse"
        ),
        "sageattn_qk_int8_pv_fp8_cuda_sm90": (
            "q k v / tensor_layout is_causal qk_quant_gran sm_scale pv_accum_dtype smooth_k return_lse"
        ),
    },
    "sageattn3 1.0.0": {"sageattn3_blackwell": "q k v / attn_mask is_causal per_block_mean"},
    "xformers 0.0.35": {
        "memory_efficient_attention_forward_requires_grad": ("query key value / attn_bias p scale * op output_dtype"),
        "memory_efficient_attention_backward": "grad output lse query key value / attn_bias p scale * op",
    },
}


def signature(package: str, function: str) -> inspect.Signature:
    """That of `function` in `package`, for binding a call. Without `**kwargs`: what those swallow has no effect."""
    needed, _, rest = PARAMETERS[package][function].partition(" / ")
    optional, _, keywords = rest.partition(" * ")
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, positional) for name in needed.split()]
        + [inspect.Parameter(name, positional, default=None) for name in optional.split()]
        + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in keywords.split()]
    )
