"""What code needs to run under torch.compile and autograd alike."""
