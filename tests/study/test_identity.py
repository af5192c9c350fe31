"""A run's content as a name: what changes it and what does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedloom.study import identity
from fedloom.study.identity import code_digest, content_id, path_digest
from fedloom.study.recipe import Recipe


def name(**values: Any) -> str:
    made = {"model": "m", "data": {"path": "d.jsonl"}, "local_steps": 3, **values}
    return content_id(Recipe.model_validate(made))


def test_settings_change_it_and_where_it_lies_does_not() -> None:
    assert name() == name() and len(name()) == 16
    for key, value in {"seed": 7, "rounds": 3, "arms": ["base"], "checkpoint": {"export": "best"}}.items():
        assert name(**{key: value}) != name(), key
    for key, value in {
        "name": "x",
        "output_dir": "elsewhere",
        "runtime": {"threads": 1},
        "checkpoint": {"save_rounds": 4},
        "report_to": ["wandb"],
    }.items():
        assert name(**{key: value}) == name(), key


def test_what_the_files_hold_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absent = name()
    Path("d.jsonl").write_text("{}\n")
    there = name()
    Path("d.jsonl").write_text("[]\n")
    other = name()
    assert len({absent, there, other}) == 3
    Path("m").mkdir()
    Path("m/config.json").write_text("{}")
    model = name()
    Path("m/.cache").write_text("x")
    assert name() == model != other
    Path("m/weights").write_text("x")
    assert name() != model


def test_published_files_at_their_usual_place_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    values: Any = {"data": {"name": "fed-gsm8k"}, "evaluate": {"tasks": ["boolq"]}}
    seen = [name(**values)]
    for file in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "qa/boolq_test.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}\n")
        seen.append(name(**values))
    # each file counts as soon as it is read
    assert len(set(seen)) == 4


def test_large_files_are_known_by_their_ends_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 10)
    monkeypatch.setattr(identity, "PART_BYTES", 4)
    file = tmp_path / "big"
    file.write_text("0123456789abcdef")
    os.utime(file, ns=(10**9, 10**9))
    first = path_digest(file)
    assert path_digest(file) == first
    file.write_text("0123456789abcdeX")
    os.utime(file, ns=(10**9, 10**9 + 1))
    assert path_digest(file) != first


def test_code_counts_and_what_only_shows_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "fedloom"
    for file in (
        "study/identity.py",
        "study/run.py",
        "cli/app.py",
        "rounds.py",
        "study/report.py",
        "models/m.safetensors",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("1")
    monkeypatch.setattr(identity, "__file__", str(root / "study" / "identity.py"))

    def digest() -> str:
        code_digest.cache_clear()
        return code_digest()

    first = digest()
    for file in ("cli/app.py", "study/report.py"):
        (root / file).write_text("2")
        assert digest() == first
    for file in ("rounds.py", "study/run.py", "models/m.safetensors"):
        before = digest()
        (root / file).write_text("2")
        assert digest() != before
    monkeypatch.undo()
    code_digest.cache_clear()
