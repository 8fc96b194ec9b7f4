"""Runs models faster, and shows where their time goes: torch.compile, CUDA graphs and profiles.

`compile` compiles a model's blocks (`one_graph` each), and `cuda_graphs` replays its forward. `component_times` and
`profiling` measure a pipeline's call, both by `components`.
"""
