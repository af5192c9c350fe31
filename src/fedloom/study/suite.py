"""A suite: recipes x a grid of settings x seeds. From its file to cells whose recipes are all validated.

    suite: small
    base: [builtin_skills, builtin_arith]        # recipes; their names are the setting `recipe`
    set: {rounds: 10}                            # keys of every cell
    grid:
      learning_rate: [4.0e-3, 1.0e-2]            # a recipe's key and its values
      method:                                    # or names, each with the keys it stands for
        plain: {method: fedavg}
        pulled: {method: fedprox, prox_mu: 0.1}
    exclude: [{recipe: builtin_arith, method: pulled}]
    seeds: [0, 1, 2]

Imports neither torch nor transformers. Running a suite is `fedloom.study.suite_run`.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedloom.study.aliases import SAME
from fedloom.study.load import (
    Extra,
    Problem,
    RecipeError,
    _annotation,
    _coerce,
    _compose,
    _near,
    _python,
    _Raw,
    _raw,
    _Scalar,
    _sentence,
    _shown,
    find_key,
    is_suite_text,
    locate,
    read_text,
    split_words,
    validate_text,
)
from fedloom.study.recipe import BLOCKS, Recipe
from fedloom.study.suite_result import METRICS
from fedloom.study.yaml_text import yaml_value

__all__ = [
    "Axis",
    "LimitsFile",
    "Suite",
    "SuiteCell",
    "SuiteFile",
    "metric_problem",
    "names_suite",
    "read_suite_file",
    "suite_schema",
    "validate_suite_text",
]

logger = logging.getLogger("fedloom")

RECIPE = "recipe"  # the axis of the recipes in `base`
SEED = "seed"


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LimitsFile(_Block):
    """What a suite may use."""

    minutes: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Wall-clock time of one call. When it is used up, running cells stop after their round, and the "
        "next call goes on.",
    )
    jobs: Annotated[int, Field(ge=1)] = Field(
        1, description="Cells at once, at most. The cores are divided among them (runtime.threads)."
    )
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Memory for all cells together, in 10^9 bytes: fewer run at once where more do not fit. Default: "
        "what is free when the suite begins.",
    )


class SuiteFile(_Block):
    """A suite of runs."""

    suite: str = Field(min_length=1, description="The suite's name.")
    base: str | list[str] | dict[str, str] = Field(
        description="A recipe, or several: names of packaged recipes or files (beside the suite, or from here); as a "
        "mapping, the names that tables show."
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="Recipe keys of every cell, in place of the recipes' own."
    )
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="What varies: a recipe key with a list of values, or any name with named variants, each a mapping "
        "of the keys it sets. Cells are all combinations.",
    )
    exclude: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Combinations to leave out: names of the grid with a value or a list of values; `recipe` and "
        "`seed` may stand here too.",
    )
    seeds: list[int] = Field(
        [0, 1, 2], min_length=1, description="Each cell is run with each of these; a seed draws data, split and order."
    )
    metrics: list[str] | None = Field(
        None,
        description=f"What to tabulate: {', '.join(METRICS)}, the same with `own_test.` in front, or "
        "tasks.TASK.METRIC. Default: score, loss and those of tasks, where there are any.",
    )
    report: bool = Field(True, description="Write report.html at the end.")
    limits: LimitsFile = Field(default_factory=LimitsFile, description="What the suite may use.")
    output_dir: str = Field("", description="The suite's folder. Default `runs/<suite>`.")
    run_store: str = Field(
        "",
        description="Where the cells' run folders lie; suites that share one do not run the same cell twice. Default "
        "`<output_dir>/runs`.",
    )


# Keys a cell may not have: whose they are instead.
_NOT_A_CELLS = {
    "seed": "seeds: [...] has them",
    "name": "a cell is named by its settings; the suite's own name is suite",
    "output_dir": "cells lie in the suite's output_dir, or in run_store",
}


class Axis(NamedTuple):
    """One thing that the grid varies."""

    name: str
    values: tuple[Any, ...]  # as tables show them: a number, a word
    sets: tuple[tuple[Extra, ...], ...]  # what each value sets
    keys: frozenset[str]  # dotted, of all values


class SuiteCell(NamedTuple):
    """One run to make."""

    settings: Mapping[str, Any]
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        """For people: `builtin_code, plain, seed 1`."""
        return f"{settings_text(self.settings)}, seed {self.seed}" if self.settings else f"seed {self.seed}"


@dataclass(frozen=True)
class Suite:
    """A sound suite: every cell's recipe is validated."""

    name: str
    cells: tuple[SuiteCell, ...]
    settings: Mapping[str, tuple[Any, ...]]  # the axes, `recipe` first
    seeds: tuple[int, ...]
    same_tests: tuple[str, ...]  # axes whose values are measured on the same rows, so that they may be compared
    metrics: tuple[str, ...] | None
    report: bool
    limits: LimitsFile
    output_dir: Path
    run_store: Path
    source: str
    notes: tuple[str, ...]
    document: Mapping[str, Any]  # what was asked for, overrides included, as JSON values
    resolved: str  # the same as YAML that reads back as this suite from a folder with `bases` in its folder base/
    bases: Mapping[str, str]  # the recipes' texts by their names


def value_text(value: Any) -> str:
    """A setting's value as tables show it."""
    return value if isinstance(value, str) else yaml_value(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in few words; words speak for themselves, numbers need their key."""
    return ", ".join(
        value_text(value) if isinstance(value, str) else f"{name} {value_text(value)}"
        for name, value in settings.items()
    )


def metric_problem(name: str) -> str:
    """What to say about a metric that there is not; nothing of one that there is."""
    known = [*METRICS, *(f"own_test.{one}" for one in METRICS)]
    parts = name.split(".")
    if name in known or (len(parts) == 3 and parts[0] == "tasks" and all(parts)):
        return ""
    near = _near(name, known)
    return f"did you mean {near}?" if near else f"there are {', '.join(known)} and tasks.TASK.METRIC"


def names_suite(name: str) -> bool:
    """Whether what a command line names is a suite: a file, a suite's folder, or a packaged one.

    Raises:
        UserError: there is nothing of that name, or it cannot be read.
    """
    return is_suite_text(read_text(locate(name)))


def read_suite_file(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite with all its cells.

    Args:
        path: a YAML file, a suite's folder, or the name of a packaged suite.
        overrides: `k=v`: keys of the suite (`seeds=0,1`, `limits.jobs=2`, `grid.method=[fedavg]`), or recipe keys that
            every cell gets (`rounds=2`).

    Raises:
        RecipeError: it is wrong; `problems` has every objection to the file and to the recipes of its cells.
        UserError: the file cannot be read.
    """
    located = locate(path)
    return validate_suite_text(read_text(located), overrides, source=str(path), folder=located.parent)


def validate_suite_text(
    text: str, overrides: Sequence[str] = (), *, source: str = "suite", folder: Path = Path()
) -> Suite:
    """The suite in `text`; recipes it names are looked for in `folder` first.

    Raises:
        RecipeError: with every objection.
    """
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.nodes import MappingNode

    try:
        root = _compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        problem = Problem("", f"not YAML: {error.problem or error.context}", line, code="recipe.syntax")
        raise RecipeError.of(source, [problem]) from error
    if not isinstance(root, MappingNode):
        raise RecipeError.of(source, [Problem("", "expected keys and values at the top", 1, code="recipe.syntax")])
    reader = _Reader(source, folder)
    reader.read(root)
    reader.override(overrides)
    suite = reader.suite()
    if reader.problems or suite is None:
        raise RecipeError.of(source, reader.problems)
    return suite


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Where(NamedTuple):
    """Where something was said, and under which of the suite's keys."""

    key: str
    line: int | None = None
    override: str | None = None


class _Item(NamedTuple):
    raw: _Raw
    where: _Where


class _Variant(NamedTuple):
    label: _Item
    keys: dict[str, _Item]  # recipe key as it was written -> value


class _Grid(NamedTuple):
    where: _Where
    values: list[_Item] | list[_Variant]


class _Reader:
    """Collects what a suite file and overrides say, and every objection."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.problems: list[Problem] = []
        self.plain: dict[str, _Item] = {}  # dotted keys with a simple value
        self.base: list[tuple[str, _Item]] = []  # (name for tables or "", recipe)
        self.set: dict[str, _Item] = {}
        self.grid: dict[str, _Grid] = {}
        self.exclude: list[tuple[_Where, dict[str, _Raw]]] = []
        self.over: dict[str, _Item] = {}  # recipe keys of the command line
        self.places: list[tuple[_Where, str]] = []  # by the number that an Extra's `said` is; and its recipe key
        self.seen: set[str] = set()  # keys at the top

    def problem(self, where: _Where, message: str, raw: _Raw | None = None, code: str = "suite.value") -> None:
        value = None if raw is None else _shown(raw)
        self.problems.append(Problem(where.key, message, where.line, where.override, value, code))

    # ---- the file

    def read(self, root: Any) -> None:
        seen: dict[str, int] = {}
        for key_node, value in root.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                self.problem(_Where(key, line), f"given twice, on line {seen[key]} as well", code="recipe.twice")
                continue
            seen[key] = line
            if key not in SuiteFile.model_fields:
                self.problem(_Where(key, line), _unknown(key), code="recipe.unknown_key")
                continue
            self.top(key, value, line, None)

    def top(self, key: str, node: Any, line: int | None, said: str | None) -> None:
        """A key of the suite, from the file (`line`) or the command line (`said`)."""
        where = _Where(key, line, said)
        self.seen.add(key)
        if key == "base":
            self.base = self._bases(node, where)
        elif key == "set":
            self.set |= self._keys(node, where)
        elif key == "grid":
            for name, value, at in self._mapping(node, where, "names with their values"):
                self.grid[name] = self._axis(name, value, _Where(f"grid.{name}", at, said))
        elif key == "exclude":
            self.exclude = self._exclusions(node, where)
        elif key == "limits":
            for name, value, at in self._mapping(node, where, f"a block of keys: {', '.join(LimitsFile.model_fields)}"):
                if name in LimitsFile.model_fields:
                    self.plain[f"limits.{name}"] = _Item(_raw(value), _Where(f"limits.{name}", at, said))
                else:
                    near = _near(name, LimitsFile.model_fields)
                    what = f"did you mean {near}?" if near else f"there are {', '.join(LimitsFile.model_fields)}"
                    self.problem(_Where(f"limits.{name}", at, said), f"no such key, {what}", code="recipe.unknown_key")
        else:
            self.plain[key] = _Item(_raw(node), where)

    def _mapping(self, node: Any, where: _Where, expected: str) -> Iterator[tuple[str, Any, int | None]]:
        from ruamel.yaml.nodes import MappingNode

        if isinstance(node, MappingNode):
            for key, value in node.value:
                yield str(key.value), value, None if where.override else key.start_mark.line + 1
        elif _raw(node) not in (_Scalar(""), _Scalar("null"), _Scalar("~")):
            self.problem(where, f"expected {expected}", _raw(node))

    def _keys(self, node: Any, where: _Where) -> dict[str, _Item]:
        """Recipe keys with their values; blocks are opened, the kind of a block first."""
        found: dict[str, _Item] = {}
        for key, value, line in self._mapping(node, where, "recipe keys with values"):
            here = _Where(f"{where.key}.{key}", line, where.override)
            raw = _raw(value)
            if key in BLOCKS and isinstance(raw, dict):
                inside = {
                    f"{key}.{leaf}": _Item(_raw(item), _Where(f"{here.key}.{leaf}", at, where.override))
                    for leaf, item, at in self._mapping(value, here, "keys")
                }
                found |= dict(sorted(inside.items(), key=lambda pair: not pair[0].endswith(".kind")))
            else:
                found[key] = _Item(raw, here)
        return found

    def _bases(self, node: Any, where: _Where) -> list[tuple[str, _Item]]:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        if isinstance(node, MappingNode):
            return [(name, _Item(_raw(value), where._replace(line=at or where.line)))
                    for name, value, at in self._mapping(node, where, "")]  # fmt: skip
        if isinstance(node, SequenceNode):
            lines = (None if where.override else item.start_mark.line + 1 for item in node.value)
            return [("", _Item(_raw(item), where._replace(line=line or where.line)))
                    for item, line in zip(node.value, lines, strict=True)]  # fmt: skip
        return [("", _Item(_raw(node), where))]

    def _axis(self, name: str, node: Any, where: _Where) -> _Grid:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        if isinstance(node, MappingNode):
            variants = []
            for label, value, line in self._mapping(node, where, ""):
                at = _Where(f"{where.key}.{label}", line, where.override)
                variants.append(_Variant(_Item(_Scalar(label), at), self._keys(value, at)))
            return _Grid(where, variants)
        if isinstance(node, SequenceNode):
            lines = (None if where.override else item.start_mark.line + 1 for item in node.value)
            return _Grid(where, [_Item(_raw(item), where._replace(line=line or where.line))
                                 for item, line in zip(node.value, lines, strict=True)])  # fmt: skip
        return _Grid(where, [_Item(_raw(node), where)])

    def _exclusions(self, node: Any, where: _Where) -> list[tuple[_Where, dict[str, _Raw]]]:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        found = []
        for item in node.value if isinstance(node, SequenceNode) else [node]:
            at = where._replace(line=None if where.override else item.start_mark.line + 1)
            if isinstance(item, MappingNode):
                found.append((at, {str(key.value): _raw(value) for key, value in item.value}))
            elif _raw(item) not in (_Scalar(""), _Scalar("null"), _Scalar("~")):
                self.problem(at, "expected names of the grid with their values", _raw(item))
        return found

    # ---- the command line

    def override(self, words: Sequence[str]) -> None:
        from ruamel.yaml.error import MarkedYAMLError

        found, rest = split_words(words)
        for word in rest:
            self.problem(_Where(word, None, ""), "expected key=value or --key value", code="recipe.override")
        for one in found:
            where = _Where(one.key, None, one.said)
            head, _, tail = one.key.partition(".")
            try:
                node = _compose(one.value)
            except MarkedYAMLError as error:
                self.problem(where, f"not YAML: {error.problem or error.context}", _Scalar(one.value))
                continue
            raw = _Scalar("") if node is None else _raw(node)
            if one.key in LimitsFile.model_fields:
                self.plain[f"limits.{one.key}"] = _Item(raw, where)
            elif head == "limits" and tail in LimitsFile.model_fields:
                self.plain[one.key] = _Item(raw, where)
            elif head == "grid" and tail and node is not None:
                self.grid[tail] = self._axis(tail, node, where)
            elif head == "set" and tail:
                self.over[tail] = _Item(raw, where)
            elif one.key in SuiteFile.model_fields and node is not None:
                self.top(one.key, node, None, one.said)
            else:
                self.over[one.key] = _Item(raw, where)

    # ---- the whole

    def suite(self) -> Suite | None:
        """The suite, if there is nothing against it."""
        values = self._plain_values()
        bases = self._texts()
        fixed = self._extras(self.set)
        over = self._extras(self.over)
        axes = [axis for name, given in self.grid.items() if (axis := self._axis_of(name, given)) is not None]
        self._overlaps(axes)
        seeds = values.get("seeds", SuiteFile.model_fields["seeds"].default)
        for seed in seeds:
            if not 0 <= seed < 2**63:
                self.problem(self._where("seeds"), f"{seed} is no seed: from 0 to below 2^63")
        if len(set(seeds)) < len(seeds):
            twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
            self.problem(self._where("seeds"), f"{', '.join(map(str, twice))} is given twice")
        self._metrics(values.get("metrics"))
        if "suite" not in self.seen:
            self.problem(_Where("suite"), "missing: the suite's name", code="recipe.missing_key")
        if "base" not in self.seen:
            self.problem(_Where("base"), "missing: a recipe, or a list of them (fedloom ls recipes)")
        settings: dict[str, tuple[Any, ...]] = {RECIPE: tuple(bases), **{axis.name: axis.values for axis in axes}}
        left_out = self._left_out(settings, seeds)
        if len(axes) < len(self.grid):  # without one of them, cells would be other cells than those meant
            return None
        cells, notes = self._cells(bases, fixed, axes, over, seeds, left_out)
        if self.problems:
            return None
        if not cells:
            self.problem(self._where("exclude"), "nothing is left to run")
            return None
        output = Path(values.get("output_dir") or f"runs/{values['suite']}")
        rows = {"data.path", "data.name", "data.test_path", "data.limit"}
        return Suite(
            name=values["suite"],
            cells=tuple(cells),
            settings=settings,
            seeds=tuple(seeds),
            same_tests=tuple(axis.name for axis in axes if not axis.keys & rows),
            metrics=tuple(values["metrics"]) if values.get("metrics") else None,
            report=values.get("report", True),
            limits=LimitsFile(**{key.partition(".")[2]: value for key, value in values.items()
                                 if key.startswith("limits.")}),
            output_dir=output,
            run_store=Path(values.get("run_store") or output / "runs"),
            source=self.source,
            notes=tuple(notes),
            document=_python(raw := self._whole(bases)),
            resolved=_yaml_text(raw),
            bases={name: text for name, (_, text, _) in bases.items()},
        )  # fmt: skip

    def _whole(self, bases: Mapping[str, Any]) -> dict[str, _Raw]:
        """The suite as it stands with its overrides; recipes are beside it in the folder base."""
        over = {_dotted(key) for key in self.over}
        fixed = {key: item.raw for key, item in self.set.items() if _dotted(key) not in over}
        plain = {key: item.raw for key, item in self.plain.items()}
        limits = {key.partition(".")[2]: plain.pop(key) for key in [*plain] if key.startswith("limits.")}
        whole: dict[str, _Raw] = {
            "suite": plain.pop("suite"),
            "base": {name: _Scalar(f"base/{name}.yaml", quoted=True) for name in bases},
            "set": {**fixed, **{key: item.raw for key, item in self.over.items()}},
            "grid": {name: _axis_raw(grid) for name, grid in self.grid.items()},
            "exclude": [dict(rule) for _, rule in self.exclude],
            **plain,
            "limits": limits,
        }
        return {key: raw for key, raw in whole.items() if raw not in ({}, [])}

    def _where(self, key: str) -> _Where:
        return self.plain[key].where if key in self.plain else _Where(key)

    def _plain_values(self) -> dict[str, Any]:
        """Keys with a simple value, by the types of their fields."""
        values: dict[str, Any] = {}
        for key, item in self.plain.items():
            block, _, leaf = key.rpartition(".")
            model: type[BaseModel] = LimitsFile if block else SuiteFile
            try:
                values[key] = _coerce(item.raw, model.model_fields[leaf].annotation)
                whole = {"suite": "s", "base": "b"} if not block else {}
                model.model_validate({**whole, leaf: values[key]})
            except ValidationError as error:
                self.problem(item.where, _sentence(error.errors()), item.raw)
                values.pop(key, None)
            except ValueError as error:
                self.problem(item.where, str(error), item.raw)
        return {key: value for key, value in values.items() if value is not None}

    def _texts(self) -> dict[str, tuple[str, str, _Where]]:
        """The recipes: name for tables -> (file as it was named, text, where it was named)."""
        from fedloom.errors import UserError

        found: dict[str, tuple[str, str, _Where]] = {}
        for name, item in self.base:
            if not isinstance(item.raw, _Scalar) or not item.raw.text.strip():
                self.problem(item.where, "expected a recipe: a file, or a name of fedloom ls recipes", item.raw)
                continue
            said = item.raw.text.strip()
            label = name or Path(said).stem
            if label in found:
                self.problem(
                    item.where, f"{label} is there twice: name them, base: {{a: {said}, b: ...}}", code="recipe.twice"
                )
                continue
            beside = self.folder / said
            try:
                path = locate(beside if beside.is_file() else said)
                text = read_text(path)
            except UserError as error:
                self.problem(item.where, f"{error.message}; {error.hint}" if error.hint else error.message)
                continue
            if is_suite_text(text):
                self.problem(item.where, f"{said} is a suite, and a suite is made of recipes")
                continue
            found[label] = (said, text, item.where)
        return found

    def _extras(self, keys: Mapping[str, _Item]) -> tuple[Extra, ...]:
        extras = []
        for key, item in keys.items():
            ours = SAME.get(key, key)
            if ours in _NOT_A_CELLS:
                self.problem(item.where, f"has no place in a cell: {_NOT_A_CELLS[ours]}", item.raw, "suite.not_a_cells")
                continue
            self.places.append((item.where, _dotted(key)))
            extras.append(Extra(key, item.raw, str(len(self.places) - 1)))
        return tuple(extras)

    def _axis_of(self, name: str, given: _Grid) -> Axis | None:
        if name in (RECIPE, SEED, "seeds"):
            ours = "base" if name == RECIPE else "seeds"
            self.problem(given.where, f"{ours} of the suite has these", code="suite.not_a_cells")
            return None
        if not given.values:
            self.problem(given.where, "has no values")
            return None
        before = len(self.problems)
        values: list[Any] = []
        sets: list[tuple[Extra, ...]] = []
        keys: set[str] = set()
        for value in given.values:
            if isinstance(value, _Variant):
                shown: Any = _python(value.label.raw)
                shown = shown if isinstance(shown, str) else _shown(value.label.raw)
                sets.append(self._extras(value.keys))
                keys |= {_dotted(key) for key in value.keys}
            else:
                key = self._key_of(name, given.where)
                if key is None:
                    return None
                shown = self._value_of(key, value)
                sets.append(self._extras({key: value}))
                keys.add(key)
            if shown in values:
                self.problem(given.where, f"{value_text(shown)} is there twice", code="recipe.twice")
            values.append(shown)
        return None if len(self.problems) > before else Axis(name, tuple(values), tuple(sets), frozenset(keys))

    def _key_of(self, name: str, where: _Where) -> str | None:
        """The recipe key that an axis with a list of values varies."""
        from fedloom.errors import UserError

        try:
            key = find_key(name)
        except UserError as error:
            message = error.message.removeprefix(f"{name}: ")
            self.problem(
                where, f"{message} (a name of your own takes named variants: {{a: {{key: value}}, b: ...}})",
                code="recipe.unknown_key",
            )  # fmt: skip
            return None
        if key in BLOCKS and "kind" in BLOCKS[key].model_fields:
            return f"{key}.kind"
        if key in BLOCKS:
            self.problem(where, f"is a block: vary one of its keys, {key}.{next(iter(BLOCKS[key].model_fields))} say")
            return None
        return key

    def _value_of(self, key: str, item: _Item) -> Any:
        try:
            return _coerce(item.raw, _annotation(key))
        except ValueError:  # the cell's own validation says what is wrong
            return _shown(item.raw)

    def _overlaps(self, axes: Sequence[Axis]) -> None:
        """A key that is said in two places would silently be the last one's."""
        owner: dict[str, str] = {_dotted(key): f"set.{key}" for key in self.set}
        for axis in axes:
            for key in sorted(axis.keys):
                if key in owner:
                    self.problem(
                        self.grid[axis.name].where, f"{key} is said by {owner[key]} as well: in one place only"
                    )
                owner[key] = f"grid.{axis.name}"
        for key, item in self.over.items():
            held = next((axis for axis in axes if _dotted(key) in axis.keys), None)
            if held is not None:
                self.problem(item.where, f"the grid varies it: grid.{held.name}=... replaces its values", item.raw)

    def _metrics(self, metrics: Sequence[str] | None) -> None:
        for name in metrics or ():
            if wrong := metric_problem(name):
                self.problem(self._where("metrics"), f"{name} is no metric, {wrong}")

    def _left_out(self, settings: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> list[dict[str, set[str]]]:
        """What `exclude` names: the setting -> the values, as text."""
        known: dict[str, Sequence[Any]] = {**settings, SEED: seeds}
        found = []
        for where, rule in self.exclude:
            made: dict[str, set[str]] = {}
            for name, raw in rule.items():
                if name not in known:
                    near = _near(name, known)
                    what = f"did you mean {near}?" if near else f"the suite varies {', '.join(known)}"
                    self.problem(where, f"{name} is not in the grid, {what}", code="recipe.unknown_key")
                    continue
                texts = {value_text(value): value for value in known[name]}
                wanted = raw if isinstance(raw, list) else [raw]
                made[name] = set()
                for one in wanted:
                    text = one.text if isinstance(one, _Scalar) else _shown(one)
                    same = [t for t, value in texts.items() if text in (t, str(value)) or _python(one) == value]
                    if same:
                        made[name].add(same[0])
                        continue
                    near = _near(text, texts)
                    what = f"did you mean {near}?" if near else f"there are {', '.join(texts)}"
                    self.problem(where, f"{name} has no {text}, {what}")
            if made:
                found.append(made)
            elif not rule:
                self.problem(where, "names nothing, so it would leave out everything")
        return found

    def _cells(
        self,
        bases: Mapping[str, tuple[str, str, _Where]],
        fixed: Sequence[Extra],
        axes: Sequence[Axis],
        over: Sequence[Extra],
        seeds: Sequence[int],
        left_out: Sequence[Mapping[str, set[str]]],
    ) -> tuple[list[SuiteCell], list[str]]:
        cells: list[SuiteCell] = []
        notes: dict[str, None] = {}
        wrong: dict[Problem, list[dict[str, Any]]] = {}
        used = [0] * len(left_out)
        every: list[dict[str, Any]] = []
        for label, (said, text, named) in bases.items():
            for chosen in itertools.product(*(range(len(axis.values)) for axis in axes)):
                pairs = list(zip(axes, chosen, strict=True))
                settings = {RECIPE: label, **{axis.name: axis.values[place] for axis, place in pairs}}
                texts = {name: value_text(value) for name, value in settings.items()}
                kept = []
                for seed in seeds:
                    here = {**texts, SEED: str(seed)}
                    rules = [
                        number
                        for number, rule in enumerate(left_out)
                        if all(here[name] in values for name, values in rule.items())
                    ]
                    for number in rules:
                        used[number] += 1
                    if not rules:
                        kept.append(seed)
                if not kept:
                    continue
                every.append(settings)
                extras = [*fixed, *(extra for axis, place in pairs for extra in axis.sets[place]), *over]
                try:
                    recipe, said_too = validate_text(text, source=said, name=label, extras=extras)
                except RecipeError as error:
                    for problem in error.problems:
                        wrong.setdefault(self._told(problem, said, named), []).append(settings)
                    continue
                notes |= dict.fromkeys(said_too)
                cells += [SuiteCell(settings, seed, recipe.model_copy(update={"seed": seed})) for seed in kept]
        for problem, where in wrong.items():
            told = _which(where, every, problem.key)
            self.problems.append(replace(problem, message=f"{problem.message} [{told}]") if told else problem)
        for (where_said, _), times in zip(self.exclude, used, strict=False):
            if not times and not self.problems:
                self.problem(where_said, "leaves out no cell")
        return cells, list(notes)

    def _told(self, problem: Problem, recipe: str, named: _Where) -> Problem:
        """An objection to a cell's recipe, as one to the line of the suite that said it, or to the recipe."""
        if problem.override is not None and problem.override.isdecimal():
            where, key = self.places[int(problem.override)]
            ours = problem.key in (key, "")
            message = problem.message if ours else f"{problem.key}{_after(problem.message)}"
            return Problem(
                where.key, message, where.line, where.override, problem.value if ours else None, problem.code
            )
        return Problem(f"base {recipe}", f"{problem}", named.line, named.override, None, problem.code)


def _which(some: Sequence[dict[str, Any]], every: Sequence[dict[str, Any]], key: str) -> str:
    """Which cells have a problem, in few words: what they share if that tells them apart, else the first ones.

    Nothing where it is all of them, or all that have the very value that `key` names.
    """
    shared = {name: value for name, value in some[0].items() if all(one[name] == value for one in some)}
    if sum(all(one[name] == value for name, value in shared.items()) for one in every) == len(some):
        varied = [name for name in shared if any(one[name] != shared[name] for one in every)]
        told = {name: shared[name] for name in varied if not f"{key}.".startswith(f"grid.{name}.")}
        return f"in cells with {settings_text(told)}" if told else ""
    more = f" and {len(some) - 2} more" if len(some) > 2 else ""
    return f"in {'; '.join(map(settings_text, some[:2]))}{more}"


def _after(message: str) -> str:
    return message if message.startswith(",") else f": {message}"


def _axis_raw(grid: _Grid) -> _Raw:
    variants = [value for value in grid.values if isinstance(value, _Variant)]
    if variants:
        return {_text(one.label.raw): {key: item.raw for key, item in one.keys.items()} for one in variants}
    return [value.raw for value in grid.values if isinstance(value, _Item)]


def _text(raw: _Raw) -> str:
    return raw.text if isinstance(raw, _Scalar) else _shown(raw)


def _yaml_text(whole: Mapping[str, _Raw]) -> str:
    """A suite as YAML, each value as it was written."""

    def flow(raw: _Raw) -> str:
        if isinstance(raw, dict):
            return "{" + ", ".join(f"{yaml_value(key)}: {flow(value)}" for key, value in raw.items()) + "}"
        if isinstance(raw, list):
            return "[" + ", ".join(map(flow, raw)) + "]"
        plain = not raw.quoted and raw.text and not set(raw.text) & set(",[]{}#&*!|>'\"%@`\n")
        return raw.text if plain and ": " not in raw.text else json.dumps(raw.text)

    lines = []
    for key, raw in whole.items():
        if isinstance(raw, dict):
            lines += [f"{key}:", *(f"  {yaml_value(name)}: {flow(value)}" for name, value in raw.items())]
        else:
            lines.append(f"{key}: {flow(raw)}")
    return "\n".join(lines) + "\n"


def _dotted(key: str) -> str:
    """A recipe key in full where it means one thing, else as it is."""
    from fedloom.errors import UserError

    try:
        found = find_key(key)
    except UserError:
        return key
    return f"{found}.kind" if found in BLOCKS and "kind" in BLOCKS[found].model_fields else found


def _unknown(key: str) -> str:
    """What to say about a key at the top of a suite that does not belong there."""
    near = _near(key, SuiteFile.model_fields)
    if near:
        return f"no such key, did you mean {near}?"
    if _dotted(key) != key or key in Recipe.model_fields:
        return f"no such key in a suite: a recipe's keys stand under set (set: {{{key}: ...}}) or in the grid"
    return f"no such key; a suite has {', '.join(SuiteFile.model_fields)}"


def suite_schema() -> dict[str, Any]:
    """The JSON schema of a suite file, for editors: recipe keys are completed under `set` and in the grid."""
    schema = SuiteFile.model_json_schema()
    about = {key: f"#/properties/{key}" for key in Recipe.model_fields if key not in BLOCKS}
    for block, model in BLOCKS.items():
        about |= {f"{block}.{leaf}": f"#/$defs/{model.__name__}/properties/{leaf}" for leaf in model.model_fields}
    keys = {key: {"$ref": f"recipe.schema.json{place}"} for key, place in about.items() if key not in _NOT_A_CELLS}
    blocks = {block: {"$ref": f"recipe.schema.json#/properties/{block}"} for block in BLOCKS}
    schema["$defs"]["Keys"] = {"type": "object", "properties": {**blocks, **keys}}
    variants = {"type": "object", "additionalProperties": {"$ref": "#/$defs/Keys"}}
    schema["properties"]["set"]["properties"] = {**blocks, **keys}
    schema["properties"]["grid"]["additionalProperties"] = {"anyOf": [{"type": "array"}, variants]}
    schema["properties"]["grid"]["properties"] = {
        key: {"anyOf": [{"type": "array", "items": one}, variants]} for key, one in keys.items()
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "fedloom suite"
    return schema
