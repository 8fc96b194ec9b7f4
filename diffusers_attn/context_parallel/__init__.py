"""One attention call on several devices, exact and differentiable.

Read in this order: `config` and `mesh` say who takes part, `sharding` who holds which tokens, `collectives` how data
moves (`transport`, `symmetric_gather` and `symmetric`: a faster way between GPUs of one machine); `partial_kernel`,
`causal`, `merge` and `blocks` make attention to all keys from attention to parts of them. On these stand the strategies
`ulysses`, `ring` and `allgather_kv`; `parallel_attention` composes them and is what dispatch calls. `hooks` applies a
plan to a module. Nothing in here knows diffusers.
"""
