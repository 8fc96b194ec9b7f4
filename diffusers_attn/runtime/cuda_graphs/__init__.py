"""A model's forward, recorded as a CUDA graph once and replayed for later steps.

A step of Flux on two H200 takes 74.0 ms with a graph on any host. Without one it takes 75.0 ms on an idle host and
100.4 on one with eight slow cores (docs/design.md).

1. `apply`: the public functions.
2. `graphed`: a forward that decides for each call whether to run, record or replay. `graphs`: a model's recordings.
3. Before a recording: `obstacles` and `waiting` find what a graph cannot hold. `arguments` separates tensors from the
   constants of a graph.
4. `recording`: one graph with its inputs and outputs. `snapshot` detects changes of the model; `group_end` and
   `capture_failure` clean up.
"""
