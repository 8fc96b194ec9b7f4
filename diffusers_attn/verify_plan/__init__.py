"""Compares a plan with one process, and names the first module whose output differs."""
