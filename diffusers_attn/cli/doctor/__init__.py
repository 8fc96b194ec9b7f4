"""`diffusers-attn doctor`: what works on this machine, what does not, why, and the command that mends it.

Packages may be broken in ways that end or stop a process. So this process imports none of them: `installed` reads their
metadata, `combinations` finds known conflicts in it, and every import is tried in a process of its own (`isolated` runs
`probe`) with a time limit. `examine` collects the findings, with `machine` (driver and compiler) and `strategies` (how
to use the GPUs), and `command` prints them.
"""
