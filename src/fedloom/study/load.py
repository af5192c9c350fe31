"""Reading a recipe: lines, other tools' spellings, overrides, types, ranges, and every objection at once."""

from __future__ import annotations

import difflib
import logging
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from fedloom.errors import UserError
from fedloom.study.aliases import REFUSED, SAID, SAME, SAME_VALUES
from fedloom.study.methods import METHODS
from fedloom.study.objections import objections
from fedloom.study.recipe import BLOCKS, Recipe
from fedloom.study.settings import ADAPTER_DEFAULTS, GRADIENT_SETTINGS, ZEROTH_DEFAULTS

__all__ = [
    "Extra",
    "Loaded",
    "Override",
    "Problem",
    "RecipeError",
    "find_key",
    "is_suite_text",
    "locate",
    "packaged_recipes",
    "packaged_schema",
    "packaged_suites",
    "read_recipe",
    "read_text",
    "split_words",
    "validate_text",
]

logger = logging.getLogger("fedloom")


@dataclass(frozen=True)
class Problem:
    """One objection to a recipe."""

    key: str  # dotted, "" for the file as a whole
    message: str  # what follows the key in a sentence
    line: int | None = None  # of the file, from 1
    override: str | None = None  # the override that said it, in place of a line
    value: str | None = None
    code: str = "recipe.value"

    @property
    def where(self) -> str:
        if self.override is not None:
            return f"override {self.override}".rstrip()
        return f"line {self.line}" if self.line is not None else ""

    def __str__(self) -> str:
        subject = self.key if self.value is None else f"{self.key} {self.value}"
        said = f"{subject}{self.message if self.message.startswith(',') else ': ' + self.message}"
        return "  ".join(part for part in (self.where, said.removeprefix(": ")) if part)

    def to_json(self) -> dict[str, Any]:
        """For `--format json`."""
        return {
            "line": self.line,
            "override": self.override,
            "key": self.key,
            "value": self.value,
            "message": self.message.removeprefix(", "),
            "code": self.code,
        }


class RecipeError(UserError):
    """A recipe with problems; `problems` has them one by one."""

    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, name: str, problems: Sequence[Problem]) -> RecipeError:
        ordered = sorted(problems, key=lambda p: (p.override is not None, p.line is None, p.line or 0))
        count = f"{len(ordered)} problem{'s' if len(ordered) > 1 else ''}"
        lines = "\n".join(f"  {problem}" for problem in ordered)
        hint = "docs/recipe.md lists every key; `fedloom schema` prints the JSON schema"
        error = cls(f"{name}: {count}\n{lines}", hint=hint, code="recipe.invalid")
        error.problems = tuple(ordered)
        return error


@dataclass(frozen=True)
class Loaded:
    """A sound recipe, what was said about it, and the text it came from."""

    recipe: Recipe
    notes: tuple[str, ...]
    source: str  # the file as it was named
    text: str


class _Scalar(NamedTuple):
    text: str
    quoted: bool = False


_Raw = _Scalar | list[Any] | dict[str, Any]  # lists and dicts hold _Raw


class _Place(NamedTuple):
    line: int | None = None
    override: str | None = None


class _Given(NamedTuple):
    raw: _Raw
    place: _Place


# ---------------------------------------------------------------------------------------------------------------------
# The names of things

_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_SUITES = "suites/"  # the folder of those that hold several runs


def packaged_recipes() -> dict[str, Path]:
    """Recipes that come with fedloom, by name; of one in a folder the name is FOLDER/NAME."""
    return {name: path for name, path in _packaged().items() if not name.startswith(_SUITES)}


def packaged_suites() -> dict[str, Path]:
    """Suites that come with fedloom, by name: suites/NAME."""
    return {name: path for name, path in _packaged().items() if name.startswith(_SUITES)}


def _packaged() -> dict[str, Path]:
    paths = {path.relative_to(_RECIPES).with_suffix("").as_posix(): path for path in _RECIPES.rglob("*.yaml")}
    return {name: paths[name] for name in sorted(paths)}


def packaged_schema() -> Path:
    """The JSON schema's file."""
    return _RECIPES / "recipe.schema.json"


_TOP = [name for name in Recipe.model_fields if name not in BLOCKS]
_ALL = [*_TOP, *(f"{block}.{leaf}" for block, model in BLOCKS.items() for leaf in model.model_fields)]
_HOMES: dict[str, list[str]] = {}  # leaf -> the dotted keys it may mean
for _key in _ALL:
    _HOMES.setdefault(_key.rpartition(".")[2], []).append(_key)


# The key that a block means which is only a word: `adapter: lora`, as Axolotl has it, or `data: fed-dolly`.
_SHORT = {block: "kind" for block, model in BLOCKS.items() if "kind" in model.model_fields} | {"data": "path"}


def find_key(name: str) -> str:
    """The dotted key (or block) that a name means: a leaf, a dotted key, or another tool's spelling.

    Raises:
        UserError: no key has this name, or several do.
    """
    if name in BLOCKS or name in _ALL:
        return name
    if name in SAME:
        return SAME[name]
    homes = _HOMES.get(name, [])
    if len(homes) == 1:
        return homes[0]
    message = f"{name}: which one: {', '.join(homes)}?" if homes else f"{name}: {_unknown('', name)}"
    raise UserError(message, hint="docs/recipe.md lists every key", code="recipe.unknown_key")


def _annotation(key: str) -> Any:
    block, _, leaf = key.rpartition(".")
    model: type[BaseModel] = BLOCKS[block] if block else Recipe
    field = model.model_fields[leaf]
    return field.annotation


def _near(name: str, names: Iterable[str]) -> str | None:
    folded = {known.casefold().replace("-", "_"): known for known in names}
    found = difflib.get_close_matches(name.casefold().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def _unknown(block: str, leaf: str) -> str:
    """What to say about a key that does not exist."""
    if block:
        inside = list(BLOCKS[block].model_fields)
        near = _near(leaf, inside)
        if near:
            return f"no such key, did you mean {near}?"
        elsewhere = _near(leaf, _HOMES)
        if elsewhere:
            return f"no such key, did you mean {' or '.join(_HOMES[elsewhere])}?"
        return f"no such key; {block} has {', '.join(inside)}"
    near = _near(leaf, [*_TOP, *BLOCKS]) or _near(leaf, _HOMES)
    if near:
        homes = _HOMES.get(near, [near])
        return f"no such key, did you mean {near if near in homes or near in BLOCKS else ' or '.join(homes)}?"
    other = _near(leaf, SAME)
    if other:
        return f"no such key, did you mean {SAME[other]}?"
    return f"no such key; there are {', '.join([*_TOP, *BLOCKS])}"


# ---------------------------------------------------------------------------------------------------------------------
# From text to raw values with lines


def _raw(node: Any) -> _Raw:
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    if isinstance(node, MappingNode):
        return {str(key.value): _raw(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_raw(item) for item in node.value]
    return _Scalar(str(node.value), quoted=node.style in ("'", '"', "|", ">"))


def _compose(text: str) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).compose(text)


def _of_python(value: Any) -> _Raw:
    """A converted value, on its way through the same coercion as a written one."""
    if isinstance(value, (list, tuple)):
        return [_of_python(item) for item in value]
    if value is None:
        return _Scalar("null")
    if isinstance(value, bool):
        return _Scalar("true" if value else "false")
    return _Scalar(str(value), quoted=isinstance(value, str))


def _python(raw: _Raw) -> Any:
    """A raw value as plain YAML would have it, where no field says what it should be."""
    if isinstance(raw, dict):
        return {key: _python(value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_python(item) for item in raw]
    if raw.quoted:
        return raw.text
    lowered = raw.text.lower()
    if lowered in ("", "~", "null"):
        return None
    if lowered in ("true", "yes", "on"):
        return True
    if lowered in ("false", "no", "off"):
        return False
    for kind in (int, float):
        try:
            return kind(raw.text)
        except ValueError:
            continue
    return raw.text


def _shown(raw: _Raw) -> str:
    if isinstance(raw, dict):
        text = "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in raw.items()) + "}"
    elif isinstance(raw, list):
        text = "[" + ", ".join(_shown(item) for item in raw) + "]"
    else:
        text = repr(raw.text) if raw.quoted or not raw.text or raw.text != raw.text.strip() else raw.text
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Coercion by the field's type


def _options(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [option for argument in typing.get_args(annotation) for option in _options(argument)]
    if origin is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    return [annotation]


def _words(options: Sequence[Any]) -> list[str]:
    return [
        str(value) for option in options if typing.get_origin(option) is Literal for value in typing.get_args(option)
    ]


def _described(options: Sequence[Any]) -> str:
    words, names = _words(options), []
    if int in options:
        names.append("a whole number")
    if float in options:
        names.append("a number")
    if bool in options:
        names.append("true or false")
    if str in options:
        names.append("text")
    for option in options:
        if typing.get_origin(option) is list:
            inner = _words(_options(typing.get_args(option)[0]))
            names.append(f"a list of {', '.join(inner)}" if inner else "a list of names")
        if typing.get_origin(option) is dict:
            names.append("a mapping of names")
    if words:
        names.append(("one of " if len(words) > 1 and not names else "") + ", ".join(words))
    if type(None) in options and not words:
        names.append("null")
    return " or ".join(names)


_INT = re.compile(r"[+-]?\d[\d_]*")


def _coerce(raw: _Raw, annotation: Any) -> Any:
    """The value of a field of this type.

    Raises:
        ValueError: it is not of this type; the message says what is expected.
    """
    options = _options(annotation)
    expected = f"expected {_described(options)}"
    lists = [option for option in options if typing.get_origin(option) is list]
    if isinstance(raw, dict):
        if any(typing.get_origin(option) is dict for option in options):
            return {key: _coerce(value, str) for key, value in raw.items()}
        raise ValueError(expected)
    if isinstance(raw, list):
        if lists:
            inner = typing.get_args(lists[0])[0]
            return [_coerce(item, inner) for item in raw]
        raise ValueError(expected)
    text, lowered = raw.text.strip(), raw.text.strip().lower()
    words = _words(options)
    if text in words:
        return text
    empty = ("", "~", "null") if str in options else ("", "~", "null", "none", "off")
    if type(None) in options and not raw.quoted and lowered in empty:
        return None
    if bool in options:
        if lowered in ("true", "yes", "on", "1"):
            return True
        if lowered in ("false", "no", "off", "0"):
            return False
        raise ValueError(expected)
    if int in options or float in options:
        number = _number(text, whole=int in options, broken=float in options)
        if number is not None:
            return number
        if not words:
            raise ValueError(expected)
    if str in options and not (not raw.quoted and lowered in ("", "~", "null")):
        return raw.text
    if lists and not raw.quoted and text:
        inner = typing.get_args(lists[0])[0]
        return [_coerce(_Scalar(part.strip()), inner) for part in text.split(",")]
    near = _near(text, words) if text else None
    raise ValueError(expected + (f"; did you mean {near}?" if near else ""))


def _number(text: str, whole: bool, broken: bool) -> int | float | None:
    if whole and _INT.fullmatch(text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    # 1e3 steps is a whole number written otherwise; 4.0 is one only where nothing else can be meant
    if whole and number == number // 1 and abs(number) < 2**63 and ("." not in text or not broken):
        return int(number)
    return number if broken else None


# ---------------------------------------------------------------------------------------------------------------------
# Collecting what was given under the names it has here


class _Collector:
    def __init__(self) -> None:
        self.given: dict[str, _Given] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.bad: set[str] = set()  # dotted keys that were given, but not soundly
        self._late: list[tuple[str, _Raw, _Place]] = []  # rows of (b) and (c), which look at the other keys

    def problem(
        self, key: str, message: str, place: _Place, raw: _Raw | None = None, code: str = "recipe.value"
    ) -> None:
        value = None if raw is None else _shown(raw)
        self.problems.append(Problem(key, message, place.line, place.override, value, code))

    def put(self, key: str, raw: _Raw, place: _Place) -> None:
        before = self.given.get(key)
        if before is not None and place.override is None and before.place.override is None:
            self.problem(
                key,
                f"given twice, on line {before.place.line} as well: leave one of them out",
                place,
                raw,
                "recipe.twice",
            )
            return
        if isinstance(raw, dict) and before is not None and isinstance(before.raw, dict):
            raw = {**before.raw, **raw}
        self.given[key] = _Given(raw, place)

    def top(self, key: str, raw: _Raw, place: _Place) -> None:
        """A key at the top of the file, or of an override."""
        head, dot, rest = key.partition(".")
        if dot and head in BLOCKS:
            self.leaf(head, rest, raw, place)
        elif key in BLOCKS:
            self.block(key, raw, place)
        else:
            self.leaf("", key, raw, place)

    def block(self, block: str, raw: _Raw, place: _Place) -> None:
        if isinstance(raw, dict):
            for leaf, value in raw.items():
                self.leaf(block, leaf, value, place)
        elif isinstance(raw, _Scalar) and not raw.quoted and raw.text.lower() in ("", "~", "null"):
            return
        elif isinstance(raw, _Scalar) and block in _SHORT:
            self.leaf(block, _SHORT[block], raw, place)
        else:
            self.problem(block, f"expected a block of keys: {', '.join(BLOCKS[block].model_fields)}", place, raw)

    def leaf(self, block: str, leaf: str, raw: _Raw, place: _Place) -> None:
        said = f"{block}.{leaf}" if block else leaf
        home, dot, sub = said.rpartition(".")
        fields = BLOCKS[block].model_fields if block else dict.fromkeys(_TOP)
        if dot and home in ("data.columns", "evaluate.task_paths"):
            self.put(home, {sub: raw}, place)
        elif leaf in fields:
            self.put(said, raw, place)
        elif leaf in _HOMES:
            homes = _HOMES[leaf]
            if block:
                where = " or ".join(
                    f"{home.rpartition('.')[0]} ({home})" if "." in home else "the top of the recipe" for home in homes
                )
                self.problem(
                    said, f"no such key in {block}: {leaf} belongs to {where}", place, raw, "recipe.wrong_block"
                )
                self.bad.update(homes)
            elif len(homes) == 1:
                self.put(homes[0], raw, place)
            else:
                self.problem(said, f"which one: {', '.join(homes)}?", place, raw, "recipe.ambiguous")
                self.bad.update(homes)
        elif leaf in SAME:
            ours = SAME[leaf]
            if block and ours.rpartition(".")[0] != block:
                self.problem(said, f"no such key in {block}: write {ours}", place, raw, "recipe.wrong_block")
                self.bad.add(ours)
            else:
                self.put(ours, raw, place)
        elif leaf in SAID or leaf in REFUSED:
            self._late.append((leaf, raw, place))
        else:
            self.problem(said, _unknown(block, leaf), place, raw, "recipe.unknown_key")

    def late(self) -> None:
        """Rows (b) and (c) of the table of spellings, once everything else is known."""
        context = {key: _python(given.raw) for key, given in self.given.items()}
        for key, raw, place in self._late:
            value = _python(raw)
            if key in REFUSED:
                self.problem(key, REFUSED[key](value, context), place, raw, "recipe.other_meaning")
                continue
            row = SAID[key]
            try:
                made = row.convert(value, context)
            except ValueError as error:
                self.problem(key, str(error), place, raw)
                self.bad.update(row.keys)
                continue
            for ours, converted in made.items():
                self.put(ours, _of_python(converted), place)
            now = ", ".join(f"{ours}: {_shown(_of_python(converted))}" for ours, converted in made.items())
            self.notes.append(f"{key} {_shown(raw)}: {f'taken as {now} ({row.says})' if now else row.says}")

    def values(self) -> dict[str, Any]:
        """What was given, by the types of the fields; nested."""
        nested: dict[str, Any] = {}
        for key, given in self.given.items():
            raw = given.raw
            spellings = SAME_VALUES.get(key, {})
            if isinstance(raw, _Scalar) and raw.text.strip() in spellings:
                raw = _Scalar(spellings[raw.text.strip()])
            try:
                value = _coerce(raw, _annotation(key))
            except ValueError as error:
                self.problem(key, str(error), given.place, given.raw, "recipe.type")
                self.bad.add(key)
                continue
            if key == "client.max_grad_norm" and value == 0:
                value = None
                self.notes.append("client.max_grad_norm 0: taken as null, no clipping")
            block, _, leaf = key.rpartition(".")
            (nested.setdefault(block, {}) if block else nested)[leaf] = value
        return nested


# ---------------------------------------------------------------------------------------------------------------------
# Ranges, as sentences

_BOUNDS = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge"), "less_than": ("<", "lt"),
           "less_than_equal": ("<=", "le")}  # fmt: skip


def _sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for all that pydantic has against one field (a union gives one error per member)."""
    parts: list[str] = []
    for error in errors:
        kind, context = error["type"], error.get("ctx", {})
        if kind in _BOUNDS:
            sign, name = _BOUNDS[kind]
            bound = context[name]
            parts.append(f"must be {sign} {bound:g}" if isinstance(bound, float) else f"must be {sign} {bound}")
        elif kind == "missing":
            parts.append("missing")
        elif kind in ("too_short", "string_too_short"):
            parts.append("must not be empty")
        elif kind == "finite_number":
            parts.append("must be a finite number")
        elif kind == "value_error":
            parts.append(str(context.get("error", error["msg"])))
        elif kind in ("int_from_float", "int_type", "float_type", "literal_error", "list_type", "int_parsing"):
            continue  # the other member of a union says what is wrong
        else:
            parts.append(str(error["msg"]))
    return " or ".join(dict.fromkeys(parts)) or "out of range"


_EXPLAINED = {
    "model": "missing: a hub id, a folder with a model, or builtin",
    "clients_per_round": "a whole number >= 1, or a share above 0 and below 1",
    "data.val_set_size": "a share from 0 to below 1, or a whole number of rows",
    "data.test_set_size": "a share from 0 to below 1, or a whole number of rows",
}


def _checked(collector: _Collector) -> Recipe | None:
    nested = collector.values()
    for _ in range(2):  # the second time without what the first one objected to
        try:
            recipe = Recipe.model_validate(nested, context={"compose": False})
            break
        except ValidationError as invalid:
            by_key: dict[str, list[Any]] = {}
            for error in invalid.errors():
                place = [str(part) for part in error["loc"]]
                key = next((".".join(place[:depth]) for depth in (2, 1) if ".".join(place[:depth]) in _ALL), place[0])
                by_key.setdefault(key, []).append(error)
            for key, errors in by_key.items():
                block, _, leaf = key.rpartition(".")
                (nested.get(block, {}) if block else nested).pop(leaf, None)
                if key == "model":
                    nested["model"] = "?"
                if key not in collector.bad:
                    given = collector.given.get(key)
                    message = _EXPLAINED.get(key) or _sentence(errors)
                    if errors[0]["type"] == "value_error":
                        message = _sentence(errors)
                    collector.problem(key, message, given.place if given else _Place(), given.raw if given else None)
                collector.bad.add(key)
    else:
        return None
    for objection in objections(recipe):
        if collector.bad.isdisjoint(objection.keys):
            value, message = _split_value(objection.message)
            blamed = next((collector.given[key] for key in objection.keys if key in collector.given), None)
            at = blamed.place if blamed else _Place()
            collector.problems.append(
                Problem(objection.keys[0], message, at.line, at.override, value, "recipe.compose")
            )
    return recipe


def _split_value(message: str) -> tuple[str | None, str]:
    """An objection's message starts with the value: "16, but ..." or "0.5 would ..."."""
    value, comma, rest = message.partition(",")
    if comma and " " not in value:
        return value, f",{rest}"
    value, _, rest = message.partition(" would have no effect: ")
    return (value, f"would have no effect, {rest}") if rest else (None, message)


# ---------------------------------------------------------------------------------------------------------------------
# Overrides

_OVERRIDE = re.compile(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_OPTION = re.compile(r"--([A-Za-z_][\w.-]*)")
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")


class Override(NamedTuple):
    """One override: its key with underscores, its value as text, and how it was said."""

    key: str
    value: str
    said: str


def split_words(words: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Words of a command line as overrides, and the rest.

    Overrides are `k=v`, `--k=v`, `--k v`, and a lone `--k` where k is true or false. The rest are plain words (the
    recipe, say) and options without a value, in their order.
    """
    found: list[Override] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if match := _OVERRIDE.fullmatch(word):
            found.append(Override(match[1].replace("-", "_"), match[2], word))
        elif match := _OPTION.fullmatch(word):
            key = match[1].replace("-", "_")
            homes = [key] if key in _ALL else _HOMES.get(key, [])
            flag = len(homes) == 1 and _annotation(homes[0]) is bool
            if flag and not (left and left[0].lower() in _TRUTHS):
                found.append(Override(key, "true", word))
            elif left and not left[0].startswith("--"):
                found.append(Override(key, left[0], f"{word} {left.pop(0)}"))
            else:
                rest.append(word)
        else:
            rest.append(word)
    return found, rest


def _override_raw(key: str, text: str) -> _Raw:
    """The value of an override: text as it is for a field of text, YAML for all others."""
    homes = [key] if key in _ALL else _HOMES.get(key) or [SAME.get(key.rpartition(".")[2], "")]
    if homes[0] in _ALL and str in (options := _options(_annotation(homes[0]))) and len(options) <= 2:
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
            return _Scalar(text[1:-1], quoted=True)
        return _Scalar(text)
    node = _compose(text)
    return _Scalar("") if node is None else _raw(node)


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def locate(path: str | Path) -> Path:
    """The file of a recipe or a suite: a file's own name, a folder that holds one, or the name of a packaged one.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    wanted = Path(path)
    if wanted.is_dir():
        for name in ("recipe.yaml", "suite.yaml"):
            if (wanted / name).is_file():
                return wanted / name
        raise UserError(
            f"{wanted} is a folder without recipe.yaml",
            hint="name a recipe file, or a run folder",
            code="recipe.missing",
        )
    if wanted.exists():
        return wanted
    packaged = _packaged()
    if str(path) in packaged:
        return packaged[str(path)]
    beside = [str(found) for found in sorted(wanted.parent.glob("*.y*ml"))] if wanted.parent.is_dir() else []
    near = _near(wanted.name, [Path(found).name for found in beside]) or _near(
        wanted.with_suffix("").as_posix(), packaged
    )
    message = f"{path}: no such recipe" + (f", did you mean {near}?" if near else "")
    raise UserError(
        message,
        hint="fedloom ls recipes    # what there is; fedloom init DATA --model M writes one",
        code="recipe.missing",
    )


def read_text(path: Path) -> str:
    """A recipe's or suite's text.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start}",
            hint=f"iconv -f latin1 -t utf-8 {path} > fixed.yaml",
            code="recipe.encoding",
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", code="recipe.unreadable") from error


def is_suite_text(text: str) -> bool:
    """Whether a file's keys are those of a suite. Text that is no YAML is no suite."""
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.nodes import MappingNode

    try:
        root = _compose(text)
    except YAMLError:
        return False
    keys = {str(key.value) for key, _ in root.value} if isinstance(root, MappingNode) else set()
    return "suite" in keys or {"base", "grid"} <= keys


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe with what is to be said about it.

    Args:
        path: a YAML file, a run folder, or the name of a packaged recipe.
        overrides: `k=v`, `--k=v`, or `--k` followed by its value; later ones win over earlier ones and the file.

    Raises:
        RecipeError: its values are wrong; `problems` has every objection.
        UserError: the file cannot be read.
    """
    located = locate(path)
    text = read_text(located)
    if is_suite_text(text):
        raise UserError(
            f"{path} is a suite of several runs, and this takes a recipe of one",
            hint=f"fedloom validate, plan and run take suites: fedloom plan {path}",
            code="recipe.suite",
        )
    name = located.parent.name if located.name == "recipe.yaml" else located.stem
    recipe, notes = validate_text(text, overrides, source=str(path), name=name)
    for note in notes:
        logger.info(note)
    return Loaded(recipe, notes, str(path), text)


class Extra(NamedTuple):
    """A key that a suite sets on top of a recipe; objections to it are told of the override `said`."""

    key: str
    raw: _Raw
    said: str


_KIND_IS_ALL = ("adapter", "aggregate", "server")  # blocks whose other keys mean nothing to another kind


def _put_extra(collector: _Collector, extra: Extra) -> None:
    """Replace what the recipe says. Another kind of adapter, aggregate or server leaves nothing of the recipe's own."""
    homes = [extra.key] if extra.key in _ALL else _HOMES.get(extra.key) or [SAME.get(extra.key, extra.key)]
    key = homes[0] if len(homes) == 1 else extra.key
    null = isinstance(extra.raw, _Scalar) and not extra.raw.quoted and extra.raw.text.lower() in ("", "~", "null")
    if null and key in _ALL and type(None) not in _options(_annotation(key)):
        collector.given.pop(key, None)  # as if the recipe had not said it
        return
    _leave_other_kinds(collector, key, extra.raw)
    collector.top(extra.key, extra.raw, _Place(override=extra.said))


def _leave_other_kinds(collector: _Collector, key: str, raw: _Raw) -> list[str]:
    """Drop what the recipe itself says of another kind of adapter, aggregate or server; the keys that were dropped.

    What kinds of adapters have in common (lora and dora) stays. A method without gradients leaves out what the recipe
    says of steps along gradients, and one with an adapter of its own the recipe's adapter.
    """
    mine = [k for k, given in collector.given.items() if given.place.override is None]
    before = collector.given.get(key)
    if key == "method" and isinstance(raw, _Scalar):
        if before is not None and isinstance(before.raw, _Scalar) and before.raw.text == raw.text:
            return []
        slots = METHODS.get(raw.text, {})
        of_gradients = slots.get("client", {}).get("kind") in ZEROTH_DEFAULTS
        keys = [
            k
            for k in mine
            if (of_gradients and k in GRADIENT_SETTINGS) or ("adapter" in slots and k.startswith("adapter."))
        ]
        for other in keys:
            del collector.given[other]
        return keys
    block, _, leaf = key.rpartition(".")
    if block not in _KIND_IS_ALL or leaf != "kind" or not isinstance(raw, _Scalar):
        return []
    was = before.raw if before is not None else _Scalar(str(BLOCKS[block].model_fields["kind"].default))
    if not isinstance(was, _Scalar) or was.text == raw.text:
        return []
    kept = {f"{block}.{setting}" for setting in ADAPTER_DEFAULTS.get(raw.text, {})} if block == "adapter" else {""}
    keys = [k for k in mine if k.startswith(f"{block}.") and k not in kept]
    for other in keys:
        del collector.given[other]
    return [other for other in keys if other != key]


def validate_text(
    text: str,
    overrides: Sequence[str] = (),
    *,
    source: str = "recipe",
    name: str = "run",
    extras: Sequence[Extra] = (),
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe in `text`, and the notes on other spellings. `extras` come after it and before the overrides.

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
    if root is None:
        raise RecipeError.of(
            source, [Problem("", "empty: fedloom init DATA --model M writes one", code="recipe.empty")]
        )
    if not isinstance(root, MappingNode):
        raise RecipeError.of(source, [Problem("", "expected keys and values at the top", 1, code="recipe.syntax")])

    collector = _Collector()
    if not any(key.value in ("name", "run_name") for key, _ in root.value):
        collector.given["name"] = _Given(_Scalar(name, quoted=True), _Place(override="name"))
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen and key in BLOCKS:
            collector.problem(key, f"given twice, on line {seen[key]} as well", _Place(line), code="recipe.twice")
        seen.setdefault(key, line)
        if key in BLOCKS and isinstance(value_node, MappingNode):
            for leaf_node, leaf_value in value_node.value:
                collector.leaf(key, str(leaf_node.value), _raw(leaf_value), _Place(leaf_node.start_mark.line + 1))
        else:
            collector.top(key, _raw(value_node), _Place(line))
    for extra in extras:
        _put_extra(collector, extra)
    found, rest = split_words(overrides)
    for word in rest:
        collector.problem(word, "expected key=value or --key value", _Place(override=""), code="recipe.override")
    for override in found:
        place = _Place(override=override.said)
        try:
            raw = _override_raw(override.key, override.value)
        except MarkedYAMLError as error:
            message = f"not YAML: {error.problem or error.context}"
            collector.problem(override.key, message, place, _Scalar(override.value))
            continue
        left = _leave_other_kinds(collector, override.key, raw)
        if left:
            collector.notes.append(f"{override.said}: without the recipe's {', '.join(left)}, which are another kind's")
        collector.top(override.key, raw, place)
    collector.late()
    recipe = _checked(collector)
    if collector.problems:
        raise RecipeError.of(source, collector.problems)
    assert recipe is not None
    return recipe, tuple(collector.notes)
