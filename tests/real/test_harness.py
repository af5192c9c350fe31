"""Real questions and a real model: the harness and our own scorer agree on the same items."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.adapters.lora import lora
from fedloom.evaluate.tasks.base import TaskSettings, Write
from fedloom.evaluate.tasks.run import answerer_of, find_task, run_task
from fedloom.models import load_base

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")

RealPath = Callable[[str], Path]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
"""
CHOICES = """
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def arc(row: dict[str, Any]) -> dict[str, Any]:
    question, answers = re.split(
        r"\s*Answer1:\s*", row["instruction"].partition("question:")[2].partition("Answer format")[0]
    )
    choices = re.split(r"\s*Answer\d:\s*", answers.strip())
    return {"question": question.strip(), "choices": choices, "answer": int(row["answer"].removeprefix("answer")) - 1}


def boolq(row: dict[str, Any]) -> dict[str, Any]:
    question = row["instruction"].partition("question:")[2].partition("Answer format")[0].strip()
    return {"question": question, "choices": ["false", "true"], "answer": ["false", "true"].index(row["answer"])}


def stories(real_path: RealPath) -> Any:
    base = load_base(str(real_path("models/stories260K")), dtype="float32")
    adapter = lora(base.model, rank=4)
    return answerer_of(adapter, adapter.init(0), base.tokenizer, batch_size=16)


@pytest.mark.parametrize(("name", "read"), [("ARC-Easy", arc), ("boolq", boolq)])
def test_choices_of_real_questions(real_path: RealPath, tmp_path: Path, name: str, read: Any) -> None:
    rows = [read(row) for row in json.loads(real_path(f"data/qa/{name}_test.json").read_text())[:80]]
    assert all(len(row["choices"]) >= 2 and row["question"] for row in rows)
    data = tmp_path / "real.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "Question: {{question}}\\nAnswer:"
    task = TASK.format(name="real", kind="multiple_choice", text=text, target="answer")
    (tmp_path / "real.yaml").write_text(task + CHOICES)
    answerer = stories(real_path)
    found = []
    for name, source in ((f"lm_eval:{tmp_path / 'real.yaml'}", None), ("multiple_choice", data)):
        out = tmp_path / f"{len(found)}.jsonl"
        result = run_task(find_task(name), answerer, source=source, settings=TaskSettings(), out=out)
        found.append((result, [json.loads(line) for line in out.read_text().splitlines()[1:]]))
    (theirs, their_lines), (ours, our_lines) = found
    for mine, other in zip(our_lines, their_lines, strict=True):
        assert mine["loglikelihoods"] == pytest.approx([nats for nats, _ in other["answers"]], abs=1e-4)
    assert ours.summary["accuracy"] == theirs.summary["acc"]
    assert ours.summary["accuracy_norm"] == theirs.summary["acc_norm"]
    assert ours.items == theirs.items == 80


def test_real_stories_are_written_the_same(real_path: RealPath, tmp_path: Path) -> None:
    starts = ["Once upon a time", "Lily and Tom went to the park. They", "The dog", "One day, a little girl"]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in starts))
    task = TASK.format(name="told", kind="generate_until", text="{{text}}", target="x")
    more = 'generation_kwargs: {until: [".", "!"], max_gen_toks: 60}\nmetric_list: [{metric: exact_match}]\n'
    (tmp_path / "told.yaml").write_text(task + more)
    answerer = stories(real_path)
    out = tmp_path / "items.jsonl"
    run_task(find_task(f"lm_eval:{tmp_path / 'told.yaml'}"), answerer, source=None, settings=TaskSettings(), out=out)
    texts = [json.loads(line)["answers"][0] for line in out.read_text().splitlines()[1:]]
    assert [text.strip() for (text,) in answerer.write([Write(one, 60, (".", "!")) for one in starts])] == texts
    assert "there was a" in texts[0]
