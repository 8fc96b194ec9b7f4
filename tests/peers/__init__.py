"""Other people's tests, with and without this library under them.

`bound` is a plugin of pytest: every model of diffusers that a test builds has a provider bound when its constructor
ends, so diffusers' own testers run with `attention_dispatch` in place of diffusers' attention. `sdpa_samples` gives the
samples by which PyTorch tests `F.scaled_dot_product_attention` to `attention_dispatch`. `python -m tests.peers FOLDER`
runs all, with the folder `tests` of diffusers' repository, and writes `outcomes.json`, from which docs/generate.py
writes a part of docs/trust.md.
"""
