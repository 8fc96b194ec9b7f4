"""Compiled graphs of split models.

- `own_forward`: graphs from before a plan do not run with it, and graphs of other models stay (docs/design.md, "What
  changes for the whole process").
- `overlap_pass`: starts exchanges early. `inductor` sets this pass, for graphs with exchanges only.
"""
