"""GSM8K (Cobbe et al. 2021): school word problems with a number for an answer.

`gsm8k` stands after eight solved examples, `gsm8k_zeroshot` in the prompt of training. The examples are the first rows
of the train file beside the test file (or of `exemplars`), in the file's order, without the calculator's marks <<...>>.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from fedloom.data.places import locate
from fedloom.data.rows import Row, read
from fedloom.errors import UserError
from fedloom.evaluate.scores import final_number
from fedloom.evaluate.tasks.base import Answer, Item, ItemScore, Task, TaskSettings, Write, check_settings
from fedloom.evaluate.tasks.metrics import summary_of

__all__ = ["GSM8K", "ZEROSHOT"]

SHOTS = 8
NEW_TOKENS = 256
PLACES = ("gsm8k/test.jsonl",)
SOURCE = "github.com/openai/grade-school-math (MIT)"
_MARK = re.compile(r"the answer is|####", re.IGNORECASE)
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def load(source: Path | None, settings: TaskSettings) -> list[Item]:
    check_settings("gsm8k", settings, "num_fewshot", "max_new_tokens", extra=("exemplars",))
    path = _file(source, "gsm8k")
    shots = exemplars(path, SHOTS if settings.num_fewshot is None else settings.num_fewshot, settings)
    return [
        Item(
            str(number),
            Write(
                f"Question: {row['instruction']}\nAnswer:",
                settings.max_new_tokens or NEW_TOKENS,
                stop=("Question:",),
                shots=shots,
            ),
            number_of(row, path, number),
        )
        for number, row in enumerate(problems(path))
    ]


def load_zeroshot(source: Path | None, settings: TaskSettings) -> list[Item]:
    if settings.num_fewshot == 0:
        settings = TaskSettings(None, settings.limit, settings.max_new_tokens, settings.samples, settings.seed)
    check_settings("gsm8k_zeroshot", settings, "max_new_tokens")
    path = _file(source, "gsm8k_zeroshot")
    new_tokens = settings.max_new_tokens or NEW_TOKENS
    return [
        Item(str(number), Write(question_of(row), new_tokens), number_of(row, path, number))
        for number, row in enumerate(problems(path))
    ]


def judge(items: Sequence[Item], answers: Sequence[Answer]) -> list[ItemScore]:
    """1 where the final number is the gold one, as a number."""
    return [
        {"accuracy": float(final_number(answer.texts[0]) == Decimal(item.reference))}
        for item, answer in zip(items, answers, strict=True)
    ]


def problems(path: Path, limit: int | None = None) -> list[Row]:
    """Rows of instruction and output.

    Raises:
        UserError: these are not problems with a number for an answer.
    """
    source = read(str(path), limit=limit)
    if source.kind != "alpaca" or source.dropped:
        left_out = ", ".join(f"{reason}: {count:,}" for reason, count in source.dropped.items())
        raise UserError(
            f"{path}: " + (f"rows cannot be used ({left_out})" if left_out else f"these are {source.kind} rows"),
            'a line of GSM8K is {"question": "...", "answer": "... #### 18"}',
            "task.format",
        )
    return list(source.rows)


def number_of(row: Row, path: Path, number: int) -> str:
    """The gold number as text.

    Raises:
        UserError: the row's answer does not end in one.
    """
    found = final_number(row["output"]) if _MARK.search(row["output"]) else None
    if found is None:
        raise UserError(
            f"{path}: the answer of row {number + 1:,} has no final number: {row['output'][-80:]!r}",
            'GSM8K\'s answers end in "#### 18", or in "The answer is 18."',
            "task.format",
        )
    return str(found)


def question_of(row: Row) -> Row:
    """The row as a prompt, without its answer."""
    return {"kind": "alpaca", "instruction": row["instruction"], "input": row["input"], "output": ""}


def exemplars(path: Path, number: int, settings: TaskSettings) -> tuple[str, ...]:
    """Solved examples: the first rows of the file that the setting `exemplars` names, or of the train file beside.

    Raises:
        UserError: there is no such file, or it has too few rows.
    """
    if not number:
        return ()
    given = settings.extra.get("exemplars")
    place = Path(str(given)).expanduser() if given else path.with_name(path.name.replace("test", "train"))
    if not place.is_file() or place == path:
        raise UserError(
            f"gsm8k: the {number} solved examples before each question are the first rows of "
            + (f"{place}, which is not there" if place != path else "a train file, and none is named"),
            f"fetch train.jsonl from {SOURCE}, or --set exemplars=FILE, or --num-fewshot 0",
            "task.exemplars",
        )
    rows = problems(place, number)
    if len(rows) < number:
        raise UserError(f"gsm8k: {place} has {len(rows)} rows, fewer than {number}", f"--num-fewshot {len(rows)}")
    for at, row in enumerate(rows):
        number_of(row, place, at)
    return tuple(f"Question: {row['instruction']}\nAnswer: {_CALCULATOR.sub('', row['output'])}\n\n" for row in rows)


def _file(source: Path | None, task: str) -> Path:
    path = locate(task, PLACES, source, source=SOURCE, setting=f"--tasks {task}=FILE")
    return path / "test.jsonl" if path.is_dir() else path


GSM8K = Task(
    "gsm8k",
    "GSM8K: word problems after 8 solved ones",
    "accuracy",
    SOURCE,
    load,
    judge,
    summary_of("accuracy"),
    PLACES,
)
ZEROSHOT = Task(
    "gsm8k_zeroshot",
    "GSM8K in the prompt of training",
    "accuracy",
    SOURCE,
    load_zeroshot,
    judge,
    summary_of("accuracy"),
    PLACES,
)
