"""`diffusers-attn bench`: error and speed of providers at the shapes of real models, on one device or several.

`workloads` has the shapes and masks, `reference` the exact results, `timing` measures, and `measure` combines them for
one provider; `strategies` does so for context parallelism. `command` has the options, `settings` checks them, `report`
prints the results of providers, and `on_ranks` measures strategies and prints theirs. `save` and `plot` write files.
"""
