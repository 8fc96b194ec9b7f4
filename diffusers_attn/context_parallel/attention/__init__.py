"""One attention call over several ranks: Ulysses, ring, gathered keys and values, or Ulysses with a ring."""
