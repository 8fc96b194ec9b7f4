"""One attention call over several ranks: Ulysses, ring, gathered keys and values, or Ulysses with a ring.

Read in this order:

1. `entry`: what dispatch calls. It finds the call's shards and mask.
2. `parallel_attention`: exchanges heads (`ulysses`), then attends over the ring with one of the strategies.
   `call_checks` refuses calls that do not fit before anything is sent.
3. `ring`, `allgather_kv` and `allgather_kv_one_call`: the strategies, with `kv_exchange` for transfers.
4. `block_attention`, `partial_kernel` and `merge`: attention to one block of keys after another, and its merged result.
   `merge_triton` merges on a GPU in eager mode.

`traffic` logs the strategy of a call and the bytes that it sends.
"""
