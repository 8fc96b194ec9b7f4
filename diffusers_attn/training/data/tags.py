"""Changes of captions: a trigger word, a prefix, and several orders of tags."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence

from .examples import Example

PLACEHOLDER = "[trigger]"
"""Text in captions that a trigger word replaces."""


def changed_captions(
    examples: Sequence[Example],
    *,
    prefix: str = "",
    trigger_word: str | None = None,
    shuffle_tags: int = 1,
    keep_tags: int = 0,
    seed: int = 0,
) -> list[Example]:
    """Changes the captions of examples: first the order of tags, then the trigger word, then the prefix.

    Args:
        examples: the examples.
        prefix: text before every caption.
        trigger_word: see `with_trigger`; None changes nothing.
        shuffle_tags, keep_tags, seed: see `tag_orders`. An example has each order as a caption, and one of them is
            drawn each time that the example is used.

    Returns:
        The examples with their new captions.
    """
    found = []
    for example in examples:
        captions = [
            prefix + (ordered if trigger_word is None else with_trigger(ordered, trigger_word))
            for caption in example.captions
            for ordered in tag_orders(caption, shuffle_tags, keep_tags, seed)
        ]
        found.append(dataclasses.replace(example, caption=captions[0], more_captions=tuple(captions[1:])))
    return found


def with_trigger(caption: str, word: str) -> str:
    """A caption with a trigger word: in place of each "[trigger]", or, if the caption has neither that nor the word,
    before it with a comma."""
    if PLACEHOLDER in caption:
        return caption.replace(PLACEHOLDER, word)
    return caption if word in caption else f"{word}, {caption}"


def tag_orders(caption: str, number: int, keep: int = 0, seed: int = 0) -> list[str]:
    """Different orders of a caption's tags, which commas separate. The first is the given one.

    Args:
        caption: the caption.
        number: number of orders. A caption with few tags has fewer.
        keep: number of tags at the beginning that stay where they are.
        seed: seed of the orders, which besides depend on the caption alone.
    """
    tags = [each.strip() for each in caption.split(",")]
    first, rest = tags[:keep], tags[keep:]
    number = min(number, math.factorial(min(len(rest), 20)))
    if number < 2:
        return [caption]
    if len(rest) < 7:
        orders = [list(each) for each in itertools.islice(itertools.permutations(rest), 1, None)]
        orders = random.Random(f"{seed} {caption}").sample(orders, number - 1)
    else:  # too many to list, and so many that equal draws are rare
        generator = random.Random(f"{seed} {caption}")
        orders = [generator.sample(rest, len(rest)) for _ in range(number - 1)]
    return list(dict.fromkeys([caption, *(", ".join([*first, *each]) for each in orders)]))
