"""`diffusers-attn bench`: error and speed of providers at the shapes of real models, on one device.

`workloads` has the shapes and masks, `reference` the exact results, `timing` measures, and `measure` combines them for
one provider.
"""
