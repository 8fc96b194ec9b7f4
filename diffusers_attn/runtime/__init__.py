"""Runs models faster, and shows where their time goes: torch.compile, CUDA graphs and profiles.

- `compile` compiles a model's blocks (`one_graph` each).
- `cuda_graphs` replays a model's forward. `enable_context_parallel` and `apply_compile` record graphs by themselves
  where that is possible (`cuda_graphs="auto"`); `apply_cuda_graphs` records them or raises an error.
- `component_times` and `profiling` measure a pipeline's call, both by `components`.
"""
