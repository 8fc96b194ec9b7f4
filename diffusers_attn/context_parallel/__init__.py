"""One attention call on several devices, exact and differentiable.

Read in this order: `config` and `mesh` (which ranks take part), `sequences` (which rank holds which tokens), `comm` (how
data moves: `collectives`; between GPUs of one machine also `symmetric_gather`, which is faster), `attention`
(`partial_kernel` and `merge` combine attention to parts of the keys; on them stand the strategies `ulysses`, `ring` and
`allgather_kv`; `parallel_attention` composes these, and `entry` is what dispatch calls), `hooks` (applies a plan to a
module). Only `hooks/diffusers_hooks.py` imports diffusers.
"""
