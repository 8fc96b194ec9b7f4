"""A plan on a module: hooks that split inputs, gather outputs and say what each attention module holds."""
