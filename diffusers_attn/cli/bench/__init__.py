"""`diffusers-attn bench`: error and speed of providers at the shapes of real models, on one device or several.

`workloads` has the shapes and masks, `reference` the exact results, `timing` measures, and `measure` combines them for
one provider; `strategies` does so for context parallelism. `command` prints the results, `save` and `plot` write them.
"""
