"""The settings of a run, with their help texts: a file for each group in --help.

`model`, `processes`, `preparation`, `adapter`, `optimization`, `noise`, `checkpoints`, `validation`, `publishing`.
"""
