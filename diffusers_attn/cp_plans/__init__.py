"""Plans: where the tensors of each model class are split and gathered. Data, and the types that it is written in.

`plan` has the words that every plan needs, `advanced` those that few models need. Each other file has the plans of one
family of models, which `registry` finds by class name; `uncovered` lists the classes without a plan, and why. `wan` and
`flux` are good examples to begin with.
"""
