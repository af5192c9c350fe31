"""`ls data`, and recipes from the name of a set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.cli import main
from fedloom.data.catalog import CATALOG
from fedloom.study.load import read_recipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "home"))
    monkeypatch.setenv("FEDLOOM_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def play(place: Path) -> Path:
    place.parent.mkdir(parents=True)
    place.write_text("".join(f"ALICE:\nword {i}\n\nBOB:\nother {i}\n\n" for i in range(30)), encoding="utf-8")
    return place


def test_ls_data_says_which_sets_are_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(home / "text" / "tinyshakespeare.txt")
    assert main(["ls", "data"]) == 0
    text, said = capsys.readouterr()
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert set(CATALOG) < set(lines) and "FEDLOOM_DATA" in said and str(home) in said
    assert "  here  " in lines["tinyshakespeare"] and "not here  15,011  " in lines["fed-dolly"].replace("     ", "  ")
    assert "CC BY-SA 3.0" in lines["fed-dolly"] and "builtin:skills" in lines
    assert main(["ls", "data", "--format", "json"]) == 0
    known = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert known["tinyshakespeare"]["here"] is True and known["fed-gsm8k"]["here"] is False
    assert (known["fed-gsm8k"]["rows"], known["fed-gsm8k"]["clients"], known["fed-gsm8k"]["licence"]) == (
        7473,
        3,
        "MIT",
    )
    assert main(["ls"]) == 0 and "fed-dolly" in capsys.readouterr().out


def test_one_set_with_all_that_is_known(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = play(home / "text" / "tinyshakespeare.txt")
    assert main(["ls", "data", "tinyshakespeare"]) == 0
    text, _ = capsys.readouterr()
    assert f"here, with another sha256  {place}" in text and "kind: by_column, column: speaker, min_rows: 20" in text
    assert main(["ls", "data", "fed-dolly"]) == 0
    text, said = capsys.readouterr()
    revision = "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
    assert f"at {revision}" in text and f"resolve/{revision}/databricks-dolly-15k.jsonl" in said
    assert main(["ls", "data", "fed-gsm8k", "--format", "json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["columns"] == {"instruction": "question", "output": "answer"} and known["hub"]["configs"] == ["main"]
    assert [(file["use"], file["state"], file["rows"]) for file in known["files"]] == [
        ("train", "not here", 7473),
        ("test", "not here", 1319),
    ]
    assert main(["ls", "data", "fed-dollar"]) == 2 and "did you mean 'fed-dolly'" in capsys.readouterr().err
    assert main(["ls", "methods", "fedavg"]) == 2 and "fedloom ls data NAME" in capsys.readouterr().err


def test_init_from_a_name_writes_the_sets_own_split(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = play(home.parent / "mine" / "play.txt")
    assert main(["init", "tinyshakespeare", "--model", "builtin", f"data.path={copy}", "-o", "r.yaml"]) == 0
    recipe = read_recipe("r.yaml").recipe
    assert (recipe.data.name, recipe.data.path) == ("tinyshakespeare", str(copy))
    assert (recipe.split.kind, recipe.split.column, recipe.split.min_rows) == ("by_column", "speaker", 20)
    assert "public domain" in capsys.readouterr().err
    assert main(["preview", "r.yaml", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [client["id"] for client in report["clients"]] == ["ALICE", "BOB"]
    assert main(["init", "fed-dolly", "--model", "builtin"]) == 2
    assert "fetch https://huggingface.co/datasets/databricks" in capsys.readouterr().err
    assert not Path("fed-dolly.yaml").exists()
