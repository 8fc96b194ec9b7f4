"""Intervals of numbers that settings accept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

_STORED = 2**31 - 1
"""Upper bound of counts: more than any setting needs, and every library can store it."""


class Bounds(NamedTuple):
    """An interval of finite numbers. Infinity and NaN are never contained."""

    low: float = -math.inf
    high: float = math.inf
    low_is_in: bool = True
    high_is_in: bool = True

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) == math.inf:
            return False
        low = value >= self.low if self.low_is_in else value > self.low
        high = value <= self.high if self.high_is_in else value < self.high
        return low and high

    def __str__(self) -> str:
        """Describes the interval: "from 0", "above 0, up to 10", "from 0, below 1"."""
        words = []
        if self.low > -math.inf:
            words.append(f"{'from' if self.low_is_in else 'above'} {self.low}")
        if self.high < math.inf:
            words.append(f"{'up to' if self.high_is_in else 'below'} {self.high}")
        return ", ".join(words) or "that is finite"


POSITIVE = Bounds(0, _STORED, low_is_in=False)
NOT_NEGATIVE = Bounds(0, _STORED)
COUNT = Bounds(1, _STORED)
PROBABILITY = Bounds(0, 1)
BELOW_ONE = Bounds(0, 1, high_is_in=False)
