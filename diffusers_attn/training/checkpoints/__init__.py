"""The folder of a run, and going on from it.

- `output` locks the folder; `resolved` writes the settings of the run into it.
- `checkpoint` writes and finds checkpoints, each with a `manifest` of checksums. `state` is the content of one; its
  optimizer is stored as `tensors_and_values`.
- `resuming` compares the settings of a new run with those of a checkpoint.
"""
