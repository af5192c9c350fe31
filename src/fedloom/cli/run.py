"""`run` and `demo`."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.common import (
    WORDS,
    FormatOption,
    OutputFormat,
    Words,
    print_data,
    read_suite_words,
    read_words,
    say,
    without_data_notes,
)
from fedloom.errors import UserError

if TYPE_CHECKING:
    from fedloom.study.load import Loaded

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(context_settings=WORDS)(demo)
    app.command(context_settings=WORDS)(run)


def demo(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", show_default=False, help="Keys that replace the demo's own."),
    ] = None,
    output: FormatOption = OutputFormat.text,
) -> None:
    """See what this is for: built-in model and tasks, offline."""
    _follow_if_told()
    from fedloom.study.load import packaged_recipes

    folder = next(path for number in itertools.count(1) if not (path := Path("runs") / f"demo-{number}").exists())
    recipe = packaged_recipes().get("builtin_skills")
    if recipe is None:
        raise UserError(
            "the demo's recipe is not in this installation", "pip install --force-reinstall fedloom", "demo.missing"
        )
    said = list(words or [])
    if not any(word.replace("--", "").startswith("output_dir") for word in said):
        said.append(f"output_dir={folder}")
    _go(read_words([str(recipe), *said], "demo"), output)


def run(
    words: Words = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on with a run that was stopped or killed.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="2 clients x 1 round x 8 rows through every step, to see that all works.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, metavar="N", help="Of a suite: runs at once.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of a suite: list its runs and what they cost; as `fedloom plan`.")
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            metavar="N",
            help="Processes on this host that share each round; torchrun for several hosts.",
        ),
    ] = None,
    output: FormatOption = OutputFormat.text,
) -> None:
    """Run a recipe or a suite: plan, training, evaluation, folder."""
    _follow_if_told()
    if resume is None:
        suite = read_suite_words(words, "run")
        if suite is not None:
            if nproc is not None or "TORCHELASTIC_RUN_ID" in os.environ:
                raise UserError(
                    "this is a suite, and several processes share the work of one run",
                    "--jobs N has several runs of a suite at once",
                    "cli.option",
                )
            from fedloom.cli import suites

            if dry_run:
                suites.show_plan(suite, output, jobs=jobs)
            else:
                suites.run_suite(suite, output, jobs=jobs, smoke=smoke)
            return
        if jobs is not None or dry_run:
            option = "--dry-run" if dry_run else "--jobs"
            raise UserError(
                f"{option} is for suites, and this is a recipe of one run",
                "fedloom plan RECIPE" if dry_run else "runtime.threads=N sets the threads of one run",
                "cli.option",
            )
        _go(read_words(words, "run"), output, smoke=smoke, nproc=nproc)
        return
    if words or smoke:
        extra = (words or ["--smoke"])[0]
        raise UserError(
            f"--resume {resume} goes on with its own recipe, so {extra} has no place here",
            hint=f"fedloom run --resume {resume}    # or a new run: fedloom run {resume}/recipe.yaml output_dir=DIR",
            code="cli.resume",
        )
    from fedloom.study.folder import RunFolder

    RunFolder.look(resume)  # says which runs there are, if this is none
    _go(read_words([str(resume / "recipe.yaml")], "run"), output, resume=resume, nproc=nproc)


def _follow_if_told() -> None:
    """In a process that another one leads: do what that one asks, and leave."""
    if not {"FEDLOOM_PROCESS", "RANK"} & set(os.environ):
        return
    from fedloom.study.processes import follow_leader, follows

    if follows():
        code = follow_leader()
        sys.stderr.flush()
        os._exit(code)  # a connection on which something is still under way would keep it waiting


def _go(
    loaded: Loaded,
    output: OutputFormat,
    *,
    resume: Path | None = None,
    smoke: bool = False,
    nproc: int | None = None,
) -> None:
    from rich.console import Console

    from fedloom.cli.display import RichDisplay, print_result
    from fedloom.ops.host import imports
    from fedloom.study.folder import RunFolder

    with imports():
        from fedloom.study.run import run_recipe

    without_data_notes()  # the run says them itself
    with RichDisplay() as display:
        folder = run_recipe(
            loaded.recipe, source=loaded.source, resume=resume, smoke=smoke, display=display, nproc=nproc
        )
    result = RunFolder.look(folder).read_result()
    if result is None:
        say(f"{folder}: no result yet")
        return
    if output is OutputFormat.json:
        print_data(result)
        print_result(result, folder)
    else:
        print_result(result, folder, Console(highlight=False))
