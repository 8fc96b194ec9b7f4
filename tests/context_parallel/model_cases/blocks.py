"""Models that choose blocks of keys, which `test_nabla.py` compares: one process computes these in a way of its own."""

MODELS = {"kandinsky5, by blocks": None, "kandinsky6_sr": None}
