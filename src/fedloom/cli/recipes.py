"""`validate`, `ls`, `cp`, `cat`, `schema`: recipes and names, without a model and without data."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom.cli.common import (
    WORDS,
    FormatOption,
    OutputFormat,
    Words,
    out,
    print_data,
    read_suite_words,
    read_words,
    relative,
    say,
    table,
)
from fedloom.errors import FedloomError, UserError, suggest

__all__ = ["register", "schema_comment"]

SHELVES = ("recipes", "methods", "data", "tasks", "scores", "runs")


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(context_settings=WORDS)(validate)
    app.command("ls")(list_names)
    app.command("cp")(copy)
    app.command("cat", context_settings=WORDS)(show_resolved)
    app.command()(schema)


def validate(words: Words = None, output: FormatOption = OutputFormat.text) -> None:
    """Check a recipe or a suite: all objections at once, with lines."""
    from fedloom.study.load import RecipeError

    try:
        suite = read_suite_words(words, "validate")
        if suite is not None:
            from fedloom.cli import suites

            suites.show_cells(suite, output)
            return
        loaded = read_words(words, "validate")
    except RecipeError as error:
        if output is OutputFormat.json:
            print_data({"ok": False, "problems": [problem.to_json() for problem in error.problems]})
        raise
    if output is OutputFormat.json:
        print_data({"ok": True, "problems": [], "notes": list(loaded.notes), "name": loaded.recipe.name})
    else:
        out(f"{loaded.source}: sound")
    say(f"next: fedloom plan {loaded.source}")


def list_names(
    shelf: Annotated[
        str | None, typer.Argument(metavar="[recipes|methods|data|tasks|scores|runs]", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", show_default=False, help="One data set, with all that is known.")
    ] = None,
    output: FormatOption = OutputFormat.text,
) -> None:
    """What there is: recipes, methods, data, tasks, scores, runs."""
    if shelf is not None and shelf not in SHELVES:
        raise UserError(f"ls {shelf}: no such list{suggest(shelf, SHELVES)}", "fedloom ls", "cli.argument")
    if name is not None:
        _one(shelf or "", name, output)
        return
    shown = {name: _SHELF[name]() for name in ([shelf] if shelf else SHELVES)}
    if output is OutputFormat.json:
        print_data(shown if shelf is None else shown[shelf])
        return
    for name, entries in shown.items():
        if shelf is None:
            out(f"{name}:")
        if not entries and shelf is not None:
            say(f"no {name} here" + ("; fedloom demo makes one" if name == "runs" else ""))
        elif not entries:
            out("  none yet")
        elif name == shelf == "data":
            from fedloom.cli.data_sets import show_all

            show_all(entries)
        else:
            lines = table(
                [[*(str(entry[key]) for key in ("name", "time") if key in entry), entry["about"]] for entry in entries]
            )
            out("\n".join(f"  {line}" if shelf is None else line for line in lines.splitlines()))
            if name == shelf == "tasks":
                from fedloom.data.places import data_home

                say(f"files are looked for below {data_home()} (FEDLOOM_DATA); --tasks NAME=FILE names another place")


def _recipes() -> list[dict[str, Any]]:
    from fedloom.study.load import packaged_recipes, packaged_suites

    return [{"name": name, **_about(path)} for name, path in {**packaged_recipes(), **packaged_suites()}.items()]


def _about(path: Path) -> dict[str, str]:
    """The first comment of a recipe that is prose, and the one that starts with "time:"."""
    comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    prose = [line for line in comments if line and not line.startswith("yaml-language-server")]
    time = next((line.partition(":")[2].strip() for line in prose if line.lower().startswith("time:")), "")
    about = next((line for line in prose if not line.lower().startswith("time:")), "")
    return {"time": time, "about": about}


def _methods() -> list[dict[str, Any]]:
    from fedloom.study.methods import METHOD_LINES

    return [{"name": name, "about": line} for name, line in METHOD_LINES.items()]


def _data() -> list[dict[str, Any]]:
    from fedloom.cli.data_sets import entries

    return entries()


def _one(shelf: str, name: str, output: OutputFormat) -> None:
    """One entry of a list: only data sets have more to say than their line."""
    from fedloom.cli.data_sets import facts, show

    if shelf != "data":
        raise UserError(
            f"ls {shelf} {name}: only data sets are shown one by one", "fedloom ls data NAME", "cli.argument"
        )
    known = facts(name)
    if output is OutputFormat.json:
        print_data(known)
    else:
        show(known)


def _tasks() -> list[dict[str, Any]]:
    """Benchmarks, what they measure, and where their files are or would be."""
    from fedloom.data.places import data_home
    from fedloom.evaluate.harness import is_installed
    from fedloom.evaluate.tasks import TASKS, find_task
    from fedloom.evaluate.tasks.sets import SETS, tasks_of

    found = []
    for name in TASKS:
        task = find_task(name)
        here = next((place for place in task.places if (data_home() / place).exists()), None)
        state = "here" if here is not None else "not here" if task.places else "your own"
        place = here or (task.places[0] if task.places else f"{name}=FILE")
        about = f"{task.title} ({task.metric}): {place}"
        found.append(
            {"name": name, "time": state, "about": about, "metric": task.metric, "place": place, "source": task.source}
        )
    for name, scenarios in SETS.items():
        there = ", ".join(one.task for one in scenarios if one.task is not None)
        number = f"{len(tasks_of(name))} of {len(scenarios)}"
        found.append({"name": name, "time": "a set", "about": f"{number} scenarios have a task: {there}"})
    state, way = ("installed", "") if is_installed() else ("not here", " (pip install 'fedloom[eval]')")
    for name, about in (
        ("lm_eval:NAME", "any task of the lm-evaluation-harness; NAME alone where fedloom has none of that name"),
        ("lm_eval:FILE", "a task of your own as a YAML file of the harness, or a folder of these: lm_eval:./mine.yaml"),
    ):
        found.append({"name": name, "time": state, "about": about + way})
    return found


def _scores() -> list[dict[str, Any]]:
    return [
        {"name": "exact", "about": "the answer is the reference, letter by letter but for white space at the ends"},
        {"name": "final_number", "about": 'the number after the last "the answer is", else the last number (GSM8K)'},
        {"name": "pass_at_1", "about": "the program passes hidden tests (builtin:code)"},
        {"name": "none", "about": "the loss only"},
    ]


def _runs() -> list[dict[str, Any]]:
    from fedloom.study.folder import RunFolder, find_runs, is_running

    found = []
    for path in find_runs(Path("runs")):
        folder = RunFolder.look(path)
        state, about = (
            ("running" if is_running(path) else "not finished"),
            f"go on: fedloom run --resume {relative(path)}",
        )
        result = None
        if folder.result.is_file():
            try:
                result = folder.read_result()
            except (FedloomError, OSError, ValueError):
                state, about = "damaged", "result.json cannot be read"
        if result is not None:
            state = str(result.get("status", "done"))
            arms = result.get("arms", {})
            about = ", ".join(f"{arm} {_figure(figures)}" for arm, figures in arms.items())
        found.append({"name": relative(path), "time": state, "about": about})
    return found + _suites()


def _suites() -> list[dict[str, Any]]:
    from fedloom.study.folder import is_running
    from fedloom.study.suite_result import is_suite, read_suite

    found = []
    for path in sorted(Path("runs").iterdir()) if Path("runs").is_dir() else []:
        if is_suite(path):
            try:
                suite = read_suite(path)
            except FedloomError:
                found.append({"name": relative(path), "time": "damaged", "about": "suite.json cannot be read"})
                continue
            done = sum(cell["status"] == "done" for cell in suite["cells"])
            state = "stopped" if suite["status"] == "running" and not is_running(path) else suite["status"]
            about = f"suite: {done} of {len(suite['cells'])} runs"
            found.append({"name": relative(path), "time": state, "about": about})
    return found


def _figure(figures: dict[str, Any]) -> str:
    if figures.get("score") is not None:
        return f"{100 * figures['score']:.1f} %"
    if figures.get("preference_accuracy") is not None:
        return f"ranked right {100 * figures['preference_accuracy']:.1f} %"
    return f"loss {figures['loss']:.3f}" if figures.get("loss") is not None else "-"


_SHELF = {"recipes": _recipes, "methods": _methods, "data": _data, "tasks": _tasks, "scores": _scores, "runs": _runs}


def schema_comment(destination: Path, schema: str = "recipe.schema.json") -> str:
    """The first line of a recipe written to `destination`: where editors find the keys."""
    from fedloom.study.load import packaged_schema

    there = packaged_schema().with_name(schema).resolve()
    here = destination.resolve().parent
    try:
        path = Path(os.path.relpath(there, here)).as_posix() if there.anchor == here.anchor else there.as_uri()
    except ValueError:
        path = there.as_uri()
    return f"# yaml-language-server: $schema={path}"


def copy(
    name: Annotated[str, typer.Argument(help="A recipe that comes with fedloom (fedloom ls recipes).")],
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="File or folder. Default: here.")] = None,
) -> None:
    """Copy a recipe that comes with fedloom, to change it."""
    from fedloom.study.load import is_suite_text, packaged_recipes, packaged_suites

    recipes = {**packaged_recipes(), **packaged_suites()}
    key = name.removesuffix(".yaml")
    if key not in recipes:
        raise UserError(f"no recipe {name}{suggest(key, recipes)}", "fedloom ls recipes", "recipe.missing")
    file = f"{key.rpartition('/')[2]}.yaml"
    target = destination or Path(file)
    if target.is_dir():
        target = target / file
    text = recipes[key].read_text(encoding="utf-8")
    schema = "suite.schema.json" if is_suite_text(text) else "recipe.schema.json"
    text = re.sub(r"\A# yaml-language-server:[^\n]*", lambda _: schema_comment(target, schema), text)
    write_new(target, text)
    out(relative(target))
    say(f"next: fedloom plan {relative(target)}")


def write_new(target: Path, text: str) -> None:
    """Write a file that must not be there yet.

    Raises:
        UserError: it is there, or its folder is not.
    """
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{target} exists already; nothing was written", "name another file", "file.exists") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{target.parent}: no such folder", f"mkdir -p {target.parent}", "file.folder") from error


def show_resolved(words: Words = None, output: FormatOption = OutputFormat.text) -> None:
    """Print a recipe with all defaults and its method spelt out."""
    from fedloom.study.recipe import resolved_json, resolved_yaml

    loaded = read_words(words, "cat")
    if output is OutputFormat.json:
        print_data(resolved_json(loaded.recipe))
    else:
        out(resolved_yaml(loaded.recipe).rstrip("\n"))


def schema(
    field: Annotated[str | None, typer.Option("--field", help="Only this key, dotted or flat.", metavar="KEY")] = None,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from fedloom.study.load import find_key
    from fedloom.study.recipe import BLOCKS, Recipe, json_schema

    if field is None:
        print_data(json_schema())
        return
    key = find_key(field)
    block, _, leaf = key.rpartition(".")
    whole = (BLOCKS[block] if block else Recipe).model_json_schema()
    if key in BLOCKS:
        print_data({"key": key, **BLOCKS[key].model_json_schema()})
    else:
        print_data({"key": key, **whole["properties"][leaf]})
