"""`builtin:code`: tiny functions, described in words, to be written in the language of the client."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedloom.data.builtin.interpreter import LANGUAGES
from fedloom.data.builtin.pools import Pool, pool_of, random_of

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 128, 32, 50  # rows per client

# Hidden tests: signs, zero, and values on both sides of every bound that a step can name.
ARGUMENTS = (-9, -4, -1, 0, 1, 2, 5, 12)
KINDS = ("add", "sub", "mul", "max", "min", "sq", "neg")


class Step(NamedTuple):
    """One step of a function: what to do with the value so far, and with which number (0 where none is needed)."""

    kind: str
    number: int = 0


Chain = tuple[Step, ...]


def draw_step(rng: random.Random) -> Step:
    kind = rng.choice(KINDS)
    if kind in ("sq", "neg"):
        return Step(kind)
    return Step(kind, rng.randint(2, 5) if kind == "mul" else rng.randint(1, 9))


def _is_dull(chain: Chain) -> bool:
    """The same kind twice, a sum right after a difference, or hardly any different values."""
    kinds = [step.kind for step in chain]
    sums = any({one, other} == {"add", "sub"} for one, other in itertools.pairwise(kinds))
    return sums or len(set(kinds)) < len(kinds) or len(set(values_of(chain))) < 4


def draw_chain(rng: random.Random, length: int) -> Chain:
    """`length` steps that make a function worth asking for."""
    while True:
        chain = tuple(draw_step(rng) for _ in range(length))
        if not _is_dull(chain):
            return chain


def value_of(chain: Chain, x: int) -> int:
    """The function's value, computed from its steps and not from any program text."""
    for kind, number in chain:
        match kind:
            case "add":
                x += number
            case "sub":
                x -= number
            case "mul":
                x *= number
            case "max":
                x = max(x, number)
            case "min":
                x = min(x, number)
            case "sq":
                x *= x
            case _:
                x = -x
    return x


def values_of(chain: Chain) -> tuple[int, ...]:
    """The function's values at `ARGUMENTS`: two chains with the same values are one content, whatever their steps."""
    return tuple(value_of(chain, x) for x in ARGUMENTS)


def _one_step_values() -> frozenset[tuple[int, ...]]:
    numbers = {"sq": (0,), "neg": (0,)}
    return frozenset(values_of((Step(kind, n),)) for kind in KINDS for n in numbers.get(kind, range(1, 10)))


_ONE_STEP = _one_step_values()


def function_pool(chain: Chain) -> Pool:
    """Pool of a function. What one step can compute is so little that all of it is pretraining text."""
    values = values_of(chain)
    return "pretrain" if values in _ONE_STEP else pool_of("function", " ".join(map(str, values)))


# ---------------------------------------------------------------------------------------------------- program text

_ALDER = {"add": "+", "sub": "-", "mul": "*"}
_CEDAR = {"add": "+", "sub": "-", "mul": "*", "max": "max", "min": "min", "sq": "sq", "neg": "neg"}
_MAPLE = {
    "add": "plus",
    "sub": "minus",
    "mul": "times",
    "max": "floor",
    "min": "cap",
    "sq": "square",
    "neg": "flip",
}


def program_of(language: str, chain: Chain) -> str:
    """The one standard program of a function in `language`."""
    if language == "alder":
        body, tight = "x", True  # tight: needs no brackets around it
        for kind, number in chain:
            inner = body if tight else f"({body})"
            if kind in _ALDER:
                body = f"{body if kind != 'mul' else inner} {_ALDER[kind]} {number}"
            elif kind in ("max", "min"):
                body = f"{kind}({body}, {number})"
            else:
                body = f"{inner} ^ 2" if kind == "sq" else f"-({body})" if not tight or body != "x" else "-x"
            tight = kind in ("max", "min")
        return f"f(x) = {body}"
    if language == "birch":
        body = "x"
        for kind, number in chain:
            body = f"({kind} {body} {number})" if number else f"({kind} {body})"
        return f"(fn x {body})"
    if language == "cedar":
        words = [f"{number} {_CEDAR[kind]}" if number else _CEDAR[kind] for kind, number in chain]
        return f"x : x {' '.join(words)} ;"
    if language == "maple":
        return "x" + "".join(
            f" | {_MAPLE[kind]} {number}" if number else f" | {_MAPLE[kind]}" for kind, number in chain
        )
    raise ValueError(f"no language {language!r}, there are {', '.join(LANGUAGES)}")


# ----------------------------------------------------------------------------------------------------- descriptions

_PHRASES: dict[str, tuple[str, ...]] = {
    "add": ("adds {n} to {x}", "increases {x} by {n}"),
    "sub": ("subtracts {n} from {x}", "lowers {x} by {n}"),
    "mul": ("multiplies {x} by {n}",),
    "max": ("raises {x} to at least {n}",),
    "min": ("cuts {x} to at most {n}",),
    "sq": ("squares {x}",),
    "neg": ("negates {x}",),
}
_PHRASES_OF_NUMBER: dict[Step, tuple[str, ...]] = {Step("mul", 2): ("doubles {x}",), Step("mul", 3): ("triples {x}",)}
OPENINGS = (
    "Write a function in {language} that {body}.",
    "Define a function in {language} that {body}.",
    "Give code in {language} that {body}.",
)


def describe(chain: Chain, rng: random.Random) -> str:
    """The steps in words: "adds 3 to x, doubles it and squares it"."""
    parts: list[str] = []
    for step in chain:
        phrases = _PHRASES[step.kind] + _PHRASES_OF_NUMBER.get(step, ())
        parts.append(rng.choice(phrases).format(n=step.number, x="it" if parts else "x"))
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def instruction_of(language: str, chain: Chain, rng: random.Random) -> str:
    """The whole instruction; the language's name is part of it, because the common test mixes the languages."""
    return rng.choice(OPENINGS).format(language=language.capitalize(), body=describe(chain, rng))


def hidden_tests(chain: Chain) -> list[list[Any]]:
    """[[arguments, expected value], ...]"""
    return [[[x], value] for x, value in zip(ARGUMENTS, values_of(chain), strict=True)]


def _rows_of(
    language: str, split: Pool, number: int, rng: random.Random, seen: set[tuple[int, ...]], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while len(rows) < number:
        chain = draw_chain(rng, rng.choice(lengths))
        values = values_of(chain)
        if function_pool(chain) != split or values in seen:
            continue
        seen.add(values)
        rows.append(
            {
                "instruction": instruction_of(language, chain, rng),
                "input": "",
                "output": program_of(language, chain),
                "category": language,
                "language": language,
                "tests": hidden_tests(chain),
            }
        )
    return rows


def code_rows(seed: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{language: {"train" | "validation" | "test": rows}}; the test sets are the same for every seed."""
    sizes = {"test": NUM_TEST, "train": NUM_TRAIN, "validation": NUM_VALIDATION}
    seen: set[tuple[int, ...]] = set()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {language: {} for language in LANGUAGES}
    for split in ("test", "train", "validation"):
        for language in LANGUAGES:
            rng = random_of("code", split, language, 0 if split == "test" else seed)
            rows[language][split] = _rows_of(language, split, sizes[split], rng, seen, (2, 2, 3))
    return rows
