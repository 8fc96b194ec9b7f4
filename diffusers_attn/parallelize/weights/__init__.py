"""Shards the weights of a pipeline's models over ranks, with FSDP2 (`enable_context_parallel(shard_weights=...)`).

Each rank holds an equal part of every large weight. Before a block runs, the ranks gather its weights; after it, they
free them. The gather of the next block runs while a block computes.

- `select`: the components to shard, and refusals. `units`: the parts of a model whose weights are gathered together.
- `loading`: brings weights to the device, from CPU memory or, for models on the meta device, from their files.
- `fsdp`: applies FSDP2 to a model and takes it off. Only this file touches private names of FSDP2.
- `sharded_module`: operations on a sharded model that would be wrong raise an error.
- `shard`: the steps in their order.
"""
