"""The command `diffusers-attn`: one file or folder for each of its commands.

Importing this package, also through `--help`, imports no PyTorch. A command imports what it needs when it runs.
"""
