"""Mutation testing: whether tests notice when a piece of code is wrong.

`mutate` makes mutants, each with one small change of one function: another comparison, a constant more, a statement
less. `targets` has the modules and the tests that should notice; `trial` runs these tests on a mutant, in a fork of a
process that has everything imported. `python -m tests.mutants` runs a sample and writes `outcomes.json`, from which
docs/generate.py writes a part of docs/trust.md.
"""
