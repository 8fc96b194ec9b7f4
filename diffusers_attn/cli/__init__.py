"""The command `diffusers-attn`: one folder for each of its commands, each with its options in `command`.

`main` lists the commands: `advise`, `bench`, `doctor`, `models`, `run`, `train` and `verify`. They share `output` (text
or JSON), `exit_codes`, `names` (of model classes) and `launch` (several processes).

Importing this package, also through `--help`, imports no PyTorch. A command imports what it needs when it runs.
"""
