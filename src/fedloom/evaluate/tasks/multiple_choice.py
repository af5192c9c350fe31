"""Any file of questions with choices: question, choices and answer under the names that such files have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.data.rows import objects
from fedloom.errors import UserError, suggest
from fedloom.evaluate.tasks.base import Item, Task, TaskSettings
from fedloom.evaluate.tasks.choices import Question, choice_items, is_instructed
from fedloom.evaluate.tasks.metrics import choice_scores, summary_of

__all__ = ["MULTIPLE_CHOICE"]

_QUESTION = ("question", "query", "prompt", "stem")
_CONTEXT = ("context", "passage")
_CHOICES = ("choices", "options", "endings")
_ANSWER = ("answer", "answerKey", "label", "gold", "correct")
_GROUP = ("category", "subject", "group")
_ID = ("id", "qid")
_COLUMN = re.compile(r"(?:choice|option|ending)[_ ]?([0-9a-h])|([A-H])", re.IGNORECASE)
_EXPECTED = 'a row is {"question": "...", "choices": ["...", "..."], "answer": 0}; choices may be columns A, B, ...'
READINGS = ("index", "letter", "text")


class _Asked(NamedTuple):
    prompt: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answer: Any
    id: str
    group: str


def load(source: Path | None, settings: TaskSettings) -> list[Item]:
    if source is None:
        raise UserError("multiple_choice needs a file", "--tasks multiple_choice=FILE", "data.missing")
    if not source.expanduser().exists():
        raise UserError(f"multiple_choice: there is no {source}", code="data.missing")
    rest = {name: value for name, value in settings.extra.items() if name != "answer"}
    found = list(objects(str(source)))
    reading = None if found and is_instructed(found[0][1]) else _reading(found, settings.extra.get("answer"))

    def question(where: str, one: Mapping[str, Any]) -> Question:
        asked = _asked(where, one)
        place = _place(asked, reading or "text")
        if place is None:
            raise UserError(f"{where}: the answer {asked.answer!r} names no choice, read as {reading}", _EXPECTED)
        return Question(asked.prompt, asked.choices, place, asked.id, asked.group)

    return choice_items("multiple_choice", source, question, replace(settings, extra=rest))


def _reading(found: Sequence[tuple[str, Mapping[str, Any]]], said: Any) -> str:
    """How the file's answers are to be read: as it is said, or in the one way in which all of them make sense.

    Raises:
        UserError: there is no such way, or there are two that differ.
    """
    if said is not None:
        if said not in READINGS:
            raise UserError(f"multiple_choice: answer={said!r}{suggest(str(said), READINGS)}", code="task.settings")
        return str(said)
    asked = [(where, _asked(where, one)) for where, one in found]
    ways = {way: [_place(one, way) for _, one in asked] for way in READINGS}
    sound = [way for way, places in ways.items() if None not in places]
    if not sound:
        first = next((n for n in range(len(asked)) if all(places[n] is None for places in ways.values())), 0)
        where, one = asked[first]
        raise UserError(
            f"{where}: the answer {one.answer!r} names none of {list(one.choices)}", _EXPECTED, "task.format"
        )
    if any(ways[way] != ways[sound[0]] for way in sound):
        raise UserError(
            f"multiple_choice: the answers can be read in {len(sound)} ways that differ: {', '.join(sound)}",
            f"--set answer={sound[0]}",
            "task.format",
        )
    return sound[0]


def _place(one: _Asked, way: str) -> int | None:
    """The place of the right choice, read in one way; None where that makes no sense."""
    text = str(one.answer).strip()
    if way == "index":
        return int(text) if text.isascii() and text.isdigit() and int(text) < len(one.choices) else None
    if way == "letter":
        return one.labels.index(text) if text in one.labels else None
    return one.choices.index(text) if text in one.choices else None


def _asked(where: str, one: Mapping[str, Any]) -> _Asked:
    question, answer = _first(one, _QUESTION), _first(one, _ANSWER)
    choices = _first(one, _CHOICES)
    labels: list[str] = []
    if isinstance(question, Mapping):  # ARC's archive
        choices, question = question.get("choices"), question.get("stem")
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), list):
        labels, choices = [str(label) for label in choices.get("label") or ()], choices["text"]
    elif isinstance(choices, list) and choices and all(isinstance(choice, Mapping) for choice in choices):
        labels, choices = [str(c.get("label")) for c in choices], [c.get("text") for c in choices]
    elif choices is None:
        columns = sorted((found[1] or found[2], name) for name in one if (found := _COLUMN.fullmatch(str(name))))
        choices = [one[name] for _, name in columns if one[name] is not None]
    problems = []
    if not isinstance(question, str) or not question.strip():
        problems.append("no question")
    if not isinstance(choices, list) or len(choices) < 2:
        problems.append("fewer than two choices")
    elif not all(isinstance(choice, str | int | float) and str(choice).strip() for choice in choices):
        problems.append("a choice that is no text")
    if answer is None or isinstance(answer, list | dict | bool):
        problems.append("no answer")
    if problems:
        raise UserError(f"{where}: {', '.join(problems)} (its fields: {', '.join(one)})", _EXPECTED, "task.format")
    texts = tuple(str(choice).strip() for choice in choices)
    names = tuple(labels) if len(labels) == len(texts) else tuple(chr(ord("A") + n) for n in range(len(texts)))
    context = _first(one, _CONTEXT)
    before = f"{str(context).strip()}\n" if context else ""
    group, name = _first(one, _GROUP), _first(one, _ID)
    return _Asked(
        f"{before}Question: {str(question).strip()}\nAnswer:",
        texts,
        names,
        answer,
        "" if name is None else str(name),
        "" if group is None else str(group),
    )


def _first(one: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((one[name] for name in names if one.get(name) is not None), None)


MULTIPLE_CHOICE = Task(
    "multiple_choice",
    "any file with question, choices and answer",
    "accuracy",
    "your own file",
    load,
    choice_scores,
    summary_of("accuracy", "accuracy_norm"),
)
