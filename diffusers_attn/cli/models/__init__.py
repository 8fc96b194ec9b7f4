"""`diffusers-attn models`: the classes with a plan, and one plan drawn module by module with shapes.

`plan_in_words` describes an entry of a plan, `shapes` runs a tiny model of the class to fill in shapes, and `command`
prints both.
"""
