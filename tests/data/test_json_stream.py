"""A .json file read through a window is what it is when parsed whole, down to the place of an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data import plain

from fedloom.data import json_stream
from fedloom.data.json_stream import Text, list_items
from fedloom.data.rows import _json_rows
from fedloom.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
TOPS = st.lists(VALUES, max_size=4) | VALUES | st.dictionaries(st.text(max_size=3), st.lists(VALUES, max_size=3))


def same(path: Path, text: str) -> None:
    """The rows and errors of `_json_rows` are those of the plain way."""
    path.write_text(text, encoding="utf-8")
    wanted: Any
    try:
        wanted = plain.json_rows(text)
    except json.JSONDecodeError:  # a line of JSON lines: has its own message
        wanted = "not JSON"
    except ValueError as error:
        wanted = str(error)
    try:
        found: Any = [raw.value for raw in _json_rows(path)]
    except UserError as error:
        found = str(error)
    if isinstance(wanted, str):
        assert isinstance(found, str) and wanted in found, (text, wanted, found)
    else:
        assert repr(found) == repr(wanted), text  # NaN is not equal to itself


@pytest.fixture(params=[1, 2, 3, 5, 8, 1 << 20])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_stream, "WINDOW", request.param)
    monkeypatch.setattr(Text.more, "__defaults__", (request.param,))
    return int(request.param)


@settings(max_examples=60)
@given(value=TOPS, indent=st.sampled_from([None, 1]), escape=st.booleans())
def test_any_file_is_read_as_if_whole(
    tmp_path_factory: pytest.TempPathFactory, value: Any, indent: int | None, escape: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(value, indent=indent, ensure_ascii=escape)
    for size in (1, 4, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_stream, "WINDOW", size)
            patch.setattr(Text.more, "__defaults__", (size,))
            same(path, f" {text}\n")


@settings(max_examples=150)
@given(data=st.data())
def test_a_broken_file_is_told_with_the_same_place(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "broken.json"
    rows = [{"a": "é\n𝄞 b", "n": -12.5e3, "l": [True, None]}, {"a": "\\", "n": 0}]
    text = json.dumps(rows if data.draw(st.booleans()) else {"v": 1, "rows": rows}, indent=1, ensure_ascii=False)
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 3))
    text = (
        text[:at] + data.draw(st.sampled_from(["", "]", "}", ",", '"', "\n", "x", "1", "[", "\\"])) + text[at + cut :]
    )
    with pytest.MonkeyPatch.context() as patch:
        size = data.draw(st.sampled_from([1, 3, 7, 1 << 20]))
        patch.setattr(json_stream, "WINDOW", size)
        patch.setattr(Text.more, "__defaults__", (size,))
        same(path, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "[]",
        "[ ]",
        "{}",
        "[1, 22,333 ]",
        "[12",
        "[12,",
        '["a"] []',
        '{"a": [1]} {"a": [2]}',
        '{"text": "a"}\n{"text": "b"}\n',
        '{"a": [1], "a": [2, 3]}',
        '{"a": [1], "b": [2]}',
        '{"a": {"b": [1]}, "c": [{"d": [5]}]}',
        '"text"',
        "17",
        "17 18",
        "nul",
        "[NaN, -Infinity, Infinity]",
        '["\\ud83d\\ude00", "\\ud83d"]',
        '[{"a": "\n"}]',
        '["\\x"]',
        '["\\u12"]',
    ],
)
def test_odd_files(tmp_path: Path, text: str, window: int) -> None:
    same(tmp_path / "odd.json", text)


def test_the_window_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"text": f"row {i} " + "x" * 500} for i in range(20_000)]))
    with path.open("rb") as stream:
        text = Text(stream, lambda raw, offset, line: raw.decode())
        text.skip()
        widest = max(len(text.text) for _ in list_items(text))
    assert path.stat().st_size > 10_000_000 and widest < 3 * json_stream.WINDOW


def test_a_byte_that_is_no_utf8_is_told_with_its_place(tmp_path: Path, window: int) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes('[{"text": "é"},\n {"text": "'.encode() + b'\xe9"}]')
    with pytest.raises(UserError, match=r"byte 0xe9 at offset 28, line 2"):
        list(_json_rows(path))
    path.write_bytes(b'[{"text": "\xf0\x9d')
    with pytest.raises(UserError, match=r"byte 0xf0 at offset 11, line 1"):
        list(_json_rows(path))
