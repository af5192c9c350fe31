"""Columns of many rows as numbers: categories, files, exact duplicates."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data.cache import prepared
from fedloom.data.rows import as_rows
from fedloom.data.store import Part, Row

Numbers = NDArray[np.int64]  # row numbers, ascending
Groups = dict[str, Numbers]  # client id -> its rows

_CODES = "codes.i32"


@dataclass(frozen=True, eq=False)
class Keys:
    """What each row is split by: `names[codes[row]]`, or nothing where the code is -1."""

    codes: NDArray[np.int32]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def known(self) -> Numbers:
        """The rows that have a key."""
        return np.flatnonzero(self.codes >= 0)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Keys:
        """The keys of some rows."""
        return Keys(self.codes[rows], self.names)

    def members(self) -> Groups:
        """The rows of each key that has any, by name."""
        order = np.argsort(self.codes, kind="stable")
        sizes = np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))
        order = order[len(order) - int(sizes.sum()) :]
        edges = np.concatenate([[0], np.cumsum(sizes)])
        return {name: order[edges[code] : edges[code + 1]] for code, name in enumerate(self.names) if sizes[code]}


def coded(values: Iterable[Hashable | None]) -> tuple[NDArray[np.int32], list[Hashable]]:
    """Values as numbers, -1 for None, and what each number stands for, in the order of first appearance."""
    found: dict[Hashable, int] = {}
    codes = np.fromiter((-1 if one is None else found.setdefault(one, len(found)) for one in values), dtype=np.int32)
    return codes, list(found)


def keys_from(values: Iterable[str | None]) -> Keys:
    codes, names = coded(values)
    return Keys(codes, [str(name) for name in names])


def categories(rows: Sequence[Row]) -> Keys:
    """Each row's category."""
    return _stored(rows, "category")


def files(rows: Sequence[Row]) -> Keys:
    """The file each row is from, where there were several."""
    return _stored(rows, "file")


def contents(rows: Sequence[Row]) -> NDArray[np.int32]:
    """A number per row, equal for exact duplicates, from 0 without gaps."""
    parts = [np.frombuffer(part.content, dtype=np.uint64).reshape(-1, 2) for part in as_rows(rows).parts]
    words = np.concatenate(parts) if len(parts) != 1 else parts[0]
    if not len(words):
        return np.zeros(0, dtype=np.int32)
    order = np.lexsort((words[:, 1], words[:, 0]))
    sorted_words = words[order]
    new = np.any(sorted_words[1:] != sorted_words[:-1], axis=1)
    found = np.empty(len(words), dtype=np.int32)
    found[order] = np.concatenate([[0], np.cumsum(new, dtype=np.int32)])
    return found


def column(rows: Sequence[Row], name: str) -> tuple[Keys, bool]:
    """The values of one of the data's own columns as text, None where empty; and whether any is a list or an object.

    Every row is read for it, once: the answer is kept with what is prepared.
    """
    found = [_column(part, name) for part in as_rows(rows).parts]
    return _joined([keys for keys, _ in found]), any(nested for _, nested in found)


def _stored(rows: Sequence[Row], name: str) -> Keys:
    found = []
    for part in as_rows(rows).parts:
        codes, names = part.codes(name)
        found.append(Keys(np.frombuffer(codes, dtype=np.int32), names))
    return _joined(found)


def _joined(parts: Sequence[Keys]) -> Keys:
    """Keys of parts that were numbered apart."""
    if len(parts) == 1:
        return parts[0]
    together: dict[str, int] = {}
    codes = []
    for keys in parts:
        numbers = [together.setdefault(name, len(together)) for name in keys.names]
        codes.append(np.asarray([*numbers, -1], dtype=np.int32)[keys.codes])
    return Keys(np.concatenate(codes) if codes else np.zeros(0, dtype=np.int32), list(together))


def _column(part: Part, name: str) -> tuple[Keys, bool]:
    if part.entry is None or not part.entry.kept:
        return _looked_up(part, name)

    def build(folder: Path) -> dict[str, Any]:
        keys, nested = _looked_up(part, name)
        keys.codes.tofile(folder / _CODES)
        return {"names": list(keys.names), "nested": nested, "source": f"column {name}"}

    entry = prepared("keys", {"rows": part.digest, "column": name}, build)
    codes = np.frombuffer(entry.view(_CODES), dtype=np.int32)
    return Keys(codes, entry.header["names"]), bool(entry.header["nested"])


def _looked_up(part: Part, name: str) -> tuple[Keys, bool]:
    nested = False

    def values() -> Iterable[str | None]:
        nonlocal nested
        for row in (row for block in part.blocks() for row in block):
            value = row["columns"].get(name)
            nested = nested or isinstance(value, (list, dict))
            # NaN is not equal to itself
            yield None if value is None or value != value else str(value).strip() or None

    keys = keys_from(values())
    return keys, nested
