"""One attention call over several ranks: Ulysses, ring, gathered keys and values, or Ulysses within a ring."""
