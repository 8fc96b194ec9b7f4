"""The hooks of the plan words, one file for each kind of hook. `hooks/plan_words.py` has the table of words.

`base` has what they share. `split` and `gather` are the words that every plan needs, with `too_short` for errors of
`split`, and `attention` names the sequences of an attention module. Few models need `halo`, `heads`, `length`, `store`
and `conditions`.
"""
