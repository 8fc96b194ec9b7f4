"""Where each model's tensors are split and gathered: data, and the types that it is written in."""
