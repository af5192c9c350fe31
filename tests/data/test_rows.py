"""Reading: every format, every kind, and every way a file can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.toys import alpaca_rows, write

from fedloom.data.rows import read, row_key
from fedloom.errors import UserError

ROWS = alpaca_rows(5, ["a", "b"])


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def write_object(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "data": ROWS}))


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def gzipped(plain: Callable[[Path], None]) -> Callable[[Path], None]:
    def write_it(path: Path) -> None:
        plain(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_it


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("d.json", write_json),
        ("object.json", write_object),
        ("lines.json", write_jsonl),
        ("d.jsonl", write_jsonl),
        ("d.csv", write_csv),
        ("d.parquet", write_parquet),
        ("d.json.gz", gzipped(write_json)),
        ("d.jsonl.gz", gzipped(write_jsonl)),
        ("D.CSV.GZ", gzipped(write_csv)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, writer: Callable[[Path], None]) -> None:
    writer(tmp_path / name)
    source = read(str(tmp_path / name))
    assert [{key: row[key] for key in ROWS[0]} for row in source.rows] == ROWS
    assert source.kind == "alpaca" and source.read == 5 and source.said == "read as alpaca: 5 rows"
    assert source.rows[0]["columns"] == ROWS[0]


def test_a_byte_order_mark_is_taken_off(tmp_path: Path) -> None:
    for name, writer in (("d.json", write_json), ("d.jsonl", write_jsonl), ("d.csv", write_csv)):
        writer(tmp_path / name)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert len(read(str(tmp_path / name)).rows) == 5


def test_csv_keeps_line_breaks_commas_and_quotes_in_values(tmp_path: Path) -> None:
    odd = 'one,\n"two"\r\nthree é' + "x" * 200_000
    with (tmp_path / "d.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["instruction", "output"], ["q", odd]])
    assert read(str(tmp_path / "d.csv")).rows[0]["output"] == odd


# ---------------------------------------------------------------- kinds


def of(tmp_path: Path, rows: list[Any], **settings: Any) -> Any:
    return read(write(tmp_path / "rows.jsonl", rows), **settings)


def test_dolly_names_are_recognised(tmp_path: Path) -> None:
    row = {"instruction": "i", "context": "c", "response": "r", "category": "open_qa"}
    source = of(tmp_path, [row])
    assert {k: source.rows[0][k] for k in ("instruction", "input", "output", "category")} == {
        "instruction": "i",
        "input": "c",
        "output": "r",
        "category": "open_qa",
    }
    assert source.columns == {
        "instruction": "instruction",
        "input": "context",
        "output": "response",
        "category": "category",
    }


def test_gsm8k_marker_becomes_a_sentence_and_annotations_stay(tmp_path: Path) -> None:
    answer = "He has 2+3=<<2+3=5>>5.\n#### 1,234"
    source = of(tmp_path, [{"question": "How many?", "answer": answer}])
    assert source.rows[0]["output"] == "He has 2+3=<<2+3=5>>5.\nThe answer is 1,234."
    assert source.rows[0]["columns"]["answer"] == answer
    assert source.notes == ("1 rows: the marker '#### N' became 'The answer is N.'",)
    named = of(tmp_path, [{"question": "q", "answer": answer}], columns={"instruction": "question", "output": "answer"})
    assert named.rows[0]["output"].endswith("\nThe answer is 1,234.")


def test_a_heading_in_another_answer_is_not_a_gsm8k_marker(tmp_path: Path) -> None:
    kept = of(tmp_path, [{"instruction": "i", "output": "text\n#### Heading"}]).rows[0]["output"]
    inside = of(tmp_path, [{"question": "i", "answer": "text\n#### Heading\nmore"}]).rows[0]["output"]
    assert kept.endswith("#### Heading") and "answer is" not in inside


def test_chat_messages_and_sharegpt(tmp_path: Path) -> None:
    openai = of(tmp_path, [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}])
    assert openai.kind == "chat"
    assert openai.rows[0]["messages"] == [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    talk = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "open end"}]
    shared = of(tmp_path, [{"system": "s", "conversations": talk}])
    assert [one["role"] for one in shared.rows[0]["messages"]] == ["system", "user", "assistant"]


def test_conversational_prompt_completion_trains_on_the_completion_alone(tmp_path: Path) -> None:
    row = {
        "prompt": [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "earlier"},
            {"role": "user", "content": "2"},
        ],
        "completion": [{"role": "assistant", "content": "this"}],
    }
    messages = of(tmp_path, [row]).rows[0]["messages"]
    assert [one.get("train") for one in messages] == [None, False, None, None]


def test_plain_kinds_and_a_type_that_is_asked_for(tmp_path: Path) -> None:
    assert of(tmp_path, [{"prompt": "p", "completion": "c"}]).kind == "prompt_completion"
    assert of(tmp_path, [{"text": "t", "source": "x"}]).kind == "completion"
    both = [{"instruction": "i", "output": "o", "text": "t"}]
    assert of(tmp_path, both).kind == "alpaca"
    assert of(tmp_path, both, type="completion").rows[0]["text"] == "t"


def test_columns_are_renamed(tmp_path: Path) -> None:
    columns = {"instruction": "ask", "output": "say", "category": "lang"}
    row = of(tmp_path, [{"ask": "i", "say": "o", "lang": 3}], columns=columns).rows[0]
    assert (row["instruction"], row["output"], row["category"], row["input"]) == ("i", "o", "3", "")


def test_a_hundred_rows_are_looked_at_not_one(tmp_path: Path) -> None:
    rows = [{"instruction": "i", "output": "", "response": f"r{n}"} for n in range(50)]
    assert of(tmp_path, rows).rows[7]["output"] == "r7"
    odd = [{"instruction": "i", "output": ""}, *({"instruction": "i", "response": "r"} for _ in range(9))]
    assert of(tmp_path, odd).dropped == {"empty output": 1}
    late = [{"instruction": f"i{n}", "output": "o"} for n in range(150)]
    late += [{"instruction": "i", "input": "late", "output": "o"}]
    assert of(tmp_path, late).rows[-1]["input"] == "late"


def test_unpaired_data_is_recognised_and_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unpaired") as caught:
        of(tmp_path, [{"prompt": "p", "completion": "c", "label": True}])
    assert caught.value.code == "data.unpaired" and "data.columns" in caught.value.hint


def test_one_column_of_preference_data_may_be_imitated(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    for kind in ("prompt_completion", "auto"):
        source = of(tmp_path, rows, type=kind, columns={"completion": "chosen"})
        assert source.kind == "prompt_completion" and source.rows[0]["completion"] == "c"
    asked = [{"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "c"}}]
    names = {"prompt": "conversations", "completion": "chosen"}
    assert of(tmp_path, asked, columns=names).rows[0]["messages"][-1]["content"] == "c"


def test_messages_beside_a_prompt_are_a_chat(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert of(tmp_path, [{"prompt": "u", "completion": "a", "messages": messages}]).kind == "chat"


# ---------------------------------------------------------------- null fields


def test_null_fields_never_become_the_word_none(tmp_path: Path) -> None:
    rows = [
        {"instruction": "i", "input": None, "output": "kept"},
        {"instruction": "i", "output": "no input at all"},
        {"instruction": None, "input": "x", "output": "gone"},
        {"instruction": "i", "input": "x", "output": None},
        {"instruction": "i", "input": "x", "output": " \n"},
        {"input": "x", "output": "gone"},
        {"instruction": "i", "input": float("nan"), "output": "nan input"},
        {"instruction": "i", "input": " \n", "output": 7},
    ]
    source = of(tmp_path, rows)
    assert [row["input"] for row in source.rows] == ["", "", "", ""]
    assert [row["output"] for row in source.rows] == ["kept", "no input at all", "nan input", "7"]
    assert source.dropped == {"empty instruction": 2, "empty output": 2}
    assert source.read == len(source.rows) + sum(source.dropped.values())
    assert "None" not in repr([{k: v for k, v in row.items() if k != "columns"} for row in source.rows])
    assert "4 left out (empty instruction: 2, empty output: 2)" in source.said.replace(",", ",")


def test_null_fields_in_chats(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": good},
        {"messages": None},
        {"messages": good[:1]},
        {"messages": [good[0], {"role": "assistant", "content": None}]},
        {"messages": [{"role": "system", "content": None}, *good]},
    ]
    source = of(tmp_path, rows)
    assert source.dropped == {"no messages": 1, "no answer": 1, "empty answer": 1}
    assert source.rows[1]["messages"][0] == {"role": "system", "content": ""}


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud83d"}\n{"text": "fine"}\n')
    source = read(str(tmp_path / "d.jsonl"))
    assert len(source.rows) == 1 and source.dropped == {"broken Unicode in text": 1}


def test_no_usable_row_is_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not one of 2 rows can be used \(empty output: 2\)"):
        of(tmp_path, [{"instruction": "i", "output": None}] * 2)


# ---------------------------------------------------------------- bad files


def fails(path: Path | str, code: str, *words: str, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(str(path), **settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.code == code and caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.csv"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    for content in ("", "\n \n"):
        (tmp_path / name).write_text(content)
        if name == "d.csv" and content:
            continue  # a line with a space is a header
        fails(tmp_path / name, "data.empty", "empty")
    if name == "d.csv":
        (tmp_path / name).write_text("instruction,output\n")
        fails(tmp_path / name, "data.empty")
    if name == "d.json":
        (tmp_path / name).write_text("[]")
        fails(tmp_path / name, "data.empty")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path / "trian.jsonl", "data.missing", "no such file", "train.jsonl")
    fails(tmp_path / "nowhere" / "train.jsonl", "data.missing", "does not exist", str(tmp_path))
    fails(tmp_path / "*.csv", "data.missing", "no data file matches")
    fails(tmp_path / "notes.txt", "data.format", ".jsonl")


def test_wrong_columns_say_what_there_is_and_what_was_expected(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"Frage": "q", "Antwort": "a"}])
    fails(path, "data.columns", "Frage, Antwort", "alpaca (instruction, output)", "data.columns='{instruction: COLUMN")
    fails(path, "data.columns", "no such column", "did you mean 'Frage'", columns={"instruction": "Frag"})
    fails(path, "data.columns", "did you mean 'instruction'", columns={"instructon": "Frage"})
    fails(path, "data.columns", "chat (messages)", type="chat")
    fails(path, "data.type", "no such type", type="alpacka")
    fails(path, "data.columns", "preference (chosen, rejected)", type="preference")
    fails(path, "data.unpaired", type="unpaired")
    fails(path, "data.limit", "at least 1", limit=0)


def test_a_malformed_line_has_its_number(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + '{"instruction": "i", \n')
    fails(path, "data.malformed", "line 3", "not JSON")
    path.write_text(json.dumps(ROWS[0]) + "\n[1]\n")
    fails(path, "data.malformed", "line 2", "a list; expected an object")
    path = tmp_path / "d.json"
    path.write_text('[{"text": "a"},\n {"text": b}]')
    fails(path, "data.malformed", "line 2", "column")
    path.write_text('{"train": [], "test": []}')
    fails(path, "data.malformed", "2 lists (test, train)")
    path.write_text('{"text": "a"}\n{"text": \n')
    fails(path, "data.malformed", "line 2")
    path.write_text("[" * 100_000)
    fails(path, "data.malformed")
    path.write_text('[{"instruction": "i", "output": ["o"]}]')
    fails(path, "data.field", "row 1", "output is a list; expected text")
    path.write_text('[{"messages": [{"role": "robot", "content": "x"}]}]')
    fails(path, "data.field", "robot")


def test_not_utf8_gives_file_offset_line_and_a_way_out(tmp_path: Path) -> None:
    for name, text in (
        ("d.jsonl", '{"text": "a"}\n{"text": "caf\xe9"}\n'),
        ("d.json", '[{"text": "a"},\n{"text": "caf\xe9"}]'),
        ("d.csv", "text\ncaf\xe9\n"),
    ):
        raw = text.encode("latin-1")
        (tmp_path / name).write_bytes(raw)
        fails(
            tmp_path / name,
            "data.encoding",
            name,
            "0xe9",
            f"offset {raw.index(0xE9)},",
            "line 2",
            "iconv -f WINDOWS-1252",
        )
    (tmp_path / "u.json").write_bytes(json.dumps(ROWS).encode("utf-16"))
    fails(tmp_path / "u.json", "data.encoding", "UTF-16")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xff"}\n')
    fails(tmp_path / "b.jsonl", "data.encoding", "offset 13")


def test_broken_csv(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("instruction,output\na,b,c\n")
    fails(path, "data.malformed", "line 2", "3 values for 2 columns")
    path.write_text('instruction,output\na,"b\n')
    fails(path, "data.malformed", "not CSV")
    path.write_text("instruction;output\na;b\n")
    fails(path, "data.columns", "separated by ;")
    path.write_text("output,output\na,b\n")
    fails(path, "data.columns", "'output' is there twice")


def test_damaged_archives(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(ROWS).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[:-20])
    fails(tmp_path / "cut.json.gz", "data.damaged", "gzip")
    (tmp_path / "not.json.gz").write_bytes(b"[]")
    fails(tmp_path / "not.json.gz", "data.damaged", "gzip")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing")
    fails(tmp_path / "d.parquet", "data.damaged", "parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "d.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    fails(tmp_path / "d.parquet", "data.extra", "needs pyarrow", "pip install 'fedloom[data]'", cache=False)


# ---------------------------------------------------------------- folders, limits


def test_a_folder_is_many_files(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", alpaca_rows(3))
    write(tmp_path / "a.json", alpaca_rows(2, first=10))
    write(tmp_path / "test.jsonl", alpaca_rows(2, first=20))
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".hidden.json").write_text("x")
    source = read(str(tmp_path), exclude=[str(tmp_path / "test.jsonl")])
    assert source.files == ("a", "b") and [row["file"] for row in source.rows] == ["a", "a", "b", "b", "b"]
    assert [row["file"] for row in read(str(tmp_path / "[ab].json*")).rows] == ["a", "a", "b", "b", "b"]
    assert [row["file"] for row in read(str(tmp_path), limit=5).rows] == ["a", "a", "b", "b", "test"]
    assert "file" not in read(str(tmp_path / "a.json")).rows[0]


def test_stems_that_collide_stay_apart(tmp_path: Path) -> None:
    for name in ("one/part.jsonl", "two/part.jsonl"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, ROWS)
    assert read(str(tmp_path)).files == ("one_part", "two_part")
    write(tmp_path / "x.json", ROWS)
    write(tmp_path / "x.jsonl", ROWS)
    assert len(set(read(str(tmp_path)).files)) == 2


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("x")
    fails(tmp_path, "data.empty_folder", "readme.md")
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", [{"text": "t"}])
    fails(tmp_path, "data.mixed", "a reads as alpaca, but b as completion")
    (tmp_path / "b.jsonl").write_text("")
    fails(tmp_path, "data.empty", "b: empty")


def test_limit_takes_the_first_rows_without_reading_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "not json\n")
    assert [row["instruction"] for row in read(str(path), limit=3).rows] == [row["instruction"] for row in ROWS[:3]]


# ---------------------------------------------------------------- hub ids


def test_a_hub_id_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str) -> dict[str, Any]:
        asked.append(name)
        return {"train": ROWS, "test": ROWS[:1]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(read("owner/name").rows) == 5 and asked == ["owner/name"]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name: {"a": ROWS, "b": ROWS}))
    fails("owner/name", "data.hub", "the splits are a, b")


def test_a_hub_id_offline_says_what_to_fetch_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    fails(
        "owner/name",
        "data.hub",
        "OfflineModeIsEnabled",
        "hf download owner/name --repo-type dataset --local-dir name",
        "data.path=name",
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("owner/name", "data.extra", "needs datasets", "fedloom[data]")


def test_the_real_datasets_library_offline(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set for the tests, so this is what a machine without network sees."""
    fails("fedloom-tests/no-such-data", "data.hub", "hf download fedloom-tests/no-such-data")


# ---------------------------------------------------------------- built-in, duplicates, start-up


def test_builtin_tasks_bring_clients_and_splits() -> None:
    source = read("builtin:skills", seed=3)
    assert source.natural is not None and source.task.name == "skills"
    places = [place for parts in source.natural.values() for part in parts.values() for place in part]
    assert sorted(places) == list(range(len(source.rows)))
    some = read("builtin:skills", seed=3, limit=40)
    assert some.natural is not None and all(len(part) for parts in some.natural.values() for part in parts.values())
    assert len(some.rows) <= 60
    fails("builtin:skils", "data.builtin", "did you mean 'skills'", "builtin:arith")


@given(st.text(), st.text(), st.text(), st.text())
def test_row_keys_tell_contents_apart(a: str, b: str, c: str, d: str) -> None:
    def key(instruction: str, output: str) -> bytes:
        row = {
            "kind": "alpaca",
            "instruction": instruction,
            "input": "",
            "output": output,
            "category": "x",
            "columns": {},
        }
        assert row_key(row) == row_key({**row, "category": "y", "columns": {"z": 1}})
        return row_key(row)

    assert (key(a, b) == key(c, d)) == ((a, b) == (c, d))


def test_reading_rows_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    code = (
        "import sys; from fedloom.data import read; read(sys.argv[1]); "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
