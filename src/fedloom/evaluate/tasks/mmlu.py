"""MMLU (Hendrycks et al. 2021): four-choice questions from 57 subjects.

Five solved questions of the subject, then the question; the likeliest of " A" to " D" is the answer. The score is the
mean over subjects, not over questions, since subjects have between 100 and 1,534 of them.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedloom.data.places import locate
from fedloom.errors import UserError, suggest
from fedloom.evaluate.tasks.base import Answer, Choose, Item, ItemScore, Task, TaskSettings, check_settings
from fedloom.evaluate.tasks.metrics import STDERR, best, groups_of, mean, standard_error

__all__ = ["CATEGORIES", "MMLU", "SUBJECTS"]

logger = logging.getLogger("fedloom")

SHOTS = 5
LETTERS = "ABCD"
PLACES = ("mmlu",)
SOURCE = "github.com/hendrycks/test (MIT)"

# As the authors sort them.
CATEGORIES = {
    "STEM": [
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ],
    "humanities": [
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ],
    "social_sciences": [
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ],
    "other": [
        "anatomy",
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ],
}
SUBJECTS = sorted(subject for subjects in CATEGORIES.values() for subject in subjects)


class Question(NamedTuple):
    text: str
    choices: tuple[str, ...]
    answer: int


def load(source: Path | None, settings: TaskSettings) -> list[Item]:
    check_settings("mmlu", settings, "num_fewshot", extra=("subjects",))
    home = _folder(locate("mmlu", PLACES, source, source=SOURCE, setting="--tasks mmlu=FOLDER"))
    number = SHOTS if settings.num_fewshot is None else settings.num_fewshot
    items = []
    for subject in _subjects(home, settings):
        shots: tuple[str, ...] = ()
        if number:
            place = home / "dev" / f"{subject}_dev.csv"
            solved = questions(place)
            if len(solved) < number:
                raise UserError(
                    f"mmlu: {place} has {len(solved)} solved questions, fewer than {number}",
                    f"--num-fewshot {len(solved)}",
                    "task.exemplars",
                )
            shots = tuple(f"{prompt_of(one)} {LETTERS[one.answer]}\n\n" for one in solved[:number])
        topic = " ".join(subject.split("_"))
        head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        items += [
            Item(
                f"{subject}/{at}",
                Choose(prompt_of(one), tuple(f" {letter}" for letter in LETTERS), shots, head),
                one.answer,
                subject,
            )
            for at, one in enumerate(questions(home / "test" / f"{subject}_test.csv"))
        ]
    return items


def judge(items: Sequence[Item], answers: Sequence[Answer]) -> list[ItemScore]:
    return [
        {"accuracy": float(best(answer.loglikelihoods) == item.reference)}
        for item, answer in zip(items, answers, strict=True)
    ]


def summarise(items: Sequence[Item], scores: Sequence[ItemScore]) -> dict[str, float]:
    """`accuracy` is the mean over subjects; `accuracy_micro` over questions; a category's is over its subjects."""
    groups = groups_of(items, scores, "accuracy")
    means = {subject: mean(values) for subject, values in groups.items()}
    found = {"accuracy": mean(list(means.values()))}
    errors = [standard_error(values) for values in groups.values()]
    if None not in errors:  # of a mean of independent means
        found["accuracy" + STDERR] = math.sqrt(math.fsum((error or 0.0) ** 2 for error in errors)) / len(groups)
    found["accuracy_micro"] = mean([score["accuracy"] for score in scores])
    for category, subjects in CATEGORIES.items():
        there = {subject: means[subject] for subject in subjects if subject in means}
        if there:
            found[f"accuracy/{category}"] = mean(list(there.values()))
            found |= {f"accuracy/{category}/{subject}": value for subject, value in there.items()}
    return found


def prompt_of(question: Question) -> str:
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.text}\n{listed}Answer:"


def questions(path: Path) -> list[Question]:
    """A subject's file: question, four choices, and the answer as a letter or (below a header) as 0 to 3.

    Raises:
        UserError: it is missing or something else; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            lines = [(reader.line_num, values) for values in reader if values]
    except FileNotFoundError as error:
        raise UserError(f"mmlu: there is no {path}", f"it is published at {SOURCE}", "data.missing") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file of MMLU: {error}", code="task.format") from error
    header = bool(lines) and [name.strip().lower() for name in lines[0][1]][::5] == ["question", "answer"]
    answers = {str(place): place for place in range(4)} if header else {letter: n for n, letter in enumerate(LETTERS)}
    found = []
    for line, values in lines[header:]:
        if len(values) != 6 or values[5].strip() not in answers:
            reason = f"{len(values)} values" if len(values) != 6 else f"the answer {values[5]!r}"
            raise UserError(
                f"{path}, line {line:,}: {reason}; expected a question, four choices and "
                + ("0 to 3" if header else "A, B, C or D"),
                f"MMLU's files as published at {SOURCE}",
                "task.format",
            )
        found.append(Question(values[0], tuple(values[1:5]), answers[values[5].strip()]))
    if not found:
        raise UserError(f"{path}: no question in it", f"it is published at {SOURCE}", "task.format")
    return found


def _folder(path: Path) -> Path:
    """The folder that holds dev and test; the published archive has one more around them."""
    for place in (path, path / "data"):
        if (place / "test").is_dir():
            return place
    raise UserError(
        f"mmlu: {path} has no folder test with the subjects' files",
        f"name the folder that holds dev and test, as in the archive of {SOURCE}",
        "task.format",
    )


def _subjects(home: Path, settings: TaskSettings) -> list[str]:
    """The subjects that there are, or those (and the categories) that are asked for."""
    there = sorted(path.name.removesuffix("_test.csv") for path in (home / "test").glob("*_test.csv"))
    unknown = [subject for subject in there if subject not in SUBJECTS]
    if unknown or not there:
        what = (
            f"{unknown[0]}_test.csv, which is no subject{suggest(unknown[0], SUBJECTS)}" if there else "no *_test.csv"
        )
        raise UserError(f"mmlu: {home / 'test'} has {what}", f"the files as published at {SOURCE}", "task.format")
    asked = settings.extra.get("subjects")
    if asked is None:
        if len(there) < len(SUBJECTS):
            logger.warning("mmlu: %d of %d subjects are in %s", len(there), len(SUBJECTS), home / "test")
        return there
    wanted: set[str] = set()
    for name in filter(None, map(str.strip, str(asked).split(","))):
        found = [subject for subject in there if subject in CATEGORIES.get(name, [name])]
        if not found:
            raise UserError(f"mmlu: no subject {name!r}{suggest(name, [*there, *CATEGORIES])}", code="task.settings")
        wanted.update(found)
    return sorted(wanted)


MMLU = Task(
    "mmlu",
    "MMLU: 57 subjects, four choices, after 5 solved questions",
    "accuracy",
    SOURCE,
    load,
    judge,
    summarise,
    PLACES,
)
