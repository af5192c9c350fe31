"""The built-in tasks: three procedural benchmarks that need no download (`data.path: builtin:skills`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fedloom.data.builtin.arith import CLIENTS as _ARITH_CLIENTS
from fedloom.data.builtin.arith import arith_rows as _arith_rows
from fedloom.data.builtin.interpreter import LANGUAGES as _LANGUAGES
from fedloom.data.builtin.programs import code_rows as _code_rows
from fedloom.data.builtin.skills import CATEGORIES as _CATEGORIES
from fedloom.data.builtin.skills import skills_rows as _skills_rows

__all__ = ["TASKS", "BuiltinTask", "Row"]

Row = dict[str, Any]  # "instruction", "input", "output", "category"; for code also "language" and "tests"


class BuiltinTask(NamedTuple):
    """A task: who its clients are, how answers are judged, and the rows for a seed."""

    name: str
    title: str
    clients: tuple[str, ...]
    metric: str  # "exact", "final_number" or "pass_at_1"
    max_new_tokens: int
    rows: Callable[[int], dict[str, dict[str, list[Row]]]]  # seed -> {client: {"train" | "validation" | "test": rows}}


TASKS: Mapping[str, BuiltinTask] = MappingProxyType(
    {
        "arith": BuiltinTask(
            "arith", "word problems with worked steps", _ARITH_CLIENTS, "final_number", 48, _arith_rows
        ),
        "skills": BuiltinTask(
            "skills", "eight language skills, one per client", _CATEGORIES, "exact", 12, _skills_rows
        ),
        "code": BuiltinTask(
            "code", "tiny functions, one programming language per client", _LANGUAGES, "pass_at_1", 48, _code_rows
        ),
    }
)
