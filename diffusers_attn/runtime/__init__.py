"""torch.compile and CUDA graphs for a model."""
