"""Helpers for code that runs both eagerly and under torch.compile.

`errors` keeps the messages of errors in traced code, `export` refuses what cannot be exported, `functions` helps to
write an autograd.Function, and `symbolic` computes with symbolic sizes.
"""
