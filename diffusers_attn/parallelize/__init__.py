"""Context parallelism for a pipeline or a model in one call, and off again."""
