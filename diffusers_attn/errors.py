"""The errors of this library."""


def command(text: str) -> str:
    """A command, code or option in the quotes that errors use, so that its end is visible."""
    return f"`{text}`"


class AttentionProviderError(ValueError):
    """An attention call, a provider or an option cannot be served exactly as requested.

    The message says what was given, what is accepted, and what to do. The error is raised before anything runs.
    """


class ProviderUnavailableError(AttentionProviderError):
    """The provider cannot be used on this machine: its package is missing, too old or broken, or no device runs it."""
