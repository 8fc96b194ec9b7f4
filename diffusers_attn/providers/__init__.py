"""One attention call on one device: every kernel by name.

Read in this order:

1. `base` and `catalog`: the interface of an adapter, and the table of providers with their capabilities.
2. `serving` and `decision`: whether and how a provider serves a call. `selection` and `speeds` choose for "auto".
3. `lowering`: exact changes of a call's inputs, for kernels that do not support it directly.
4. `native`, `flash`, `flash3`, `flash4`, `flex`, `sage`, `xformers`: the adapters, imported on first use by `registry`.
   They share `flash_family`, `varlen` and `bias`; `row_liveness` gives zeros to queries without keys.
5. `hardware`: speeds of devices and of their links, from which context parallelism predicts times.
"""
