"""ARC (Clark et al. 2018), easy and challenge: school science with three to five choices, from the published files or
in the form of LLM-Adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.data.places import locate
from fedloom.evaluate.tasks.base import Item, Task, TaskSettings
from fedloom.evaluate.tasks.choices import Question, choice_items, wrong_format
from fedloom.evaluate.tasks.metrics import choice_scores, summary_of

__all__ = ["ARC_CHALLENGE", "ARC_EASY"]

_SOURCE = (
    "github.com/AGI-Edgerunners/LLM-Adapters, dataset/{name}/test.json (or {name}-Test.jsonl of the ARC archive at "
    "allenai.org/data/arc, CC BY-SA 4.0)"
)


def published(where: str, one: Mapping[str, Any]) -> Question:
    """The archive's form (question.stem, question.choices) or the hub's (question, choices.text, choices.label)."""
    question, choices = one.get("question"), one.get("choices")
    if isinstance(question, Mapping):
        choices, question = question.get("choices"), question.get("stem")
    if (
        isinstance(choices, Mapping)
        and isinstance(choices.get("text"), list)
        and isinstance(choices.get("label"), list)
    ):
        pairs = list(zip(choices["label"], choices["text"], strict=False))
    elif isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        pairs = [(choice.get("label"), choice.get("text")) for choice in choices]
    else:
        pairs = []
    labels = [str(label) for label, _ in pairs]
    right = str(one.get("answerKey"))
    if not isinstance(question, str) or right not in labels or not all(isinstance(text, str) for _, text in pairs):
        raise wrong_format(where, one, ("question, choices and answerKey", "instruction and answer"))
    name, texts = str(one.get("id") or ""), tuple(str(text) for _, text in pairs)
    return Question(f"Question: {question}\nAnswer:", texts, labels.index(right), name)


def _arc(name: str, files: str, title: str) -> Task:
    places = (f"qa/{files}_test.json", f"arc/{files}-Test.jsonl")
    source = _SOURCE.format(name=files)

    def load(given: Path | None, settings: TaskSettings) -> list[Item]:
        path = locate(name, places, given, source=source, setting=f"--tasks {name}=FILE")
        return choice_items(name, path, published, settings)

    return Task(name, title, "accuracy", source, load, choice_scores, summary_of("accuracy", "accuracy_norm"), places)


ARC_EASY = _arc("arc_easy", "ARC-Easy", "ARC, the easy questions")
ARC_CHALLENGE = _arc("arc_challenge", "ARC-Challenge", "ARC, the questions that were hard for simple methods")
