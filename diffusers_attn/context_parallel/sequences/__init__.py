"""Which rank holds which tokens, and what a forward knows of its sequences."""
