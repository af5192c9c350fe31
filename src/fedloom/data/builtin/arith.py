"""`builtin:arith`: word problems with worked steps and a final number, spread evenly over three clients."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from fedloom.data.builtin.pools import Pool, pool_of, random_of
from fedloom.data.builtin.words import GAIN_VERBS, LOSS_VERBS, NAMES, THINGS

CLIENTS = ("c0", "c1", "c2")
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 100, 40, 70  # rows per client

MAX_START, MAX_STEP = 15, 9  # what a problem starts with, what one step changes


class Problem(NamedTuple):
    """A word problem; `chain` (for example "2+7-3") is its content, whoever owns whatever."""

    chain: str
    kind: str  # "bags", "relation" or "change"
    text: str
    solution: str


def _step(rng: random.Random, value: int) -> tuple[str, int]:
    """A change of `value` that never goes below 1: its sign and its size."""
    size = rng.randint(1, MAX_STEP)
    return ("+" if rng.random() < 0.5 or size >= value else "-"), size


def _apply(value: int, sign: str, size: int) -> int:
    return value + size if sign == "+" else value - size


def chain_pool(chain: str) -> Pool:
    """Pool of a chain of operations: problems with the same numbers and signs are one instance."""
    return pool_of("chain", chain)


def draw_problem(rng: random.Random) -> Problem:
    """One problem of one or two steps; all numbers are whole and positive."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    start = rng.randint(2, MAX_START)
    draw = rng.random()
    if draw < 0.2:
        kind = "bags"
        bags, each = rng.randint(2, 5), rng.randint(2, 5)
        value = bags * each
        text = f"{name} has {bags} bags with {each} {things} in each bag."
        chain, steps = f"{bags}*{each}", [f"{bags} * {each} = {value}"]
    else:
        sign, size = _step(rng, start)
        value = _apply(start, sign, size)
        chain, steps = f"{start}{sign}{size}", [f"{start} {sign} {size} = {value}"]
        if draw < 0.4:
            kind = "relation"
            more = "more" if sign == "+" else "fewer"
            text = f"{other} has {start} {things}. {name} has {size} {more} than {other}."
        else:
            kind = "change"
            verb = rng.choice(GAIN_VERBS if sign == "+" else LOSS_VERBS)
            text = f"{name} has {start} {things}. {name} {verb} {size}."
    if rng.random() < 0.5:
        sign, size = _step(rng, value)
        after = _apply(value, sign, size)
        verb = rng.choice(GAIN_VERBS if sign == "+" else LOSS_VERBS)
        text += f" Then {name} {verb} {size}."
        chain += f"{sign}{size}"
        steps.append(f"{value} {sign} {size} = {after}")
        value = after
    question = rng.choice(
        (
            f"How many {things} does {name} have?",
            f"How many {things} are left with {name}?",
            f"Find the number of {things} of {name}.",
        )
    )
    return Problem(chain, kind, f"{text} {question}", ". ".join(steps) + f". The answer is {value}.")


def _rows_of(split: Pool, number: int, rng: random.Random, seen: set[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while len(rows) < number:
        problem = draw_problem(rng)
        if chain_pool(problem.chain) != split or problem.text in seen:
            continue
        seen.add(problem.text)
        rows.append({"instruction": problem.text, "input": "", "output": problem.solution, "category": problem.kind})
    return rows


def arith_rows(seed: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{client: {"train" | "validation" | "test": rows}}; the test sets are the same for every seed."""
    sizes = {"test": NUM_TEST, "train": NUM_TRAIN, "validation": NUM_VALIDATION}
    seen: set[str] = set()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {client: {} for client in CLIENTS}
    for split in ("test", "train", "validation"):
        for client in CLIENTS:
            rng = random_of("arith", split, client, 0 if split == "test" else seed)
            rows[client][split] = _rows_of(split, sizes[split], rng, seen)
    return rows
