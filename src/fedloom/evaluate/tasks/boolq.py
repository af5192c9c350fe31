"""BoolQ (Clark et al. 2019): yes or no, from the published file (with passages) or in the form of LLM-Adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.data.places import locate
from fedloom.evaluate.tasks.base import Item, Task, TaskSettings
from fedloom.evaluate.tasks.choices import Question, choice_items, wrong_format
from fedloom.evaluate.tasks.metrics import choice_scores, summary_of

__all__ = ["BOOLQ"]

PLACES = ("qa/boolq_test.json", "boolq/dev.jsonl", "boolq/val.jsonl")
SOURCE = (
    "github.com/AGI-Edgerunners/LLM-Adapters, dataset/boolq/test.json (or dev.jsonl of "
    "github.com/google-research-datasets/boolean-questions, CC BY-SA 3.0)"
)


def load(source: Path | None, settings: TaskSettings) -> list[Item]:
    path = locate("boolq", PLACES, source, source=SOURCE, setting="--tasks boolq=FILE")
    return choice_items("boolq", path, published, settings)


def published(where: str, one: Mapping[str, Any]) -> Question:
    """question, passage and answer (true, false), or SuperGLUE's label (0, 1)."""
    answer = one.get("answer", one.get("label"))
    if not (isinstance(one.get("question"), str) and isinstance(one.get("passage"), str)) or answer not in (0, 1):
        raise wrong_format(where, one, ("question, passage and answer", "instruction and answer"))
    question = one["question"].strip().removesuffix("?")
    return Question(f"{one['passage']}\nQuestion: {question}?\nAnswer:", ("no", "yes"), int(answer))


BOOLQ = Task(
    "boolq",
    "BoolQ: yes or no",
    "accuracy",
    SOURCE,
    load,
    choice_scores,
    summary_of("accuracy", "accuracy_norm"),
    PLACES,
)
