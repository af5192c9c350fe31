"""Rows on disk, read when they are asked for; in memory, eight bytes of each.

A row is a line of JSON: its fields, and under `columns` the original, where a value that a field has too is named
instead of written twice. Beside the lines lie an array of where they begin, a digest of each row's content (equal for
exact duplicates), and its category and file as numbers. Imports neither numpy nor torch.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, overload

from fedloom.data.cache import Entry

__all__ = ["BLOCK_BYTES", "BLOCK_ROWS", "Part", "Row", "RowWriter", "Rows", "Some", "blocks", "from_entry"]

Row = dict[str, Any]

BLOCK_ROWS = 1000
BLOCK_BYTES = 1 << 20  # of text: a block of long rows has fewer of them
_LINES, _BEGINS, _CONTENT = "rows.jsonl", "begins.i64", "content.16"
_CODED = ("category", "file")  # what rows are often split by
_FLUSH_ROWS = 1 << 14


def encode(row: Mapping[str, Any]) -> bytes:
    """A row as a line. What JSON does not have (a date of a parquet file, say) becomes its text."""
    fields = {name: value for name, value in row.items() if name != "columns"}
    line: list[Any] = [fields]
    if "columns" in row:
        texts = {value: name for name, value in fields.items() if isinstance(value, str)}
        others = {name: value for name, value in fields.items() if isinstance(value, (list, dict))}
        columns: dict[str, Any] = {}
        for name, value in row["columns"].items():
            same: str | None = None
            if isinstance(value, str):
                same = texts.get(value)
            elif others and isinstance(value, (list, dict)):
                same = next((field for field, other in others.items() if other == value), None)
            columns[name] = [value] if same is None else same
        line.append(columns)
    # Half a surrogate pair is no UTF-8, but may well stand in a column that nobody uses.
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def decode(line: bytes) -> Row:
    fields, *rest = json.loads(line.decode("utf-8", "surrogatepass"))
    if rest:
        fields["columns"] = {
            name: fields[value] if isinstance(value, str) else value[0] for name, value in rest[0].items()
        }
    return fields  # type: ignore[no-any-return]


class RowWriter:
    """Takes rows one by one, and keeps none: into a folder, or into memory where there is none.

    `content` gives 16 bytes that are equal for rows with the same content.
    """

    def __init__(self, folder: Path | None, content: Callable[[Row], bytes]) -> None:
        self._content = content
        self._files: dict[str, IO[bytes]] = {}
        self._memory: dict[str, bytearray] = {}
        for name in (_LINES, _BEGINS, _CONTENT, *(f"{one}.i32" for one in _CODED)):
            if folder is None:
                self._memory[name] = bytearray()
            else:
                self._files[name] = (folder / name).open("wb", buffering=1 << 20)
        self._codes: dict[str, dict[str, int]] = {name: {} for name in _CODED}
        self._columns: dict[str, None] = {}
        self._digest = hashlib.sha256()
        self._waiting: dict[str, array[int]] = {name: array("i") for name in _CODED}
        self._begins = array("q", [0])
        self._at = 0
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def append(self, row: Row) -> None:
        line = encode(row)
        self._digest.update(line)
        self._put(_LINES, line)
        self._put(_CONTENT, self._content(row))
        self._at += len(line)
        self._begins.append(self._at)
        for name in _CODED:
            value = row.get(name)
            known = self._codes[name]
            self._waiting[name].append(-1 if value is None else known.setdefault(str(value), len(known)))
        if not self._columns.keys() >= row.get("columns", {}).keys():
            self._columns.update(dict.fromkeys(row["columns"]))
        self._number += 1
        if len(self._begins) >= _FLUSH_ROWS:
            self._flush()

    def _put(self, name: str, data: bytes) -> None:
        if self._files:
            self._files[name].write(data)
        else:
            self._memory[name] += data

    def _flush(self) -> None:
        self._put(_BEGINS, self._begins.tobytes())
        self._begins = array("q")
        for name, codes in self._waiting.items():
            self._put(f"{name}.i32", codes.tobytes())
            self._waiting[name] = array("i")

    def finish(self) -> dict[str, Any]:
        """Write what waits and close the files; gives what `Part` needs besides them."""
        self._flush()
        for stream in self._files.values():
            stream.close()
        return {
            "rows": self._number,
            "digest": self._digest.hexdigest(),
            "columns": list(self._columns),
            **{name: list(codes) for name, codes in self._codes.items()},
        }

    def rows(self) -> Rows:
        """The rows of a writer without a folder."""
        facts = self.finish()
        memory = self._memory
        lines = memory[_LINES]
        return Rows([Part(facts, lambda begin, end: bytes(lines[begin:end]), lambda name: memoryview(memory[name]))])


class Part:
    """Rows that were written together.

    Args:
        facts: what `RowWriter.finish` gave.
        lines: gives a stretch of the lines.
        view: gives an array's bytes by its file's name.
        entry: where they lie, if they do.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        lines: Callable[[int, int], bytes],
        view: Callable[[str], memoryview],
        entry: Entry | None = None,
    ) -> None:
        self.digest = str(facts["digest"])
        self.column_names: Sequence[str] = facts["columns"]
        self.entry = entry
        self._facts = facts
        self._lines = lines
        self._view = view
        self._begins = view(_BEGINS).cast("q")

    def __len__(self) -> int:
        return len(self._begins) - 1

    def row(self, number: int) -> Row:
        return decode(self._lines(self._begins[number], self._begins[number + 1]))

    def stretch(self, first: int, last: int) -> list[Row]:
        """Rows `first` to `last - 1`, read at once."""
        lines = self._lines(self._begins[first], self._begins[last])
        return [decode(line) for line in lines.splitlines()]

    def blocks(self, most_rows: int = BLOCK_ROWS, most_bytes: int = BLOCK_BYTES) -> Iterator[list[Row]]:
        first = 0
        while first < len(self):
            within = bisect.bisect_right(self._begins, self._begins[first] + most_bytes) - 1
            last = max(first + 1, min(first + most_rows, within))
            yield self.stretch(first, last)
            first = last

    @property
    def content(self) -> memoryview:
        """16 bytes a row."""
        return self._view(_CONTENT)

    def codes(self, name: str) -> tuple[memoryview, Sequence[str]]:
        """Category or file of each row: numbers (int32, -1 for none), and what they stand for."""
        return self._view(f"{name}.i32").cast("i"), self._facts[name]


def from_entry(entry: Entry) -> Rows:
    """The rows of an entry whose header has under `store` what `RowWriter.finish` gave."""
    return Rows([Part(entry.header["store"], lambda begin, end: entry.read(_LINES, begin, end), entry.view, entry)])


class Rows(Sequence[Row]):
    """Rows in one sequence, whose parts were written apart. A row is made anew each time it is asked for."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | Sequence[Row]:
        if isinstance(number, slice):
            return Some(self, range(*number.indices(len(self))))
        number = int(number)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        place = bisect.bisect_right(self._ends, number)
        part = self.parts[place]
        return part.row(number - self._ends[place] + len(part))

    def __iter__(self) -> Iterator[Row]:
        return (row for block in self.blocks() for row in block)

    def __add__(self, other: Rows) -> Rows:
        return Rows([*self.parts, *other.parts])

    def blocks(self, most_rows: int = BLOCK_ROWS, most_bytes: int = BLOCK_BYTES) -> Iterator[list[Row]]:
        """All rows in order, some at a time: at least one, and no more than fit in `most_bytes` of text."""
        for part in self.parts:
            yield from part.blocks(most_rows, most_bytes)

    @property
    def column_names(self) -> list[str]:
        """All columns that any row has, as they were first met."""
        return list(dict.fromkeys(name for part in self.parts for name in part.column_names))

    def counts(self, name: str) -> dict[str, int]:
        """Rows of each category, or of each file, as they were first met; rows that have none are not counted."""
        found: dict[str, int] = {}
        for part in self.parts:
            codes, names = part.codes(name)
            for code, count in sorted(Counter(codes).items()):
                if code >= 0:
                    found[names[code]] = found.get(names[code], 0) + count
        return found

    @property
    def digest(self) -> str:
        """Of all rows, with their categories and files."""
        return hashlib.sha256("".join(part.digest for part in self.parts).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of the lines."""
        return sum(part._begins[-1] for part in self.parts)


class Some(Sequence[Row]):
    """Some rows of a sequence, by number: `numbers` is any sequence or array of them."""

    def __init__(self, rows: Sequence[Row], numbers: Any) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | Sequence[Row]:
        if isinstance(number, slice):
            return Some(self.rows, self.numbers[number])
        return self.rows[int(self.numbers[number])]


def blocks(rows: Sequence[Row], most_rows: int = BLOCK_ROWS, most_bytes: int = BLOCK_BYTES) -> Iterator[Sequence[Row]]:
    """Any rows, some at a time."""
    if isinstance(rows, Rows):
        yield from rows.blocks(most_rows, most_bytes)
        return
    for begin in range(0, len(rows), most_rows):
        yield list(rows[begin : begin + most_rows])
