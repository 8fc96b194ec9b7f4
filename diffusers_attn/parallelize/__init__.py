"""Enables context parallelism for a pipeline or a model in one call, and disables it.

1. `enable`: the public functions.
2. `choices`: what this call will do, from its arguments alone: the models (`targets`), the provider, and the degrees
   if only one pair is possible. The ranks compare their choices before any change (`same_choices`).
3. `decide`: the degrees otherwise. It measures the devices and links (`measure_hardware`, by `hardware_bench`), and
   gives every rank the decision of the first. `degrees` has the rules and the comparison of predicted times, without
   any exchange; `cost` predicts a time, from a `workload` and `typical_tokens`. `mesh_degrees` reads the degrees of a
   given mesh.
4. `attach`: changes one model, and undoes this. `guidance`: divides its guidance. `report`: what was chosen.
5. In every forward: `input_sync` keeps inputs equal. `call_inputs` describes them and `input_exchange` sends them, with
   `received`, `fingerprint`, `forward_count`, `model_sync` and `weight_kinds`. `record` records the forward as CUDA
   graphs.
6. `weights`: shards the weights of models over the ranks, and gathers them again.
"""
