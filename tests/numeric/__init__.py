"""Every provider with every feature of a call, on one device and over ranks, against the definition in float64.

A cell is a provider, a strategy, a feature of the call (`features`, in the forms of tensors that `forms` has) and a
pass: forward, backward, compiled, or captured as a CUDA graph. `statements` reads the provider's capabilities: they say
whether the cell is within its tolerance (`tolerances`), or is refused, and with what words. `cell` runs it, over ranks
by `over_ranks`; `workers` runs many in processes of their own. `outcomes/` has what was found, from which
docs/generate.py writes a part of docs/trust.md.

`python -m tests.numeric` runs cells and writes that file; `test_numeric` runs a sample of them.
"""
