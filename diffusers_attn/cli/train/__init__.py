"""`diffusers-attn train`: the trainer (`diffusers_attn.training`), on one process or on several.

`command` starts the processes; all other options are the trainer's.
"""
