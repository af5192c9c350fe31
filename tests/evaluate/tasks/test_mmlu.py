"""MMLU: what is asked, means over subjects and categories, and files that are something else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tasks.told import Knows, Told

from fedloom.adapters.lora import lora
from fedloom.errors import UserError
from fedloom.evaluate.tasks.base import Choose, TaskSettings
from fedloom.evaluate.tasks.mmlu import CATEGORIES, SUBJECTS
from fedloom.evaluate.tasks.run import answerer_of, find_task, run_task
from fedloom.models import random_base

MMLU = find_task("mmlu")
ANSWERS = {"anatomy": "AABC", "astronomy": "DA", "sociology": "BBBBBA"}


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def rows_of(subject: str, answers: str) -> list[list[str]]:
    return [
        [f"About {subject}, {n}: which, if any?", *(f"{subject} {letter}{n}" for letter in "wxyz"), answer]
        for n, answer in enumerate(answers)
    ]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for subject, answers in ANSWERS.items():
        write_csv(tmp_path / "test" / f"{subject}_test.csv", rows_of(subject, answers))
        write_csv(tmp_path / "dev" / f"{subject}_dev.csv", rows_of(f"solved {subject}", "CABDAB"))
    return tmp_path


def test_every_subject_is_in_one_category() -> None:
    assert len(SUBJECTS) == len(set(SUBJECTS)) == 57
    assert {name: len(subjects) for name, subjects in CATEGORIES.items()} == {
        "STEM": 18,
        "humanities": 13,
        "social_sciences": 12,
        "other": 14,
    }


def test_what_is_asked(home: Path) -> None:
    first = MMLU.load(home, TaskSettings())[0]
    assert (first.id, first.group, first.reference) == ("anatomy/0", "anatomy", 0)
    assert first.request == Choose(
        "About anatomy, 0: which, if any?\nA. anatomy w0\nB. anatomy x0\nC. anatomy y0\nD. anatomy z0\nAnswer:",
        (" A", " B", " C", " D"),
        first.request.shots,
        "The following are multiple choice questions (with answers) about anatomy.\n\n",
    )
    assert len(first.request.shots) == 5
    assert first.request.shots[0] == (
        "About solved anatomy, 0: which, if any?\nA. solved anatomy w0\nB. solved anatomy x0\n"
        "C. solved anatomy y0\nD. solved anatomy z0\nAnswer: C\n\n"
    )


def test_one_that_always_says_a_scores_the_share_of_a(home: Path, tmp_path: Path) -> None:
    result = run_task(MMLU, Told(choose=0), source=home, settings=TaskSettings(), out=tmp_path / "mmlu.jsonl")
    shares = {subject: answers.count("A") / len(answers) for subject, answers in ANSWERS.items()}
    assert result.summary["accuracy"] == pytest.approx(sum(shares.values()) / 3)
    assert result.summary["accuracy_micro"] == pytest.approx(4 / 12)
    assert result.summary["accuracy/other"] == result.summary["accuracy/other/anatomy"] == 0.5
    assert result.summary["accuracy/STEM"] == 0.5 and "accuracy/humanities" not in result.summary
    assert result.summary["accuracy/social_sciences"] == pytest.approx(1 / 6)
    spread = [(0.25 / 3) ** 0.5 * (4 / 4) ** 0.5, 0.5, ((5 / 36) / 5) ** 0.5]
    wanted = sum(error**2 for error in spread) ** 0.5 / 3
    assert result.summary["accuracy_stderr"] == pytest.approx(wanted)


def test_one_that_knows_scores_one(home: Path) -> None:
    items = MMLU.load(home, TaskSettings())
    for shift, score in ((0, 1.0), (1, 0.0)):
        knows = Knows(items, lambda item, shift=shift: (item.reference + shift) % 4)
        assert run_task(MMLU, knows, source=home, settings=TaskSettings(), out=None).score == score


def test_a_header_with_answers_as_numbers_is_the_same_file(home: Path) -> None:
    before = MMLU.load(home, TaskSettings())
    for place in home.rglob("*.csv"):
        rows = [[*row[:5], "ABCD".index(row[5])] for row in csv.reader(place.open())]
        write_csv(place, [["question", "choice0", "choice1", "choice2", "choice3", "answer"], *rows])
    assert MMLU.load(home, TaskSettings()) == before


def test_the_archives_outer_folder_will_do(home: Path, tmp_path: Path) -> None:
    outer = tmp_path.with_name(tmp_path.name + "_outer")
    outer.mkdir()
    (outer / "data").symlink_to(home)
    assert MMLU.load(outer, TaskSettings()) == MMLU.load(home, TaskSettings())


def test_a_limit_is_per_subject_and_subjects_can_be_chosen(home: Path) -> None:
    result = run_task(MMLU, Told(), source=home, settings=TaskSettings(limit=2), out=None)
    assert result.items == 6
    chosen = MMLU.load(home, TaskSettings(num_fewshot=0, extra={"subjects": "anatomy, STEM"}))
    assert {item.group for item in chosen} == {"anatomy", "astronomy"} and not chosen[0].request.shots
    with pytest.raises(UserError, match="no subject 'astrology'; did you mean 'astronomy'"):
        MMLU.load(home, TaskSettings(extra={"subjects": "astrology"}))


def test_a_random_model_runs_with_the_shots_that_fit(home: Path) -> None:
    base = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, max_positions=400)
    adapter = lora(base.model, rank=2)
    answerer = answerer_of(adapter, adapter.init(0), base.tokenizer, batch_size=4)
    result = run_task(MMLU, answerer, source=home, settings=TaskSettings(), out=None)
    assert result.notes == {"fewer_shots": 12} and not result.skipped and 0 <= result.score <= 1
    tiny = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, max_positions=100)
    adapter = lora(tiny.model, rank=2)
    answerer = answerer_of(adapter, adapter.init(0), tiny.tokenizer, batch_size=4)
    result = run_task(MMLU, answerer, source=home, settings=TaskSettings(), out=None)
    assert result.skipped == {"too_long": 12} and result.score == 0


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([["q", "a", "b", "c", "A"]], "line 1: 5 values"),
        ([["q", "a", "b", "c", "d", "E"]], "line 1: the answer 'E'"),
        ([["q", "a", "b", "c", "d", "A"], ["q", "a", "b", "c", "d", "2"]], "line 2: the answer '2'"),
        ([["question", "A", "B", "C", "D", "answer"], ["q", "a", "b", "c", "d", "4"]], "expected .* 0 to 3"),
        ([], "no question in it"),
    ],
)
def test_other_files_are_refused(home: Path, rows: list[list[str]], match: str) -> None:
    write_csv(home / "test" / "anatomy_test.csv", rows)
    with pytest.raises(UserError, match=match):
        MMLU.load(home, TaskSettings())


def test_what_is_missing_is_said(home: Path) -> None:
    (home / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(UserError, match=r"no .*anatomy_dev\.csv"):
        MMLU.load(home, TaskSettings())
    assert MMLU.load(home, TaskSettings(num_fewshot=0))
    with pytest.raises(UserError, match="has 6 solved questions, fewer than 7"):
        MMLU.load(home, TaskSettings(num_fewshot=7, extra={"subjects": "sociology"}))
    (home / "test" / "anatomy_test.csv").rename(home / "test" / "anatomie_test.csv")
    with pytest.raises(UserError, match=r"anatomie_test\.csv, which is no subject; did you mean 'anatomy'"):
        MMLU.load(home, TaskSettings())
    with pytest.raises(UserError, match="no folder test"):
        MMLU.load(home / "dev", TaskSettings())
