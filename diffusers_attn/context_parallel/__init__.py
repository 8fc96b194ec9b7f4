"""One attention call on several devices, exact and differentiable.

Read in this order:

1. `config`, `job` and `mesh`: which ranks take part. `nvlink`: whether their GPUs are linked.
2. `sequences`: which rank holds which tokens.
3. `comm`: how data moves, by `collectives` or, faster between GPUs of one machine, by `symmetric_gather`.
4. `attention`: `partial_kernel` and `merge` combine attention to parts of the keys. The strategies `ulysses`, `ring`
   and `allgather_kv` build on them, `parallel_attention` composes the strategies, and `entry` is what dispatch calls.
5. `hooks`: applies a plan to a module. Only `hooks/diffusers_hooks` imports diffusers.
6. `compile`: all of this in compiled graphs.
"""
