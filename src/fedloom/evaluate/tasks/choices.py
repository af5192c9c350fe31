"""Questions with choices, from files of several shapes, as requests for log-likelihoods.

Two ways of asking: plainly ("Question: ...", "Answer:", and the text of a choice), or as an instruction in the layout
of training, whose answer names the choice ("the correct answer is answer2", the form of LLM-Adapters).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.data.rows import objects
from fedloom.errors import UserError
from fedloom.evaluate.tasks.base import Choose, Item, TaskSettings, check_settings

__all__ = ["Question", "choice_items", "instructed", "is_instructed", "wrong_format"]

_FORMAT = re.compile(r"Answer format:\s*(\S[^\n]*?)\s*\Z")


class Question(NamedTuple):
    """A question to be asked plainly."""

    prompt: str  # up to where the answer begins, without a space at the end
    choices: tuple[str, ...]
    answer: int
    id: str = ""  # the file's own; "" takes its place in the file
    group: str = ""


Reader = Callable[[str, Mapping[str, Any]], Question]  # where it stands, the object


def choice_items(task: str, path: Path, read: Reader, settings: TaskSettings) -> list[Item]:
    """The items of a file; its first object says whether these are instructions or what `read` reads.

    Raises:
        UserError: the file is neither, or a setting is of no use.
    """
    found = list(objects(str(path)))
    if found and is_instructed(found[0][1]):
        check_settings(f"{task} (in the layout of training)", settings)
        return [instructed(task, place, where, one) for place, (where, one) in enumerate(found)]
    check_settings(task, settings, "num_fewshot", extra=("exemplars",))
    shots = _shots(task, read, settings)
    items = []
    for place, (where, one) in enumerate(found):
        question = read(where, one)
        choices = tuple(f" {choice}" for choice in question.choices)
        name = question.id or str(place)
        items.append(Item(name, Choose(question.prompt, choices, shots), question.answer, question.group))
    return items


def _shots(task: str, read: Reader, settings: TaskSettings) -> tuple[str, ...]:
    """The first rows of the file that the setting `exemplars` names, solved."""
    given = settings.extra.get("exemplars")
    number = settings.num_fewshot
    if number is None or number == 0:
        if given and number is None:
            raise UserError(f"{task}: exemplars, but how many?", "--num-fewshot N", "task.exemplars")
        return ()
    if not given:
        raise UserError(f"{task}: solved examples from which file?", "--set exemplars=FILE", "task.exemplars")
    solved = [read(where, one) for where, one in objects(str(given))][:number]
    if len(solved) < number:
        raise UserError(f"{task}: {given} has {len(solved)} rows, fewer than {number}", code="task.exemplars")
    return tuple(f"{one.prompt} {one.choices[one.answer]}\n\n" for one in solved)


def is_instructed(one: Mapping[str, Any]) -> bool:
    return "instruction" in one and "answer" in one


def instructed(task: str, place: int, where: str, one: Mapping[str, Any]) -> Item:
    """An instruction that ends in "Answer format: a/b/c", the answer one of these.

    A choice is the row's output with the other answer in its place, so that it reads as the training rows do.
    """
    instruction, answer = str(one.get("instruction") or ""), str(one.get("answer") or "").strip()
    listed = _FORMAT.search(instruction)
    options = [option.strip() for option in listed[1].split("/")] if listed else []
    if answer not in options or len(options) < 2 or len(set(options)) < len(options):
        raise UserError(
            f"{where}: " + (f"the answer {answer!r} is not one of {listed[1]}" if listed else "no answer format"),
            f'an instruction of {task} ends in "Answer format: a/b", and its answer is a or b',
            "task.format",
        )
    output = str(one.get("output") or "").strip()
    before = output.removesuffix(answer) if output.endswith(answer) else ""
    row = {"kind": "alpaca", "instruction": instruction, "input": str(one.get("input") or ""), "output": ""}
    return Item(str(place), Choose(row, tuple(before + option for option in options)), options.index(answer))


def wrong_format(where: str, one: Mapping[str, Any], expected: Sequence[str]) -> UserError:
    """The object is none of the shapes that are read."""
    return UserError(
        f"{where}: the fields are {', '.join(map(str, one)) or 'none'}; expected " + ", or ".join(expected),
        "fedloom ls tasks says where the published file comes from; --tasks multiple_choice=FILE reads other shapes",
        "task.format",
    )
