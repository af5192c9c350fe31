"""`preview` of data without a recipe, its tables and its picture; and `cache`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedloom.cli import main
from fedloom.data import rows, tokens
from fedloom.data.holdings import ClientTable

COLOURS = ("red", "green", "blue")


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, and a cache of its own."""
    lines = [
        {"instruction": f"Say {i}", "output": "so " * (i % 9 + 1), "category": COLOURS[i % 3], "user": f"u{i % 5}"}
        for i in range(90)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def fedloom(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*words: str) -> Said:
        capsys.readouterr()
        code = main(words)
        return Said(code, *capsys.readouterr())

    return run


def test_a_file_is_previewed_as_init_would_split_it(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, err = fedloom("preview", "rows.jsonl")
    assert code == 0 and "90 rows; 3 clients (by_category)" in out and "<trained>" in out
    assert "next: fedloom init rows.jsonl --model builtin" in err
    assert "picture: partition_rows.svg" in out
    texts = [element.text for element in ET.parse(place / "partition_rows.svg").iter() if element.text]
    assert any("rows.jsonl: 90 rows, 3 clients, by category" in text for text in texts)
    assert {"red", "green", "blue"} <= set(texts)


def test_of_very_many_clients_few_are_opened_and_the_others_counted(
    fedloom: Callable[..., Said], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"instruction": f"Say {i}", "output": "so", "user": f"u{i % 1100:04d}"} for i in range(2200)]
    (place / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = []
    real = ClientTable.at
    monkeypatch.setattr(ClientTable, "at", lambda table, number: opened.append(number) or real(table, number))
    words = (
        "split.kind=by_column",
        "split.column=user",
        "split.clients=1100",
        "data.val_set_size=50",
        "data.test_set_size=50",
    )
    code, out, err = fedloom("preview", "many.jsonl", *words)
    assert code == 0, err
    assert "1,100 clients (by_column)" in out and "and 1,060 more clients" in out and "<trained>" in out
    assert len(opened) <= 1_002, "the thousand that are listed, and who has the example"


def test_words_change_the_split_and_the_tables_say_who_holds_what(fedloom: Callable[..., Said]) -> None:
    words = ("split.kind=dirichlet", "split.alpha=0.5", "split.clients=4", "max_length=17", "--examples", "0")
    code, out, _ = fedloom("preview", "rows.jsonl", *words, "--no-picture")
    assert code == 0 and "4 clients (dirichlet)" in out and not list(Path().glob("*.svg"))
    shown = json.loads(fedloom("preview", "rows.jsonl", *words, "--format", "json").out)
    assert not list(Path().glob("*.svg")), "data alone writes no picture unasked"
    for client in shown["clients"]:
        line = next(line for line in out.splitlines() if line.split()[:1] == [client["id"]] and "█" not in line)
        held = [client["categories"].get(name, 0) for name in ("blue", "green", "red")]
        assert line.split()[1:] == [str(count) if count else "·" for count in held]
    distance = shown["heterogeneity"]["category"]
    assert f"{distance['js_mean']:.3f}" in out and f"{distance['tv_max']:.3f}" in out
    assert f"{shown['cut']:,} rows cut" in out and "exact duplicates: 0 rows" in out
    assert out.count("lose the end of their answer") == 1


def test_notes_are_said_once(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom("preview", "rows.jsonl", "max_length=17", "--no-picture")
    assert code == 0 and "lose the end of their answer" in out and "lose the end of their answer" not in err


def test_named_sets_and_built_in_tasks_have_their_own_split(
    fedloom: Callable[..., Said], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = fedloom("preview", "builtin:skills", "--examples", "0", "--no-picture")
    assert code == 0 and "8 clients (natural)" in out and "fedloom init builtin:skills" in err
    (place / "home" / "dolly").mkdir(parents=True)
    monkeypatch.setenv("FEDLOOM_DATA", str(place / "home"))
    code, _, err = fedloom("preview", "fed-dolly")
    assert code == 2 and str(place / "home" / "dolly") in err
    rows = [{"instruction": f"q{i}", "context": "", "response": "a", "category": "ab"[i % 2]} for i in range(60)]
    (place / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = fedloom("preview", "fed-dolly", "data.path=copy.jsonl", "--no-picture", "split.clients=2")
    assert code == 0 and "2 clients (by_category)" in out


def test_a_recipe_is_still_a_recipe(fedloom: Callable[..., Said], place: Path) -> None:
    (place / "my.yaml").write_text("model: builtin\ndata: {path: rows.jsonl}\nsplit: {clients: 2}\nlocal_steps: 1\n")
    code, out, err = fedloom("preview", "my.yaml", "--picture", "mine.png")
    assert code == 0 and "2 clients (iid)" in out and "fedloom plan my.yaml" in err
    assert (place / "mine.png").read_bytes().startswith(b"\x89PNG") and not (place / "partition_my.svg").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["fed-doly"], ["no such recipe, data set, file or folder", "did you mean 'fed-dolly'"]),
        (["rows.json"], ["no such recipe, data set, file or folder"]),
        (["nowhere/rows.jsonl"], ["the folder nowhere does not exist"]),
        (["rows.jsonl", "other.jsonl"], ["takes one recipe"]),
        ([], ["preview needs a recipe"]),
        (["rows.jsonl", "--picture", "p.gif"], ["p.gif ends with .gif", "p.svg"]),
        (["rows.jsonl", "--picture", "no/where.svg"], ["there is no folder no"]),
        (["rows.jsonl", "split.knid=iid"], ["did you mean"]),
    ],
)
def test_what_is_wrong_is_said(fedloom: Callable[..., Said], words: list[str], parts: list[str]) -> None:
    code, out, err = fedloom("preview", *words)
    assert code == 2 and out == "" and all(part in err for part in parts), err


def test_a_folder_that_cannot_be_written_costs_only_the_picture(
    fedloom: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(report: object, path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fedloom.study.partition.partition_file", refuse)
    code, out, err = fedloom("preview", "rows.jsonl")
    assert code == 0 and "<trained>" in out and "note: no picture" in err
    code, _, err = fedloom("preview", "rows.jsonl", "--picture", "asked.svg")
    assert code == 2 and "Permission denied" in err


def test_the_second_preview_makes_nothing_anew(fedloom: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("preview", "rows.jsonl", "--examples", "0")
    first = fedloom(*words).out

    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("made anew")

    monkeypatch.setattr(rows, "_gather", never)
    monkeypatch.setattr(tokens, "_tokenise", never)
    assert fedloom(*words).out == first
    assert fedloom(*words, "data.cache=false").code == 1


def test_cache_shows_and_clears_what_is_kept(fedloom: Callable[..., Said], place: Path) -> None:
    assert fedloom("cache").out.startswith(f"{place / 'cache'}: 0 kept")
    fedloom("preview", "rows.jsonl", "--no-picture")
    code, out, err = fedloom("cache")
    assert code == 0 and "fedloom cache --clear" in err
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["tokens", "rows"] and "rows.jsonl" in out
    told = json.loads(fedloom("cache", "--format", "json").out)
    size = sum(file.stat().st_size for file in (place / "cache").rglob("*") if file.is_file())
    assert told["bytes"] == size and told["limit"] == 20_000_000_000 and len(told["entries"]) == 2
    code, out, _ = fedloom("cache", "--clear")
    assert code == 0 and "2 removed" in out and fedloom("cache").out.startswith(f"{place / 'cache'}: 0 kept")


@pytest.mark.slow
def test_two_previews_at_once_agree(place: Path) -> None:
    """Two real processes with an empty cache: one makes what the other finds."""
    command = [sys.executable, "-m", "fedloom", "preview", "rows.jsonl", "--format", "json"]
    environment = {**os.environ, "FEDLOOM_CACHE": str(place / "cache")}
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    told = [racer.communicate(timeout=300) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0] and told[0][0] == told[1][0] and json.loads(told[0][0])
    names = [one.name for one in (place / "cache").iterdir() if not one.name.startswith(".")]
    assert sorted(name.partition("-")[0] for name in names) == ["rows", "tokens"]
    assert not list((place / "cache").glob(".*.tmp"))
