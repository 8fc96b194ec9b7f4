"""Verifies a plan: compares a model under it with one process, and names the first module that differs.

`verify` starts the processes, `rank` is one of them, `compare` finds the first difference, and `report` prints it.
"""
