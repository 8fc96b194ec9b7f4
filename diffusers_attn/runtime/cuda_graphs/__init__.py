"""A model's forward recorded as a CUDA graph once, and replayed for every step that follows."""
