"""What goes wrong in training before anything is trained, by name."""


class TrainingError(ValueError):
    """Settings that cannot be served exactly as given. The message names the setting, what is accepted and what to do.

    What is wrong with the data is a `TrainingDataError` (see `data.errors`), with attention an
    `AttentionProviderError`.
    """
