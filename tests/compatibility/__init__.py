"""Everything that users put on a pipeline, under every way in which this library is put on it.

A cell is a feature (`features/`, one file for each kind) under a way (`ways.py`). `cell.py` runs it and names its
outcome. `outcomes.json` has the expected outcome of each cell; `test_matrix.py` compares them, and docs/generate.py
writes docs/compatibility.md from them. `python -m tests.compatibility` runs cells and writes the file. Cells on GPUs
(`on_gpus.py`, `outcomes_on_gpus.json`) have `--device cuda`, and tests/gpu/test_compatibility.py.
"""
