"""A synthetic .jsonl file of a given size: rows of English words in random order, eight categories, about 1 KB each.

python -m benchmarks.preparation.generate 300MB FILE
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

CATEGORIES = ("letters", "numbers", "plants", "stones", "rivers", "tools", "songs", "roads")
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}


def words() -> tuple[list[str], np.ndarray]:
    """The words of Python's own documentation, which every Python brings, and how often each is there."""
    counts = Counter(re.findall(r"[A-Za-z]+[.,]?", " ".join(topics.values())))
    return list(counts), np.asarray(list(counts.values()), dtype=np.float64)


def bodies(seed: int = 0, number: int = 20_000) -> list[tuple[str, str, str, str]]:
    """(instruction, input, output, category): lengths are lognormal, words as frequent as in English."""
    rng = np.random.Generator(np.random.PCG64(seed))
    known, weights = words()
    lexicon = np.asarray(known, dtype=object)
    edges = np.cumsum(weights / weights.sum())
    found = []
    for _ in range(number):
        sizes = np.clip(rng.lognormal((2.3, 2.0, 4.6), (0.5, 1.0, 0.7)), 1, 4000).astype(int)
        drawn = lexicon[np.searchsorted(edges, rng.random(int(sizes.sum())))]
        instruction, given, output = (" ".join(part) for part in np.split(drawn, np.cumsum(sizes)[:-1]))
        found.append((instruction, given, output, CATEGORIES[int(rng.integers(len(CATEGORIES)))]))
    return found


def rows(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Endless rows. Bodies come again after 20,000 rows, with another number in the instruction: no two are equal."""
    for number, (instruction, given, output, category) in enumerate(itertools.cycle(bodies(seed))):
        yield {
            "instruction": f"{instruction} ({number})",
            "input": given if number % 3 == 0 else "",
            "output": f"{output}.",
            "category": category,
            "source": f"synthetic-{number % 97}",
        }


def write(path: Path, size: int, seed: int = 0) -> int:
    """Write rows until the file has `size` bytes; gives their number."""
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows(seed)):
            if written >= size:
                return number
            written += stream.write(json.dumps(row) + "\n")
    raise AssertionError("the rows are endless")


def size_of(text: str) -> int:
    """ "300MB" -> 300,000,000"""
    found = re.fullmatch(r"(\d+)([kmg]b)", text.lower())
    if found is None:
        raise SystemExit(f"{text!r} is not a size such as 300MB")
    return int(found[1]) * _UNITS[found[2]]


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[2]), size_of(sys.argv[1])):,} rows")
