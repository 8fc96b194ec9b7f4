"""The hooks of each plan word, one file per kind of hook. `hooks/plan_words.py` has the table of words."""
