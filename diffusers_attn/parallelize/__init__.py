"""Enables context parallelism for a pipeline or a model in one call, and disables it.

1. `enable`: the public functions.
2. `choices`: the models (`targets`), degrees and provider, compared between the ranks before any change. `decide`
   has the degrees that nobody named, by the rules in `degrees` and by the predictions of `cost`, which `workload`,
   `typical_tokens` and `measure_hardware` feed. `mesh_degrees` reads the degrees of a given mesh.
3. `attach`: changes one model, and undoes this. `guidance`: divides its guidance. `report`: what was chosen.
4. In every forward: `input_sync` keeps inputs equal. `call_inputs` describes them and `input_exchange` sends them, with
   `received`, `fingerprint`, `forward_count`, `model_sync` and `weight_kinds`. `record` records the forward as CUDA
   graphs.
5. `weights`: shards the weights of models over the ranks, and gathers them again.
"""
