"""`diffusers-attn advise`: predicted time and memory of a model on several GPUs, without running it.

`model` makes the model without weights, `grids` gives its tokens, `gpus` the speeds of devices, and `predict` combines
them by the cost model of `enable_context_parallel` (`parallelize/cost.py`). `measured` has measured steps to compare
with, and `command` prints all this.
"""
