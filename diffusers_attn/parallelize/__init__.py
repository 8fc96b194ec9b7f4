"""Enables context parallelism for a pipeline or a model in one call, and disables it.

1. `enable`: the public functions.
2. `choices`: the models (`targets`), degrees (`degrees`) and provider, compared between the ranks before any change.
3. `attach`: changes one model, and undoes this. `report`: what was chosen.
4. In every forward: `input_sync` keeps inputs equal, with `received`, `fingerprint`, `forward_count`, `model_sync` and
   `weight_kinds`. `record` records the forward as CUDA graphs.
"""
