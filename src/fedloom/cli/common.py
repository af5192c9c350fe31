"""What the commands share: where words go, formats, and finding a recipe among the words of a command line."""

from __future__ import annotations

import enum
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.errors import FedloomError, UserError

if TYPE_CHECKING:
    from fedloom.study.load import Loaded
    from fedloom.study.suite import Suite

__all__ = [
    "WORDS",
    "FormatOption",
    "OutputFormat",
    "Words",
    "as_mapping",
    "be_quiet",
    "hear_warnings",
    "one_name",
    "out",
    "print_data",
    "read_suite_words",
    "read_words",
    "relative",
    "render",
    "say",
    "table",
    "wait_asleep",
    "without_data_notes",
]


class OutputFormat(enum.StrEnum):
    """How data is printed."""

    text = "text"
    json = "json"


FormatOption = Annotated[
    OutputFormat, typer.Option("--format", help="json puts data alone on standard output.", show_default=True)
]

# Commands that take a recipe take `k=v`, `--k v` and `--k-with-dash v` among their words, in any order.
WORDS = {"ignore_unknown_options": True}
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [KEY=VALUE]...", show_default=False, help="A recipe, and keys that replace its own."
    ),
]


def say(text: str = "") -> None:
    """For people: standard error, so that standard output is data alone."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def out(text: str) -> None:
    """Data, or what was asked for, as text: standard output."""
    sys.stdout.write(f"{text}\n")


def print_data(value: Any) -> None:
    """Data as JSON on standard output."""
    out(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), width: int | None = None) -> str:
    """Columns side by side, the last one as long as it is or cut to `width`."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = []
    for line in lines:
        cells = [cell.ljust(size) for cell, size in zip(line[:-1], widths, strict=False)]
        text = "  ".join([*cells, line[-1]]).rstrip()
        shown.append(text if width is None or len(text) <= width else text[: width - 1] + "…")
    return "\n".join(shown)


def one_name(words: Sequence[str] | None, command: str) -> tuple[str, list[str]]:
    """The recipe or suite that a command line names, and its overrides.

    Raises:
        UserError: none is named, or more than one.
    """
    from fedloom.study.load import split_words

    overrides, rest = split_words(words or [])
    options = [word for word in rest if word.startswith("-") and len(word) > 1]
    names = [word for word in rest if word not in options]
    if options:
        raise UserError(
            f"{options[0]} needs a value",
            hint=f"fedloom {command} RECIPE {options[0]} VALUE",
            code="cli.option",
        )
    if not names:
        raise UserError(
            f"{command} needs a recipe",
            hint=f"fedloom {command} RECIPE.yaml    # fedloom ls recipes shows those that come with fedloom",
            code="cli.missing_argument",
        )
    if len(names) > 1:
        raise UserError(
            f"{command} takes one recipe, and there are {len(names)}: {', '.join(names)}",
            hint=f"fedloom {command} {names[0]} KEY=VALUE",
            code="cli.too_many",
        )
    said = [one.said if "=" in one.said else f"--{one.key}={one.value}" for one in overrides]
    return names[0], said


def read_words(words: Sequence[str] | None, command: str) -> Loaded:
    """The recipe that a command line names, with its overrides; what is to be said about spellings is said.

    Raises:
        UserError: none is named, or more than one, or it is wrong.
    """
    from fedloom.study.load import read_recipe

    name, overrides = one_name(words, command)
    loaded = read_recipe(name, overrides)
    for note in loaded.notes:
        say(f"note: {note}")
    return loaded


def read_suite_words(words: Sequence[str] | None, command: str) -> Suite | None:
    """The suite that a command line names, with its overrides; None where it names a recipe.

    Raises:
        UserError: nothing of that name, or more than one, or the suite is wrong.
    """
    from fedloom.study.suite import names_suite, read_suite_file

    name, overrides = one_name(words, command)
    if not names_suite(name):
        return None
    suite = read_suite_file(name, overrides)
    for note in suite.notes:
        say(f"note: {note}")
    return suite


def be_quiet() -> None:
    """Keep libraries quiet: no progress bars of theirs, no advice, no telemetry."""
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.environ["FEDLOOM_TOKENIZERS"] = "quiet"  # our word, not the user's: see fedloom.data.tokens
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def wait_asleep() -> None:
    """Let torch's threads sleep while they wait for one another. Holds if said before torch is imported.

    By default they spin, and where other processes want the same cores a thread spins for one that cannot run:
    a demo's rounds on two busy cores took 1.5 s asleep and 6 to 16 s spinning.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class _Warnings(logging.Handler):
    """Warnings of the package for people, on whatever standard error is at that moment (a live display has its own)."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{'warning' if record.levelno < logging.ERROR else 'error'}: {record.getMessage()}")


class _Progress(logging.Handler):
    """Lines that say how far long work is; there are few of them, so that a log file may have them too."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def hear_warnings() -> None:
    """Print what the package warns of, and how far preparing data is when that takes long."""
    logger = logging.getLogger("fedloom")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Warnings)]:
        logger.removeHandler(handler)  # of another command in this process, which may have quieted it
    logger.addHandler(_Warnings(logging.WARNING))
    progress = logging.getLogger("fedloom.data.progress")
    if not any(isinstance(handler, _Progress) for handler in progress.handlers):
        progress.setLevel(logging.INFO)
        progress.addHandler(_Progress())


def without_data_notes() -> None:
    """For commands that show the data report's notes themselves."""
    for handler in logging.getLogger("fedloom").handlers:
        if isinstance(handler, _Warnings):
            handler.addFilter(lambda record: record.name != "fedloom.data.federation")


def render(error: FedloomError) -> str:
    """An error as it is printed: what is wrong, what to do, and a name that scripts may look for."""
    lines = [f"fedloom: {error.message}"]
    if error.hint:
        lines.append(f"  {error.hint}")
    lines.append(f"  [{error.code}]")
    return "\n".join(lines)


def relative(path: Path) -> str:
    """A path as a person would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def as_mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, or an empty one."""
    return value if isinstance(value, Mapping) else {}
