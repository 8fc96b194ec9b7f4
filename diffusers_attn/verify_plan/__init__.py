"""Verifies a plan: compares a model under it with one process, and names the first module that differs.

`verify` starts the processes, and `rank` is one of them. `module_calls` records what every module computes in one
process, `compare` finds the first difference, `hints` guesses at its cause, and `report` prints it.
"""
