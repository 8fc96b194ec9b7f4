"""One attention call on one device: every kernel by name.

Read in this order:

1. `base` and `catalog`: the interface of an adapter, and the table of providers with their capabilities.
2. `serving` and `decision`: whether and how a provider serves a call. `selection` chooses for "auto", by `speeds`
   and `speeds_file`.
3. `lowering`: exact changes of a call's inputs, for kernels that do not support it directly.
4. `native`, `aten_kernels` and `aten_cudnn` (PyTorch's), `flash`, `flash3`, `flash3_fp8`, `flash4`, `flex`, `sage`,
   `sage3` and `xformers`: the adapters, imported on first use by `registry`, or from the Hugging Face Hub (`hub`). They
   share `flash_family`, `fp8`, `varlen`, `bias` and `devices`; `sage_calls` has the calls of SageAttention's functions,
   and `row_liveness` gives zeros to queries without keys.
5. `hardware`: speeds of devices and of their links, from which context parallelism predicts times.
"""
