"""Built-in tasks as preference data: the right answer chosen, a typical mistake rejected (`data.type: preference`).

The mistake is drawn from the question itself, so a row has the same one for every seed, and a test row stays what it
is. It is judged by the task's own rule and drawn anew until it is wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedloom.data.builtin.pools import random_of
from fedloom.data.builtin.scoring import score
from fedloom.data.builtin.words import CITIES, CLASSES

__all__ = ["as_pair", "mistake"]

Row = Mapping[str, Any]
TRIES = 200


def as_pair(task: str, row: Row) -> dict[str, Any]:
    """The row as a preference row: `output` becomes `chosen`, beside a `rejected` one."""
    rest = {key: value for key, value in row.items() if key != "output"}
    return {**rest, "chosen": row["output"], "rejected": mistake(task, row)}


def mistake(task: str, row: Row) -> str:
    """A wrong answer of the kind that the question invites."""
    draw = random_of("preference", task, row["category"], row["instruction"], row["input"])
    make = _SKILLS[row["category"]] if task == "skills" else _TASKS[task]
    for _ in range(TRIES):
        answer = make(row, draw)
        if answer.strip() and answer != row["output"] and score(task, row, answer) == 0.0:
            return answer
    raise ValueError(f"no wrong answer was found to {row['instruction']!r}")  # what every row has, tests say


def _swapped(text: str, draw: random.Random) -> str:
    """Two neighbouring letters the wrong way round."""
    place = draw.randrange(len(text) - 1)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def _reverse(row: Row, draw: random.Random) -> str:
    return str(row["input"]) if draw.random() < 0.5 else _swapped(row["output"], draw)


def _upper(row: Row, draw: random.Random) -> str:
    word = str(row["input"])
    return draw.choice((word, word.capitalize(), word[:-1].upper() + word[-1]))


def _sort(row: Row, draw: random.Random) -> str:
    return draw.choice((str(row["input"]), str(row["output"])[::-1], _swapped(row["output"], draw)))


def _count(row: Row, draw: random.Random) -> str:
    return str(max(1, int(row["output"]) + draw.choice((-2, -1, 1, 2))))


def _last(row: Row, draw: random.Random) -> str:
    return draw.choice(str(row["input"]).split(", "))


def _compare(row: Row, draw: random.Random) -> str:
    return str(min(int(number) for number in str(row["input"]).split(" and ")))


def _extract(row: Row, draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(CITIES)
    return draw.choice([word.strip(".,") for word in str(row["input"]).split() if word[0].isupper()])


def _classify(row: Row, draw: random.Random) -> str:
    return draw.choice(tuple(CLASSES))


def _arith(row: Row, draw: random.Random) -> str:
    """The last step miscalculated, and the answer with it."""
    head, _, tail = str(row["output"]).rpartition(". The answer is ")
    right = tail.rstrip(".")
    wrong = max(1, int(right) + draw.choice((-3, -2, -1, 1, 2, 3)))
    return f"{head.removesuffix(right)}{wrong}. The answer is {wrong}."


def _code(row: Row, draw: random.Random) -> str:
    """One number of the program changed, or one name or sign of it taken from elsewhere in the language."""
    program = str(row["output"])
    numbers = list(re.finditer(r"\d+", program))
    if numbers and draw.random() < 0.7:
        found = draw.choice(numbers)
        number = max(1, int(found[0]) + draw.choice((-2, -1, 1, 2)))
        return f"{program[: found.start()]}{number}{program[found.end() :]}"
    old, new = draw.choice(_SLIPS[row["language"]])
    return program.replace(old, new, 1)


_SLIPS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "alder": (("+", "-"), ("-", "+"), ("*", "+"), ("max", "min"), ("min", "max"), ("x", "(x + 1)")),
    "birch": (("add", "sub"), ("sub", "add"), ("mul", "add"), ("max", "min"), ("min", "max"), ("neg x", "add x 1")),
    "cedar": (("+", "-"), ("-", "+"), ("*", "+"), ("max", "min"), ("min", "max"), ("neg", "sq"), ("sq", "neg")),
    "maple": (("plus", "minus"), ("minus", "plus"), ("times", "plus"), ("cap", "floor"), ("floor", "cap"),
              ("flip", "square"), ("square", "flip")),
}  # fmt: skip
_SKILLS: Mapping[str, Callable[[Row, random.Random], str]] = {
    "reverse": _reverse,
    "upper": _upper,
    "sort": _sort,
    "count": _count,
    "last": _last,
    "compare": _compare,
    "extract": _extract,
    "classify": _classify,
}
_TASKS: Mapping[str, Callable[[Row, random.Random], str]] = {"arith": _arith, "code": _code}
