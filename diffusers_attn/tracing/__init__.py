"""Helpers for code that runs both eagerly and under torch.compile.

`errors` keeps the messages of errors in traced code, `functions` helps to write an autograd.Function, and `symbolic`
computes with symbolic sizes.
"""
