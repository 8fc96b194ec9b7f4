"""`diffusers-attn train`: the trainer (`diffusers_attn.training`), on one process or on several."""
