"""Guidance on several groups of ranks: each group computes other branches of a step, or other samples of a batch.

Guidance calls the denoiser several times per step, with and without a prompt, or once with both in one batch. Groups of
ranks exchange only the outputs, once per step, where sequence parallelism exchanges in every layer. Pipelines stay
unmodified: `GuidedCall` (`guided_call`) replaces the call of the model, which `installed` does.

- Both branches in one batch: each group computes its part of the batch (`batch`), if the model computes samples
  separately (`batched`).
- One call per branch: each group computes its own branches. The call of another group's branch returns at once, with a
  `PendingTensor` (`pending`), whose value arrives when the last branch of the step was called, or when it is needed.

`branches` recognises the steps, `division` and `groups` divide one among the ranks, `inputs` keeps its inputs equal,
and `step_in_progress` exchanges its outputs. `cached_run` is for caches that keep a state for each branch.

Calls that are not guided split their sequence over all ranks.
"""
