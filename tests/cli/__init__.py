"""Tests of the command `diffusers-attn`."""
