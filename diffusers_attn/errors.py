"""The errors of this library."""

PAGE = "docs/troubleshooting.md"
SECTIONS = {
    "cannot be used here": "a-provider-cannot-be-used",
    "could not be loaded from the Hub": "a-kernel-cannot-be-loaded-from-the-hub",
    "cannot serve this call": "a-provider-does-not-support-the-call",
    "no attention provider usable here serves this call": "no-provider-supports-the-call",
    "there is no attention provider": "an-unknown-provider",
    "is a backend of diffusers, and no provider": "an-unknown-provider",
    "and this job has one": "the-job-has-one-rank",
    "the mesh has one rank": "the-job-has-one-rank",
    "ulysses_degree * ring_degree must be": "degrees-that-do-not-fit",
    "returns no log-sum-exp": "a-ring-needs-another-provider",
    "has no component with a plan": "a-model-without-a-plan",
    "diffusers' own enable_parallelism() was called": "two-kinds-of-context-parallelism",
    "no attention call came to diffusers_attn": "attention-that-goes-past-the-library",
    "computes attention without diffusers_attn": "attention-that-goes-past-the-library",
    "have different inputs": "ranks-with-different-inputs",
    "have different models": "ranks-with-different-models",
    "would share a sequence differ": "ranks-with-different-models",
    "are not at the same call": "ranks-at-different-calls",
    "got no answer from each other": "a-rank-is-missing",
    "cannot be recorded as a CUDA graph": "a-forward-cannot-be-recorded",
    "cannot be captured in a CUDA graph": "a-forward-cannot-be-recorded",
    "cannot be sharded": "weights-cannot-be-sharded",
}
"""Parts of messages, and the section of the page that explains them."""


def command(text: str) -> str:
    """A command, code or option in the quotes that errors use, so that its end is visible."""
    return f"`{text}`"


class AttentionProviderError(ValueError):
    """An attention call, a provider or an option cannot be served exactly as requested.

    The message says what was given, what is accepted, and what to do. The error is raised before anything runs. A
    traceback also names the page that explains it, if there is one.
    """

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        """What Python prints below the error. Made when it is read: an error that is caught costs nothing more."""
        if "_notes" not in self.__dict__:
            message = str(self)
            found = next((section for part, section in SECTIONS.items() if part in message), None)
            self._notes = [f"See {PAGE}#{found}"] if found else []
        return self._notes


class ProviderUnavailableError(AttentionProviderError):
    """The provider cannot be used on this machine: its package is missing, too old or broken, or no device runs it."""
