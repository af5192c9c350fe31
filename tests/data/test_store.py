"""Rows on disk are the rows that were written, whichever way they are asked for."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.toys import alpaca_rows, write

from fedloom.data import keys as columns
from fedloom.data import store
from fedloom.data.builtin import TASKS
from fedloom.data.rows import as_rows, read, row_key
from fedloom.data.store import BLOCK_ROWS, Some, blocks, decode, encode

TEXT = st.text(st.characters(), max_size=8)  # half surrogates included
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(["instruction", "output", "category"]), TEXT), JSON, st.dictionaries(TEXT, JSON))
def test_a_row_comes_back_as_it_was(fields: dict[str, str], messages: Any, raw: dict[str, Any]) -> None:
    shared = {f"the {name}": value for name, value in fields.items()}
    for row in (
        {"kind": "alpaca", **fields, "columns": {**raw, **shared}},
        {"kind": "chat", "messages": messages, "columns": {"conversations": messages, **raw}},
        {"kind": "alpaca", **fields},
    ):
        line = encode(row)
        assert line.endswith(b"\n") and line.count(b"\n") == 1 and len(line.splitlines()) == 1
        back = decode(line)
        assert back == row and list(back.get("columns", {})) == list(row.get("columns", {}))


def test_what_a_field_has_too_is_written_once() -> None:
    text = "long " * 100
    assert len(encode({"kind": "completion", "text": text, "columns": {"text": text}})) < 1.2 * len(text)


def test_rows_are_asked_for_by_number_by_slice_and_in_order(tmp_path: Path) -> None:
    wanted = alpaca_rows(2 * BLOCK_ROWS + 7, ["a", "b"])
    first, second = wanted[:BLOCK_ROWS], wanted[BLOCK_ROWS:]
    parts = [read(write(tmp_path / f"{name}.jsonl", part)).rows for name, part in (("a", first), ("b", second))]
    rows = parts[0] + parts[1]
    assert len(rows) == len(wanted)

    def plain(found: Any) -> list[Any]:
        return [row["columns"] for row in found]

    assert plain(rows) == wanted and plain(rows[i] for i in range(len(rows))) == wanted
    assert plain(rows[5:20:3]) == wanted[5:20:3] and plain(rows[-3:]) == wanted[-3:]
    assert rows[-1]["columns"] == wanted[-1] and plain(Some(rows, [3, 3, 1])) == [wanted[3], wanted[3], wanted[1]]
    for beyond in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[beyond]
    assert [len(block) for block in rows.blocks()] == [BLOCK_ROWS, BLOCK_ROWS, 7]
    assert plain(row for block in blocks(rows, 10, 500) for row in block) == wanted
    assert all(len(block) <= 3 for block in blocks(rows, 10, 500)) and max(map(len, blocks(rows, 10))) == 10
    assert rows.counts("category") == {"a": BLOCK_ROWS + 4, "b": BLOCK_ROWS + 3} and rows.counts("file") == {}
    assert columns.categories(rows).names == ["a", "b"] and rows.column_names == list(wanted[0])


def test_long_rows_come_in_small_blocks() -> None:
    rows = as_rows([{"kind": "completion", "text": str(i) * 3000, "columns": {}} for i in range(10)])
    assert [len(block) for block in rows.blocks(most_bytes=10_000)] == [3, 3, 3, 1]
    assert [len(block) for block in rows.blocks(most_bytes=10)] == [1] * 10


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_contents_are_equal_for_duplicates_alone(one: list[str], other: list[str]) -> None:
    made = [
        as_rows([{"kind": "completion", "text": text, "columns": {"i": i}} for i, text in enumerate(part)])
        for part in (one, other)
    ]
    rows = made[0] + made[1]
    codes = columns.contents(rows).tolist()
    texts = one + other
    assert len(codes) == len(texts) and sorted(set(codes)) == list(range(len(set(texts))))
    assert all((codes[i] == codes[j]) == (texts[i] == texts[j]) for i in range(len(texts)) for j in range(i))


def test_columns_of_several_parts_are_numbered_together() -> None:
    def part(values: list[Any]) -> Any:
        return as_rows(
            [{"kind": "completion", "text": "t", "category": "x", "columns": {"user": value}} for value in values]
        )

    keys, nested = columns.column(part(["u", 2, None, " "]) + part([float("nan"), "2", " v "]), "user")
    assert [None if code < 0 else keys.names[code] for code in keys.codes] == ["u", "2", None, None, None, "2", "v"]
    assert not nested and columns.column(part(["u", ["l"]]), "user")[1]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_rows_of_built_in_tasks_are_what_the_task_made(name: str) -> None:
    source = read(f"builtin:{name}", seed=5)
    made = [row for parts in TASKS[name].rows(5).values() for part in parts.values() for row in part]
    assert [row["columns"] for row in source.rows] == made
    assert all({**row, "columns": 0} == {"kind": "alpaca", "input": "", **row["columns"], "columns": 0}
               for row in source.rows)  # fmt: skip


def test_what_json_does_not_have_becomes_text(tmp_path: Path) -> None:
    day = datetime.date(2024, 5, 17)
    rows = [{"text": "a", "day": day, "raw": b"\x00", "tags": ["x"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    row = read(str(tmp_path / "d.parquet")).rows[0]
    assert row["columns"] == {"text": "a", "day": str(day), "raw": str(b"\x00"), "tags": ["x"]}


def test_the_writer_keeps_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FLUSH_ROWS", 8)
    writer = store.RowWriter(tmp_path, row_key)
    for row in alpaca_rows(50):
        writer.append({"kind": "alpaca", **row, "columns": row})
        assert len(writer._begins) < 8 and all(len(codes) < 8 for codes in writer._waiting.values())
    assert writer.finish()["rows"] == 50
    assert (tmp_path / "begins.i64").stat().st_size == 8 * 51 and (tmp_path / "content.16").stat().st_size == 16 * 50
