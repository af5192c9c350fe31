"""Who holds what, for a few clients or a million: flat arrays, and a client's own part cut out when it is asked for.

In memory a client costs its name and a number per list, and nothing per client is a Python object that stays.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fedloom.data.tokens import Examples, Tokens

__all__ = ["PARTS", "ClientData", "ClientTable", "Held", "Names"]

Numbers = NDArray[np.int64]

PARTS = ("train", "validation", "test")


class Names(Sequence[str]):
    """Client ids, and the place of each. Names in ascending order need nothing besides; others a number each."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names if isinstance(names, list) else list(names)
        ascending = all(a < b for a, b in zip(self._names, self._names[1:], strict=False))
        self._order = None if ascending else np.asarray(
            sorted(range(len(self._names)), key=self._names.__getitem__), dtype=np.int64
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        return self._names[number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def place(self, name: str) -> int:
        """
        Raises:
            KeyError: nobody is called so.
        """
        found = self._find(name) if isinstance(name, str) else None
        if found is None:
            raise KeyError(name)
        return found

    def _find(self, name: str) -> int | None:
        if self._order is None:
            at = bisect.bisect_left(self._names, name)
        else:
            order = self._order
            near = bisect.bisect_left(order, name, key=lambda place: self._names[place])
            at = int(order[near]) if near < len(order) else len(order)
        return at if at < len(self._names) and self._names[at] == name else None


class Held(Mapping[str, Numbers]):
    """Client id -> its numbers (of rows, or of examples), ascending.

    Client k has `numbers[edges[k] : edges[k + 1]]`.
    """

    def __init__(self, ids: Names, numbers: Numbers, edges: Numbers) -> None:
        self.ids, self.numbers, self.edges = ids, numbers, edges

    @classmethod
    def by_owner(cls, ids: Names, owner: NDArray[np.integer]) -> Held:
        """From the place of each number's client; -1 is nobody's."""
        numbers = np.argsort(owner, kind="stable").astype(np.int64, copy=False)
        sizes = np.bincount(owner[owner >= 0], minlength=len(ids))
        return cls(ids, numbers[len(numbers) - int(sizes.sum()) :], _edges(sizes))

    @property
    def sizes(self) -> Numbers:
        return np.diff(self.edges)

    def owner(self, total: int) -> NDArray[np.int32]:
        """The place of the client of each number below `total`; -1 where it has none."""
        found = np.full(total, -1, dtype=np.int32)
        found[self.numbers] = np.repeat(np.arange(len(self.ids), dtype=np.int32), self.sizes)
        return found

    def mapped(self, to: Numbers) -> Held:
        """With `to[number]`, which ascends, in each number's stead."""
        return Held(self.ids, to[self.numbers], self.edges)

    def only(self, kept: NDArray[np.bool_]) -> Held:
        """Without the places of `numbers` that are not kept."""
        before = np.concatenate([[0], np.cumsum(kept)])
        return Held(self.ids, self.numbers[kept], before[self.edges])

    def at(self, place: int) -> Numbers:
        return self.numbers[self.edges[place] : self.edges[place + 1]]

    def __getitem__(self, name: str) -> Numbers:
        return self.at(self.ids.place(name))

    def __contains__(self, name: object) -> bool:
        return name in self.ids

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def _edges(sizes: NDArray[np.integer]) -> Numbers:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


class ClientData(NamedTuple):
    """One client's examples. Its FedAvg weight is `len(train)`."""

    id: str
    train: Examples
    validation: Examples
    test: Examples


class ClientTable(Mapping[str, ClientData]):
    """All clients' examples by client id; what is given is made anew each time."""

    def __init__(self, tokens: Tokens, held: Mapping[str, Held]) -> None:
        self.tokens = tokens
        self.held = held  # part -> who holds which examples
        self.ids = held["train"].ids

    def at(self, place: int) -> ClientData:
        parts = (Examples(self.tokens, self.held[part].at(place)) for part in PARTS)
        return ClientData(self.ids[place], *parts)

    def __getitem__(self, name: str) -> ClientData:
        return self.at(self.ids.place(name))

    def __contains__(self, name: object) -> bool:
        return name in self.ids

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)
