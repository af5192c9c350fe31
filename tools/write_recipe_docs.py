"""Write docs/recipe.md and the schemas in recipes/ from the models of recipes and suites. Run it after a key changes.

python tools/write_recipe_docs.py
"""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedloom.study.aliases import REFUSED, SAID, SAME, SAME_VALUES
from fedloom.study.methods import METHOD_LINES, METHODS
from fedloom.study.recipe import BLOCKS, Recipe, json_schema
from fedloom.study.settings import SERVER_OPTIM_DEFAULTS
from fedloom.study.suite import suite_schema
from fedloom.study.yaml_text import yaml_value

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = """# The recipe

Written by `tools/write_recipe_docs.py` from the models in `src/fedloom/study/blocks.py` and `recipe.py`; change those.

A recipe is a YAML file. Everything but `model`, `data.path` and one of `local_steps` and `local_epochs` has a default;
`fedloom cat RECIPE` prints a recipe with all of them, `fedloom validate RECIPE` says everything that is wrong with it
at once, each with its line.

- **Blocks**: keys stand in their block (`client: {learning_rate: 2e-4}`). Names are unique, so a key may also stand
  flat at the top (`learning_rate: 2e-4`), but for `kind` and `limit`, which several blocks have, and `data.name`: a
  flat `name` is the run's. A key in a wrong block is an error that names the right one. A block that is only a word
  means its `kind`, and `data: fed-dolly` means `data.path`.
- **On the command line**: `client.learning_rate=1e-4`, `learning_rate=1e-4`, `--client.learning_rate 1e-4` and
  `--learning-rate 1e-4` are the same. What comes later wins.
- **Values** are read by the type of their key: `2e-4` is a number, `no` is false where true or false is expected and a
  word elsewhere, `q_proj,v_proj` is a list where a list is expected.
- **A setting without effect is an error**: `momentum` with `optim: adamw`, `server_tau` with `server.kind: replace`.
- **Unknown keys are errors** and name the nearest one.
"""


def type_of(annotation: Any) -> str:
    """A field's type in words."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_of(argument) for argument in arguments))
    if origin is typing.Annotated:
        return type_of(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        inner = type_of(arguments[0])
        return f"list of {inner}" if inner != "text" else "list of names"
    if origin is dict:
        return "mapping of names"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "`null`"}
    return names[annotation]


def bounds_of(field: FieldInfo) -> str:
    """What a field's value is held to, as signs."""
    found: list[str] = []
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

    def visit(annotation: Any, metadata: Any) -> None:
        own = [f"{sign} {getattr(rule, name):g}" for rule in metadata for name, sign in signs.items()
               if getattr(rule, name, None) is not None and getattr(rule, name) < 2**63]  # fmt: skip
        if own:
            found.append(" and ".join(own))
        for argument in typing.get_args(annotation):
            if typing.get_origin(argument) is typing.Annotated:
                inner = typing.get_args(argument)
                rules = [
                    rule for item in inner[1:] for rule in (item.metadata if isinstance(item, FieldInfo) else [item])
                ]
                visit(inner[0], rules)

    visit(field.annotation, field.metadata)
    return ", or ".join(dict.fromkeys(found))


def default_of(field: FieldInfo) -> str:
    """A field's default as it would be written, empty where there is none to write."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value == "":
        return ""
    return f"`{yaml_value(value)}`"


def table(model: type[BaseModel], leave_out: frozenset[str] = frozenset()) -> list[str]:
    """The keys of a model as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        if key in leave_out:
            continue
        bounds = bounds_of(field)
        kind = type_of(field.annotation) + (f" ({bounds})" if bounds else "")
        lines.append(f"| `{key}` | {kind} | {default_of(field)} | {field.description} |".replace("||", "|"))
    return lines


def document() -> str:
    """docs/recipe.md."""
    lines = [INTRODUCTION, "## At the top", "", *table(Recipe, frozenset(BLOCKS)), ""]
    for block, model in BLOCKS.items():
        about = Recipe.model_fields[block].description
        lines += [f"## `{block}`", "", str(about), "", *table(model), ""]
    lines += ["## What a method stands for", "", "| method | keys | |", "|---|---|---|"]
    for method, slots in METHODS.items():
        keys = {f"{slot}.{key}": value for slot, settings in slots.items() for key, value in settings.items()}
        optim = keys.get("server.server_optim")
        if optim is not None:
            keys |= {f"server.{key}": value for key, value in SERVER_OPTIM_DEFAULTS[optim].items()}
        shown = ", ".join(f"`{key}: {yaml_value(value)}`" for key, value in keys.items())
        lines.append(f"| `{method}` | {shown} | {METHOD_LINES[method]} |")
    lines += ["", "An explicit key replaces what the method says.", "", "## Other tools' spellings", ""]
    lines += ["Taken for the same:", "", "| spelling | here |", "|---|---|"]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, ours in SAME.items()]
    lines += [
        f"| `{key}: {theirs}` | `{key}: {ours}` |" for key, row in SAME_VALUES.items() for theirs, ours in row.items()
    ]
    lines += ["", "Taken, and said what was made of it:", "", "| spelling | here |", "|---|---|"]
    lines += [
        f"| `{theirs}` | {', '.join(f'`{key}`' for key in row.keys) or '-'}: {row.says} |"
        for theirs, row in SAID.items()
    ]
    lines += ["", "Refused, since the word means something else here:", "", "| spelling | why |", "|---|---|"]
    lines += [f"| `{theirs}` | {why(None, {})} |" for theirs, why in REFUSED.items()]
    return "\n".join(lines) + "\n"


def schema_text() -> str:
    """recipes/recipe.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def suite_schema_text() -> str:
    """recipes/suite.schema.json."""
    return json.dumps(suite_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "recipe.md").write_text(document(), encoding="utf-8")
    (ROOT / "recipes" / "recipe.schema.json").write_text(schema_text(), encoding="utf-8")
    (ROOT / "recipes" / "suite.schema.json").write_text(suite_schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
