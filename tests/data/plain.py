"""The plain way: everything in lists in memory, row by row. Slow, short, and what the real code must agree with."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

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
