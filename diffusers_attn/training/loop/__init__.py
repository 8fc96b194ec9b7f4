"""A training run, from its first check to the finished adapter.

- `trainer` has the loop, on the `accelerator`. `start` makes the `checks` that need no model, and finds the checkpoint
  to go on from; `set_up` loads the model and adds adapter and optimizer; `train_step` is one step. `compiling`
  decides whether blocks are compiled. `dry_run` reports what a run would need.
- Between steps: `progress` on the terminal and in log files, `evaluation` of the loss, and `interruption` by a signal.
  `validation` draws samples, some from `sample_controls`; `preview_checks` has checked them, `video` writes them, and
  `gallery` shows them in a browser.
- At the end: `finish` saves the adapter; `loss_plot` draws the losses; `card` describes and uploads the adapter.
"""
