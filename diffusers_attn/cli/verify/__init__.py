"""`diffusers-attn verify`: compares a model under its plan on several CPU processes with one process.

`cases` finds the model and its inputs: a tiny model of a class, a pipeline in a folder, or a function of a Python file.
`command` verifies and prints.
"""
