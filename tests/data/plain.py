"""The plain way: everything in lists in memory, row by row. Slow, short, and what the real code must agree with."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from fedloom.data.templates import layout_for
from fedloom.data.tokens import _Maker
from fedloom.seeds import seed_of


def rng(seed: int, purpose: str, client: str = "") -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_of(seed, 0, client, purpose)))


def iid(num_rows: int, clients: int, seed: int) -> list[list[int]]:
    order = rng(seed, "split").permutation(num_rows).tolist()
    return [sorted(order[place::clients]) for place in range(clients)]


def dirichlet(keys: Sequence[str], clients: int, alpha: float, seed: int, attempt: int = 0) -> list[list[int]]:
    draws = rng(seed, f"split/{attempt}")
    groups: list[list[int]] = [[] for _ in range(clients)]
    for key in sorted(set(keys)):
        order = draws.permutation([row for row, other in enumerate(keys) if other == key]).tolist()
        shares = draws.dirichlet([alpha] * clients)
        begin = 0
        for client, edge in enumerate([*np.rint(np.cumsum(shares)[:-1] * len(order)).astype(int), len(order)]):
            groups[client] += order[begin:edge]
            begin = edge
    return [sorted(members) for members in groups]


def divide(
    members: Sequence[int], content: Sequence[Hashable], num_validation: int, num_test: int, seed: int, client: str
) -> tuple[list[int], list[int], list[int]]:
    copies: dict[Hashable, list[int]] = {}
    for row in rng(seed, "parts", client).permutation(members).tolist():
        copies.setdefault(content[row], []).append(row)
    train: list[int] = []
    validation: list[int] = []
    test: list[int] = []
    for rows in copies.values():
        part = test if len(test) < num_test else validation if len(validation) < num_validation else train
        part.extend(rows)
    return sorted(train), sorted(validation), sorted(test)


def without_crossing(
    parts: Mapping[str, tuple[list[int], list[int], list[int]]], content: Sequence[Hashable]
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    tested = {content[row] for _, _, test in parts.values() for row in test}
    validated = {content[row] for _, validation, _ in parts.values() for row in validation}
    return {
        name: (
            [row for row in train if content[row] not in tested | validated],
            [row for row in validation if content[row] not in tested],
            test,
        )
        for name, (train, validation, test) in parts.items()
    }


# ---------------------------------------------------------------- reading and tokenising


def json_rows(text: str) -> list[Any]:
    """What a .json file holds, parsed whole.

    Raises:
        ValueError: with the words of the message.
    """
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        raise ValueError(f"line {error.lineno:,}, column {error.colno}: not JSON: {error.msg}") from None
    if isinstance(value, dict):
        lists = {name: part for name, part in value.items() if isinstance(part, list)}
        if len(lists) != 1:
            raise ValueError("an object with " + ("no list" if not lists else f"{len(lists)} lists"))
        value = next(iter(lists.values()))
    if not isinstance(value, list):
        raise ValueError("expected a list of objects")
    return value


def examples(
    rows: Sequence[dict[str, Any]], tokenizer: Any, max_length: int | None, train_on_inputs: bool
) -> dict[int, tuple[list[int], list[int]]]:
    """Row number -> (ids, labels), one row at a time; rows that lose their whole answer are not there."""
    maker = _Maker(tokenizer, layout_for(tokenizer, "auto"))
    found = {}
    for number, row in enumerate(rows):
        line = maker.lines([row])[0]
        if line is None:
            continue
        answers = [trained for length, trained in line.runs for _ in range(length)]
        room = len(line.ids) if max_length is None else min(max_length, len(line.ids))
        if not any(answers[1:room]):
            continue
        labels = [
            token if place and (answers[place] or train_on_inputs) else -100
            for place, token in enumerate(line.ids[:room])
        ]
        found[number] = (line.ids[:room], labels)
    return found
