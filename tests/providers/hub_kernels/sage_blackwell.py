"""`api` of SageAttention/sage-blackwell, version 1, on the CPU and without quantising."""

from . import attention


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    k -= k.mean(dim=-2, keepdim=True)
    tensors = (each.transpose(1, 2) for each in (q, k, v))
    return attention.forward(*tensors, q.shape[-1] ** -0.5, is_causal)[0].transpose(1, 2).contiguous()
