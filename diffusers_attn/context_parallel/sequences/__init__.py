"""The tokens of each rank, in one forward of a split model.

- `sharding`: shards, and how tensors are split and gathered; `placeholders` for ranks without a token.
- `tracker`: the state of a model's forward, made of `layout` (`lengths` and shards), `forwards` (running and nested
  forwards), `split_gather` and `attention_calls` (the shards of a call's queries and keys). `active` has the tracker
  that runs in this thread. Hooks of the model (`hooks.apply`) call `begin_forward`, which clears the layout of the
  forward before, and `end_forward`; hooks of an attention module (`hooks.words.attention`) call `begin_attention` and
  `end_attention`.
- What a call's tokens are: by `roles` in the plan, otherwise `find_by_length`, which `local_keys` checks.
  `module_names` names the running module in errors.
- Masks: `sharded_masks`, `rectangles`, `block_masks`; `causal_tiles` divides causal attention into calls that kernels
  support.
"""
