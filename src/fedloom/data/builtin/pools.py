"""Which text may be used where: the content itself decides, through a hash, so no two uses can ever overlap.

Every instance of a task has a content key (the word to reverse, the pair of numbers, the chain of operations ...) that
does not depend on how the instruction is phrased. The key's pool says whether that content belongs to the pretraining
text, to training, to validation or to the test set. Nothing is drawn first and compared later.
"""

from __future__ import annotations

import hashlib
import random
from typing import Literal

Pool = Literal["pretrain", "train", "validation", "test"]
SPLITS: tuple[Pool, ...] = ("train", "validation", "test")

# Upper ends of the pools on a scale of 100: half of all content is kept for pretraining text.
_ENDS: tuple[tuple[int, Pool], ...] = ((50, "pretrain"), (75, "train"), (85, "validation"), (100, "test"))


def number_of(*parts: str | int) -> int:
    """A 64-bit number from `parts`, the same on every machine and in every process (unlike `hash`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def random_of(*parts: str | int) -> random.Random:
    """A generator of its own for each purpose, seeded by the purpose's name."""
    return random.Random(number_of("fedloom-builtin", *parts))


def pool_of(space: str, key: str) -> Pool:
    """The one pool that may use content `key` of content space `space`."""
    place = number_of("pool", space, key) % 100
    return next(pool for end, pool in _ENDS if place < end)
