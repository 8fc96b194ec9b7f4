"""What goes wrong, by name, so that callers can catch it."""


def command(text: str) -> str:
    """A command, code or option as errors quote it: where it ends is plain, whatever follows."""
    return f"`{text}`"


class AttentionProviderError(ValueError):
    """An attention call, a provider or an option that cannot be served exactly as asked.

    The message says what was given, what would be accepted, and what to do about it. It is raised before anything
    runs: a call is served exactly or not at all.
    """


class ProviderUnavailableError(AttentionProviderError):
    """The provider exists, but not on this machine: its package is missing, too old or broken, or the hardware is."""
