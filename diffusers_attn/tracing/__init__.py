"""Helpers for code that runs both eagerly and under torch.compile."""
