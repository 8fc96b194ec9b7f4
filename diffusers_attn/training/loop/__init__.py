"""A training run, from its first check to the finished adapter.

- `trainer` runs the steps, on the `accelerator`. Before them come `checks`, and for `--dry_run` only the report of
  `dry_run`.
- Between steps: `progress` on the terminal and in log files, `evaluation` of the loss, `validation` by samples (with
  `video`), and `interruption` by a signal.
- At the end: `card` describes the adapter, and uploads it.
"""
