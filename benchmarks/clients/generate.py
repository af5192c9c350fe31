"""A synthetic .jsonl file of short rows, each with its user: users come one after another, again and again.

python -m benchmarks.clients.generate USERS FILE
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROWS = 2  # of each user
WORDS = ("red", "blue", "green", "north", "south", "east", "west", "one", "two", "three", "four", "five", "up", "down")


def lines(users: int, seed: int = 0) -> Iterator[str]:
    """No two rows are equal: the number of the row is in it. The answer is the last word of the question."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for first in range(0, ROWS * users, 10_000):
        drawn = rng.integers(0, len(WORDS), (min(10_000, ROWS * users - first), 3))
        for number, three in enumerate(drawn.tolist(), first):
            text = " ".join(WORDS[place] for place in three)
            said = f'"instruction": "{number} {text}", "output": "{WORDS[three[-1]]}"'
            yield f'{{"user": "u{number % users:07d}", {said}}}\n'


def write(path: Path, users: int, seed: int = 0) -> int:
    """Gives the bytes of the file."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(lines(users, seed))
    return path.stat().st_size


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[2]), int(sys.argv[1])):,} bytes")
