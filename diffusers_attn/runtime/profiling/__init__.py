"""`profile`: where the time of a pipeline's call goes, by component, attention provider and exchange.

`profile` runs torch.profiler and names calls; `names` recognises operators and kernels; `timeline` divides the time of
the trace among them; `report` sums up and prints.
"""
