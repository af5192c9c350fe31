"""Benchmarks on their published files: gold answers, constant answers, and a real small model."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.tasks.told import Knows, Told

from fedloom.data.rows import read
from fedloom.evaluate.tasks.base import TaskSettings
from fedloom.evaluate.tasks.run import answerer_of, find_task, rescore, run_task
from fedloom.models import load_base

Find = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _home(real_path: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(real_path("data")))


class Plain:
    """A model without an adapter."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextlib.contextmanager
    def bound(self, tree_C: Mapping[str, torch.Tensor]) -> Iterator[Any]:
        yield self.model


@pytest.fixture(scope="module")
def stories(real_path: Find) -> Any:
    base = load_base(str(real_path("models/stories260K")), dtype="float32")
    return base, lambda batch_size: answerer_of(Plain(base.model), {}, base.tokenizer, batch_size=batch_size)


def score(name: str, answerer: Any, **settings: Any) -> Any:
    return run_task(find_task(name), answerer, source=None, settings=TaskSettings(**settings), out=None)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_zeroshot"])
def test_gsm8k_gold_answers_score_one_and_the_next_questions_answers_hardly_any(real_path: Find, name: str) -> None:
    gold = [row["output"] for row in read(str(real_path("data/gsm8k/test.jsonl"))).rows]
    items = find_task(name).load(None, TaskSettings())
    assert len(items) == 1319
    assert score(name, Knows(items, lambda item: gold[int(item.id)])).score == 1.0
    off_by_one = Knows(items, lambda item: f"The answer is {float(item.reference) + 1}")
    assert score(name, off_by_one).score == 0.0
    shifted = Knows(items, lambda item: gold[(int(item.id) + 1) % 1319])
    same = sum(a.reference == b.reference for a, b in zip(items, [*items[1:], items[0]], strict=True)) / 1319
    assert score(name, shifted).score == same < 0.02  # neighbours that happen to have one number


def test_mmlu_by_one_that_always_says_a_is_the_share_of_a(real_path: Find) -> None:
    shares, right, questions = [], 0, 0
    for path in sorted(real_path("data/mmlu/test").glob("*.csv")):
        answers = [row[-1] for row in csv.reader(path.open(encoding="utf-8"))][1:]
        shares.append(answers.count("0") / len(answers))
        right, questions = right + answers.count("0"), questions + len(answers)
    found = score("mmlu", Told(choose=0))
    assert (found.items, len(shares)) == (14042, 57) and questions == 14042
    assert found.score == pytest.approx(sum(shares) / 57)
    assert found.summary["accuracy_micro"] == pytest.approx(right / questions)


@pytest.mark.parametrize(("name", "items"), [("boolq", 3270), ("arc_easy", 2376)])
def test_choices_of_whole_files(name: str, items: int) -> None:
    asked = find_task(name).load(None, TaskSettings())
    assert len(asked) == items
    assert score(name, Knows(asked, lambda item: item.reference)).score == 1.0
    wrong = Knows(asked, lambda item: (item.reference + 1) % len(item.request.choices))
    assert score(name, wrong).score == 0.0


def by_hand(base: Any, prompt: Sequence[int], whole: Sequence[int]) -> float:
    with torch.no_grad():
        z_TV = base.model(input_ids=torch.tensor([list(whole)])).logits[0].log_softmax(-1)
    return sum(float(z_TV[p, whole[p + 1]]) for p in range(len(prompt) - 1, len(whole) - 1))


def test_a_real_model_in_batches_gives_what_plain_passes_give(stories: Any, tmp_path: Path) -> None:
    base, answerer = stories
    out = tmp_path / "mmlu.jsonl"
    settings = TaskSettings(limit=1, extra={"subjects": "STEM"})
    result = run_task(find_task("mmlu"), answerer(16), source=None, settings=settings, out=out)
    assert result.items == 18 and result.notes["fewer_shots"] == 18  # 512 positions hold no five questions
    lines = [json.loads(line) for line in out.read_text().splitlines()][1:]
    checked = 0
    for line in lines[:12]:
        for choice, nats in zip(line["choices"], line["loglikelihoods"], strict=line.get("unanswered") is None):
            text = line["prompt"].removeprefix("<s> ")  # the prompt as it was seen, start token and all
            prompt, whole = (base.tokenizer(one)["input_ids"] for one in (text, text + choice))
            assert nats == pytest.approx(by_hand(base, prompt, whole), abs=1e-4)
            checked += 1
    assert checked >= 40
    again = run_task(find_task("mmlu"), answerer(5), source=None, settings=settings, out=None)
    assert again.summary == result.summary == rescore(out).summary


def test_a_real_model_writes_the_same_in_any_batch(stories: Any, tmp_path: Path) -> None:
    _, answerer = stories
    texts = []
    for batch_size in (1, 6):
        out = tmp_path / f"{batch_size}.jsonl"
        settings = TaskSettings(limit=6, max_new_tokens=24)
        run_task(find_task("gsm8k"), answerer(batch_size), source=None, settings=settings, out=out)
        texts.append([json.loads(line)["answers"] for line in out.read_text().splitlines()[1:]])
    assert texts[0] == texts[1] and all(text for [text] in texts[0])
