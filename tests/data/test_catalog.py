"""Named sets: every line of the catalogue is whole, and files are found where they are said to be."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.data.toys import Data, Split, alpaca_rows, tokenizer, write

from fedloom.data import prepare, sources
from fedloom.data.catalog import CATALOG, find_set
from fedloom.data.rows import KINDS, field_names
from fedloom.data.sources import CONVERSIONS, PARSERS, find_files, sources_of
from fedloom.errors import UserError
from fedloom.study.load import validate_text
from fedloom.study.recipe import resolved_yaml

PLAIN = tokenizer()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of data sets; no hub."""
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "home"))
    monkeypatch.setenv("FEDLOOM_OFFLINE", "1")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files made up here may stand at their place: the checksums are not looked at."""
    monkeypatch.setattr(sources, "_is_published", lambda path, file: True)


def put(place: Path, rows: list[Any]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.name.endswith(".gz"):
        place.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        write(place, rows)
    return place


def gsm8k(number: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"what is {i} and {i}?", "answer": f"<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(first, first + number)
    ]


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", CATALOG)
def test_every_line_of_the_catalogue_is_whole(name: str, home: Path) -> None:
    entry = CATALOG[name]
    assert entry.name == name and entry.licence and entry.about and entry.published and entry.kind in KINDS
    assert set(entry.columns) <= set(field_names(entry.kind))
    assert (entry.parse is None or entry.parse in PARSERS) and (entry.convert is None or entry.convert in CONVERSIONS)
    for file in (file for form in entry.forms for file in (*form.train, *form.test)):
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert not file.url or file.url.startswith("https://")
    for revision in (entry.revision, entry.hub.revision if entry.hub else None):
        assert revision is None or re.fullmatch("[0-9a-f]{40}", revision)
    assert entry.revision is None or any(entry.revision in file.url for form in entry.forms for file in form.train)
    # The recipe that says no more than the name is sound, shows the split, and reads back as it was.
    text = f"model: m\nlocal_steps: 1\ndata:\n  name: {name}\n"
    recipe, _ = validate_text(text)
    assert {key: getattr(recipe.split, key) for key in entry.split} == dict(entry.split)
    assert recipe.data.path == "" and (recipe.data.test_set_size is None) == entry.has_test
    resolved = resolved_yaml(recipe)
    assert f"  name: {name}" in resolved and "path:" not in resolved.split("split:")[0]
    assert validate_text(resolved)[0] == recipe
    assert validate_text(text.replace("name:", "path:"))[0] == recipe
    # And where its files are not, the error says which to fetch and where to put them.
    with pytest.raises(UserError) as caught:
        sources_of(recipe.data, 0)
    first = entry.forms[0].train[0]
    assert caught.value.code == "data.missing" and str(home / entry.folder / first.name) in str(caught.value)
    assert first.url in caught.value.hint and "data.path=FILE" in caught.value.hint


def test_the_sets_that_are_meant_are_there() -> None:
    wanted = "fed-codealpaca fed-dolly fed-gsm8k fed-codesearchnet alpaca alpaca-cleaned fingpt medalpaca "
    wanted += "code-alpaca-20k alpaca-gpt4 tinyshakespeare hh-harmless"
    assert set(wanted.split()) <= set(CATALOG)
    clients = {
        name: CATALOG[name].clients for name in ("fed-codealpaca", "fed-dolly", "fed-gsm8k", "fed-codesearchnet")
    }
    assert clients == {"fed-codealpaca": 9, "fed-dolly": 8, "fed-gsm8k": 3, "fed-codesearchnet": 6}
    flower = {
        name: CATALOG[name].split["clients"] for name in ("fingpt", "medalpaca", "code-alpaca-20k", "alpaca-gpt4")
    }
    assert flower == {"fingpt": 50, "medalpaca": 20, "code-alpaca-20k": 10, "alpaca-gpt4": 20}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{name: fed-doly}", "data.name fed-doly, but there is no such data set; did you mean 'fed-dolly'?"),
        ("{name: local}", "data.path: missing"),
        ("{name: fed-dolly, path: fed-gsm8k}", "data.path fed-gsm8k, but data.name is fed-dolly"),
        ("{name: fed-dolly, path: 'builtin:skills'}", "data.path builtin:skills, but data.name is fed-dolly"),
        ("{name: fed-dolly, test_path: t.jsonl, test_set_size: 0.1}", "data.test_path gives the test rows"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(data: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate_text(f"model: m\nlocal_steps: 1\ndata: {data}\n")
    assert said in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'fed-gsm8k'"):
        find_set("gsm8k")


def test_another_split_keeps_the_sets_number_of_clients_and_none_of_its_other_settings() -> None:
    recipe, _ = validate_text("model: m\nlocal_steps: 1\ndata: fed-dolly\nsplit: {kind: dirichlet, alpha: 0.5}\n")
    assert (recipe.split.clients, recipe.data.name) == (8, "fed-dolly")
    text = "model: m\nlocal_steps: 1\ndata: {name: tinyshakespeare}\nsplit: {kind: iid}\n"
    assert validate_text(text)[0].split.column is None
    few, _ = validate_text("model: m\nlocal_steps: 1\ndata: {name: fed-dolly}\nsplit: {clients: 4}\n")
    assert (few.split.kind, few.split.clients) == ("by_category", 4)
    gsm, _ = validate_text("model: m\nlocal_steps: 1\ndata: {name: fed-gsm8k}\n")
    assert (gsm.evaluate.score, gsm.evaluate.max_new_tokens) == ("final_number", 256)


# ---------------------------------------------------------------- where the files are


@pytest.mark.usefixtures("unchecked")
def test_a_name_alone_finds_train_and_test_at_their_place(home: Path) -> None:
    put(home / "gsm8k" / "train.jsonl", gsm8k(30))
    with pytest.raises(UserError, match="not its test rows") as caught:
        sources_of(Data(name="fed-gsm8k"), 0)
    assert f"test.jsonl to {home / 'gsm8k' / 'test.jsonl'}" in caught.value.hint
    assert "data.test_set_size=0.1" in caught.value.hint
    put(home / "gsm8k" / "test.jsonl", gsm8k(9, first=100))
    federation = prepare(Data(name="fed-gsm8k"), Split("iid", 3), PLAIN, 0)
    report = federation.report
    assert report.source == f"fed-gsm8k ({home / 'gsm8k' / 'train.jsonl'})" and report.rows_read == 39
    tests = [federation.rows[example.row] for example in federation.pooled("test")]
    assert len(tests) == 9
    assert {row["output"].rpartition("\n")[2] for row in tests} == {f"The answer is {2 * i}." for i in range(100, 109)}
    apart = prepare(Data(name="fed-gsm8k", test_set_size=0.2), Split("iid", 3), PLAIN, 0)
    assert apart.report.rows_read == 30 and len(apart.pooled("test")) == 6
    assert "test.jsonl is not read: data.test_set_size says what is tested on" in apart.report.notes
    given = put(home / "mine.jsonl", gsm8k(5, first=50))
    own = prepare(Data(name="fed-gsm8k", test_path=str(given)), Split("iid", 3), PLAIN, 0)
    assert len(own.pooled("test")) == 5


@pytest.mark.usefixtures("unchecked")
def test_dolly_comes_in_two_forms(home: Path) -> None:
    kinds = [f"kind_{i}" for i in range(8)]
    rows = [
        {
            "instruction": row["instruction"],
            "context": row["input"],
            "response": row["output"],
            "category": row["category"],
        }
        for row in alpaca_rows(96, kinds)
    ]
    for i in range(3):
        put(home / "dolly" / f"local_training_{i}.json", rows[i * 24 : i * 24 + 24])
    put(home / "dolly" / "global_test.json", rows[72:])
    cut = prepare(Data(name="fed-dolly"), Split("by_category", 8), PLAIN, 0)
    assert cut.report.rows_read == 96 and len(cut.pooled("test")) == 24
    assert all(
        {cut.rows[example.row]["category"] for example in own.test} == {name} for name, own in cut.clients.items()
    )
    natural = prepare(Data(name="fed-dolly"), Split("files", None), PLAIN, 0)
    assert sorted(natural.clients) == [f"local_training_{i}" for i in range(3)]
    put(home / "dolly" / "databricks-dolly-15k.jsonl", rows)  # the published file goes before the cut one
    whole = prepare(Data(name="fed-dolly", test_set_size=0.25), Split("by_category", 8), PLAIN, 0)
    assert whole.report.rows_read == 96 and whole.report.source.endswith("databricks-dolly-15k.jsonl)")
    assert whole.rows[0]["input"] == "like this 0"


def test_a_copy_elsewhere_may_be_a_file_or_a_folder_in_any_form(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    put(folder / "train.jsonl", gsm8k(20))
    put(folder / "test.jsonl", gsm8k(4, first=90))
    source, tests = sources_of(Data(str(folder), name="fed-gsm8k"), 0)
    assert len(source.rows) == 20 and tests is not None and len(tests.rows) == 4
    assert f"{folder / 'train.jsonl'} is not fed-gsm8k as published (another sha256)" in source.notes
    source, tests = sources_of(Data(str(folder / "train.jsonl"), name="fed-gsm8k"), 0)
    assert len(source.rows) == 20 and tests is None
    other = put(tmp_path / "other" / "some.jsonl", gsm8k(7))
    source, tests = sources_of(Data(str(other.parent), name="fed-gsm8k"), 0)
    assert source.rows[3]["instruction"] == "what is 3 and 3?" and tests is None and len(source.notes) == 1
    with pytest.raises(UserError, match="there is no nowhere") as caught:
        sources_of(Data("nowhere", name="fed-gsm8k"), 0)
    assert "train.jsonl" in caught.value.hint
    with pytest.raises(UserError, match="no data file"):
        sources_of(Data(str(home), name="fed-gsm8k"), 0)


def test_a_file_at_its_place_is_held_to_the_published_checksum(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = put(home / "gsm8k" / "train.jsonl", gsm8k(30))
    put(home / "gsm8k" / "test.jsonl", gsm8k(5))
    with pytest.raises(UserError, match="another sha256") as caught:
        sources_of(Data(name="fed-gsm8k"), 0)
    assert caught.value.code == "data.checksum" and f"data.path={train}" in caught.value.hint
    entry = CATALOG["fed-gsm8k"]
    digest = hashlib.sha256(train.read_bytes()).hexdigest()
    for size, passes in ((None, True), (train.stat().st_size, True), (train.stat().st_size + 1, False)):
        right = replace(entry, forms=(entry.forms[0]._replace(train=(
            entry.forms[0].train[0]._replace(sha256=digest, size=size, rows=31),), test=()),))  # fmt: skip
        monkeypatch.setattr(sources, "find_set", lambda name, right=right: right)
        if passes:
            source, _ = sources_of(Data(name="fed-gsm8k"), 0)
            assert "30 rows, where fed-gsm8k as published has 31" in source.notes
            assert not any(
                "as published has" in note for note in sources_of(Data(name="fed-gsm8k", limit=9), 0)[0].notes
            )
        else:
            with pytest.raises(UserError, match="another sha256"):
                sources_of(Data(name="fed-gsm8k"), 0)


def test_columns_and_types_of_ones_own_go_before_the_sets(home: Path, tmp_path: Path) -> None:
    rows = [{"ask": f"q {i}", "answer": "a", "kind": "xy"[i % 2]} for i in range(6)]
    path = str(put(tmp_path / "r.jsonl", rows))
    names = {"instruction": "ask", "category": "kind"}
    source, _ = sources_of(Data(path, name="fed-gsm8k", columns=names), 0)
    assert source.rows[1]["instruction"] == "q 1" and source.rows[1]["category"] == "y"
    pairs = [{"prompt": f"p {i}", "chosen": "c", "rejected": "r"} for i in range(4)]
    path = str(put(tmp_path / "p.jsonl", pairs))
    assert sources_of(Data(path, name="hh-harmless"), 0)[0].kind == "preference"
    taken, _ = sources_of(Data(path, name="hh-harmless", columns={"completion": "chosen"}), 0)
    assert taken.kind == "prompt_completion" and taken.rows[0]["completion"] == "c"


# ---------------------------------------------------------------- hubs


def test_a_hub_is_asked_for_the_pinned_revision(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLOOM_OFFLINE")
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **settings: Any) -> list[dict[str, str]]:
        asked.append((name, config, settings))
        return gsm8k(12 if settings["split"] == "train" else 3)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    source, tests = sources_of(Data(name="fed-gsm8k"), 0)
    revision = "e53f048856ff4f594e959d75785d2c2d37b678ee"
    assert [(name, config, one["split"], one["revision"]) for name, config, one in asked] == [
        ("openai/gsm8k", "main", "train", revision),
        ("openai/gsm8k", "main", "test", revision),
    ]
    assert source.name == "fed-gsm8k (openai/gsm8k@e53f0488)" and len(source.rows) == 12
    assert tests is not None and len(tests.rows) == 3
    assert sources_of(Data(name="fed-gsm8k", test_set_size=0.1), 0)[1] is None
    hub = CATALOG["fed-gsm8k"].hub
    assert hub is not None
    loose = replace(CATALOG["fed-gsm8k"], hub=hub._replace(revision=None))
    monkeypatch.setattr(sources, "find_set", lambda name: loose)
    assert "openai/gsm8k is not pinned: another day it may have other rows" in sources_of(Data(name="x"), 0)[0].notes


def test_several_configurations_of_a_hub_are_read_alike(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLOOM_OFFLINE")

    def load_dataset(name: str, config: str | None, **settings: Any) -> list[dict[str, str]]:
        numbers = range(20) if settings["split"] == "train" else range(50, 52)
        return [
            {"func_documentation_string": f"does {i}", "func_code_string": f"run {i}", "language": str(config)}
            for i in numbers
        ]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = Data(name="fed-codesearchnet", limit=30, val_set_size=0)  # five of each language, not one language
    federation = prepare(data, Split("by_category", 6), PLAIN, 0)
    assert {name: len(own.train) for name, own in federation.clients.items()} == dict.fromkeys(
        ["go", "java", "javascript", "php", "python", "ruby"], 5
    )
    assert federation.report.rows_read == 42 and len(federation.pooled("test")) == 12


def test_without_a_hub_the_error_says_what_to_fetch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLOOM_OFFLINE")

    def fails(*names: str, **settings: Any) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails))
    with pytest.raises(UserError, match="not to be had from a hub: no route to the hub") as caught:
        sources_of(Data(name="fed-dolly"), 0)
    place = home / "dolly" / "databricks-dolly-15k.jsonl"
    url = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
    assert f"fetch {url}/{place.name} to {place} (CC BY-SA 3.0)" in caught.value.hint and not place.parent.exists()
    with pytest.raises(UserError, match="no hub has it"):
        sources_of(Data(name="fed-codealpaca"), 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="datasets, which reads hubs, is not installed"):
        sources_of(Data(name="fed-dolly"), 0)


# ---------------------------------------------------------------- sets that need more than names of columns


@pytest.mark.usefixtures("unchecked")
def test_code_alpaca_by_the_language_its_input_names(home: Path) -> None:
    languages = ["C", "C#", "C++", "Go", "Java", "PHP", "Pascal", "Python", "Scala", "X86-64 Assembly"]
    rows = [
        {"instruction": f"Count to {i}.", "input": language, "output": f"code {i} in {language}"}
        for i in range(25)
        for language in languages
    ]
    put(home / "code" / "rosetta_alpaca.json", rows)
    recipe, _ = validate_text("model: m\nlocal_steps: 1\ndata: fed-codealpaca\n")
    federation = prepare(recipe.data, recipe.split, PLAIN, 0)
    assert sorted(federation.clients) == sorted(languages[:-1])
    assert federation.report.left_out == {"language without a client (Assembly 25)": 25}
    assert federation.rows[0]["input"] == "C"


def test_code_alpaca_without_a_language_says_how_many_are_undecided(home: Path) -> None:
    rows = [
        *({"instruction": f"Add {i} in Python.", "input": "", "output": "def f():\n    pass"} for i in range(24)),
        *({"instruction": f"Write a Java method, number {i}.", "input": "", "output": "int f() {}"} for i in range(24)),
        *({"instruction": f"Add {i}.", "input": "", "output": "x"} for i in range(3)),
        {"instruction": "Add in Ruby.", "input": "", "output": "puts 1"},
        {"instruction": "Add in JavaScript.", "input": "", "output": "let a = 1"},
        {"instruction": "Add in a Go program.", "input": "", "output": "package main"},
    ]
    path = str(put(home / "mine.json", rows))
    federation = prepare(Data(path, name="fed-codealpaca"), Split("by_category", None, min_rows=20), PLAIN, 0)
    assert sorted(federation.clients) == ["Java", "Python"]
    assert federation.report.left_out == {
        "language undecided": 3,
        "language without a client (JavaScript 1, Ruby 1)": 2,
        "of 1 categories with fewer than split.min_rows 20": 1,
    }


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.usefixtures("unchecked")
def test_code_search_net_in_both_forms(home: Path, form: int) -> None:
    languages = ["go", "java", "javascript", "php", "python", "ruby"]
    for language in languages:
        old = [
            {
                "docstring": f"does {i}",
                "code": f"'''does {i}''' run {i}",
                "language": language,
                "code_tokens": ["a"] * 50,
            }
            for i in range(12)
        ]
        new = [
            {"func_documentation_string": row["docstring"], "func_code_string": row["code"], "language": language}
            for row in old
        ]
        folder = home / "codesearchnet" / language
        if form == 0:
            for part, rows in (("train", old[:9]), ("test", old[9:])):
                put(folder / "final" / "jsonl" / part / f"{language}_{part}_0.jsonl.gz", rows)
        else:
            import pyarrow
            from pyarrow import parquet

            folder.mkdir(parents=True)
            for part, rows in (("train", new[:9]), ("test", new[9:])):
                parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{part}-00000-of-00001.parquet")
    federation = prepare(Data(name="fed-codesearchnet", val_set_size=0), Split("by_category", 6), PLAIN, 0)
    assert sorted(federation.clients) == languages
    assert {name: (len(own.train), len(own.test)) for name, own in federation.clients.items()} == dict.fromkeys(
        languages, (9, 3)
    )
    row = federation.rows[0]
    assert (row["instruction"], row["input"], row["category"]) == ("does 0", "go", "go")
    assert row["output"] == "'''''' run 0" and "code_tokens" not in row["columns"]


def test_speakers_of_a_play_are_clients(home: Path, tmp_path: Path) -> None:
    play = "".join(f"First Witch:\nround {i}\nand round\n\nMACBETH:\nso {i}\n\n" for i in range(12))
    play += "First witch:\nonce more\n\nPORTER:\nKnock!\n\nGHOST:\n\n"
    path = tmp_path / "play.txt"
    path.write_text("A stage.\n\n" + play, encoding="utf-8")
    recipe, _ = validate_text(
        f"model: m\nlocal_steps: 1\ndata: {{name: tinyshakespeare, path: {path}}}\nsplit: {{min_rows: 5}}\n"
    )
    assert (recipe.split.kind, recipe.split.column, recipe.split.min_rows) == ("by_column", "speaker", 5)
    federation = prepare(recipe.data, recipe.split, PLAIN, 0)
    assert sorted(federation.clients) == ["FIRST WITCH", "MACBETH"]
    assert federation.report.left_out == {
        "empty text": 1,
        "no speaker": 1,
        "of 1 values of column 'speaker' with fewer than split.min_rows 5": 1,
    }
    texts = {row["text"] for row in federation.rows if row.get("category") == "FIRST WITCH"}
    assert "round 3\nand round" in texts and "once more" in texts


def test_found_is_none_where_nothing_is(home: Path) -> None:
    assert all(find_files(entry, None) is None for entry in CATALOG.values())


def test_the_page_on_data_has_a_line_for_every_set() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("## Named sets")[1].split("## What a row is")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    for entry in CATALOG.values():
        [line] = [line for line in lines if f"`{entry.name}`" in line.split("|")[1]]
        assert entry.licence in line and (entry.rows is None or f"{entry.rows:,}" in line)
