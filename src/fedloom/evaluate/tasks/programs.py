"""What the tasks share whose answers are programs: reading their files, reading a program out of an answer, pass@k.

An answer is read in several ways, in an order, and the first that is Python is run (`readings`). Whoever wrote it, the
program runs in the sandbox (`fedloom.evaluate.sandbox`); where this machine has none, such a task is refused before a
model is asked anything.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.data.places import locate
from fedloom.errors import UserError
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.sandbox import Outcome, Part, Program, open_sandbox
from fedloom.evaluate.tasks.base import Answer, Item, ItemScore, Judged, TaskSettings
from fedloom.evaluate.tasks.metrics import summary_of

__all__ = ["judge", "pass_at_k", "read_lines", "readings", "reference_of", "sampling_of", "summarise"]

SAMPLING = ("temperature", "top_k", "top_p")  # settings of every task here
KS = (1, 10, 100)

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that of k answers, drawn from these without putting back, at least one passes (Chen et al. 2021).

    >>> pass_at_k(5, 2, 1)
    0.4
    >>> pass_at_k(5, 1, 5)
    1.0
    """
    if not 0 < k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {passed} among {samples}")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def reference_of(before: str, entry_point: str, after: Sequence[str], *, cut: bool = False) -> dict[str, Any]:
    """What judging an answer needs: the code before it, the function it should define, and what tests it."""
    return {"before": before, "entry_point": entry_point, "after": list(after), "cut": cut}


def readings(before: str, answer: str, entry_point: str, cut: bool = False) -> list[str]:
    """Ways to read a program out of an answer; the first that is Python counts.

    1. As the benchmark reads it: the prompt's code, and the answer behind it. With `cut`, only up to the answer's first
       line that is not indented, where that leaves something.
    2. A fenced block that defines the function, behind the prompt's code (imports and helpers are there).
    3. The answer up to its first fence, for a model that writes code, ends the fence and explains.
    4. The first fenced block as the function's body: as it stands, then indented.
    """
    found = [before + answer]
    if cut and (body := _indented_part(answer)).strip():
        found.insert(0, before + body)
    blocks = [block for block in _FENCE.findall(answer + "\n") if block.strip()]
    defines = re.compile(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    found += [f"{before}\n{block}" for block in map(textwrap.dedent, blocks) if defines.search(block)][:1]
    head, fence, _ = answer.partition("```")
    if fence and head.strip():
        found.append(before + head)
    if blocks:
        body = textwrap.dedent(blocks[0])
        found += [f"{before}\n{blocks[0]}", f"{before}\n{textwrap.indent(body, '    ')}" if before else body]
    return list(dict.fromkeys(found))


def _indented_part(text: str) -> str:
    lines = text.split("\n")
    stop = next((n for n, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
    return "\n".join(lines[:stop])


def program_of(reference: Mapping[str, Any], answer: str) -> Program:
    """The answer and its tests, as the sandbox takes them."""
    texts = readings(reference["before"], answer, reference["entry_point"], reference["cut"])
    tests = [Part(f"tests {n}" if n > 1 else "tests", (text,)) for n, text in enumerate(reference["after"], 1)]
    return Program((Part("program", tuple(texts)), *tests))


def judge(items: Sequence[Item], answers: Sequence[Answer]) -> list[Judged]:
    """Run every answer, equal ones once, and estimate pass@k of each item from its samples.

    Metrics: `pass@K` for each K of 1, 10, 100 and the number of samples, as far as there are as many; `timeout`, the
    share of samples that did not end.
    """
    programs = [
        [program_of(item.reference, text) for text in answer.texts] for item, answer in zip(items, answers, strict=True)
    ]
    different = list(dict.fromkeys(program for own in programs for program in own))
    outcomes = dict(zip(different, open_sandbox().run(different), strict=True))
    judged = []
    for own in programs:
        found = [outcomes[program] for program in own]
        passed = sum(outcome.passed for outcome in found)
        scores = {f"pass@{k}": pass_at_k(len(own), passed, k) for k in _ks(len(own))}
        scores["timeout"] = sum(outcome.status == "timeout" for outcome in found) / len(own)
        judged.append(Judged(scores, tuple(map(told, found))))
    return judged


def told(outcome: Outcome) -> str:
    """An outcome in a line, for the file of items."""
    text = f"{outcome.status}: {outcome.detail}" if outcome.detail else outcome.status
    return f"{text} [reading {outcome.reading + 1}]" if outcome.reading else text


def _ks(samples: int) -> list[int]:
    return sorted({k for k in (*KS, samples) if k <= samples})


def summarise(items: Sequence[Item], scores: Sequence[ItemScore]) -> dict[str, float]:
    """Means over all items."""
    return summary_of(*scores[0])(items, scores)


def sampling_of(task: str, settings: TaskSettings, default: Sampling | None) -> Sampling | None:
    """How answers are drawn: the default, but for what the user set. A temperature of 0 is the most likely answer.

    Raises:
        UserError: a setting is no number, or several samples of the most likely answer are asked for.
    """
    given: dict[str, float] = {}
    wrong = []
    for name, value in ((name, settings.extra[name]) for name in SAMPLING if name in settings.extra):
        number = _number(value)
        if number is None or (name == "top_k" and number % 1):
            wrong.append(f"{name} is {value!r}, not a {'whole ' if name == 'top_k' else ''}number")
        else:
            given[name] = number
    if wrong:
        raise UserError(f"{task}: " + "; ".join(wrong), "--set temperature=0.2", "task.settings")
    start = default or Sampling(temperature=1.0)
    temperature = given.get("temperature", start.temperature if default or given else 0.0)
    if temperature == 0:
        if (settings.samples or 1) > 1:
            raise UserError(
                f"{task}: {settings.samples} samples of the most likely answer are one answer",
                "--set temperature=0.2, or leave --samples out",
                "task.settings",
            )
        return None
    return Sampling(temperature, given.get("top_p", start.top_p), int(given.get("top_k", start.top_k)))


def _number(value: object) -> float | None:
    """A setting, which a command line gives as text."""
    try:
        return None if isinstance(value, bool) else float(str(value))
    except ValueError:
        return None


def read_lines(
    task: str, places: Sequence[str], given: Path | None, source: str, keys: Mapping[str, type]
) -> tuple[Path, list[dict[str, Any]]]:
    """The lines of a published file, JSON lines as they are or gzipped, and that this machine can run programs.

    Args:
        keys: what every line must have, and of what type.

    Raises:
        UserError: there is no file, a line is not such an object, or there is no sandbox.
    """
    path = locate(task, places, given, source=source, setting=f"--tasks {task}=FILE")
    if path.is_dir():
        names = [Path(place).name for place in places]
        inside = [path / name for name in names if (path / name).is_file()]
        if not inside:
            raise UserError(f"{task}: {path} has no {' and no '.join(names)}", f"from {source}", "data.missing")
        path = inside[0]
    open_sandbox()
    rows = []
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{task}: {path} cannot be read: {error}", f"from {source}", "task.format") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(
                f"{task}: {path}, line {number:,} is no JSON object: {error}", code="task.format"
            ) from error
        problems = [f"no {key}" for key in keys if key not in row]
        problems += [
            f"{key} is no {kind.__name__}" for key, kind in keys.items() if key in row and type(row[key]) is not kind
        ]
        if problems:
            raise UserError(
                f"{task}: {path}, line {number:,} has {', '.join(problems)}",
                f"a line of it has {', '.join(keys)} ({source})",
                "task.format",
            )
        rows.append(row)
    return path, rows
