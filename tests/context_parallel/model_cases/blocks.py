"""Models with masks by blocks of places: they have tests of their own, as one process computes these in its own way."""

MODELS = {"kandinsky5, by blocks": None, "kandinsky6_sr": None, "anyflow_far": None, "wan_animate2": None}
