"""Verifies a plan: compares a model under it with one process, and names the first module that differs."""
