"""`eval`: a run on its own test rows or on other data, and benchmark tasks on anything that answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedloom.cli.common import FormatOption, OutputFormat, out, print_data, relative, say, table
from fedloom.errors import UserError

if TYPE_CHECKING:
    from fedloom.evaluate.tasks.base import TaskSettings
    from fedloom.evaluate.tasks.run import TaskResult

__all__ = ["register"]

BATCH_SIZE = 16
MOST_GROUPS = 12  # lines of groups that are printed; more are in the files
STDERR = "_stderr"
REASONS = {
    "too_long": "items were not asked and count as wrong: the question alone is longer than the model's positions",
    "fewer_shots": "items had fewer solved examples than meant, to fit into the model's positions",
    "less_room": "answers could not become as long as they may, for the model's positions",
}


class _Entry(NamedTuple):
    """One entry of --tasks."""

    task: str | None
    path: str | None  # of a task: its files; without a task: data


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("eval")(evaluate)


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="A run folder, a PEFT adapter folder, or a model: a folder, a hub id, builtin.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Benchmarks (NAME or NAME=FILE, see `fedloom ls tasks`), or for a run other data in place of its own "
            "test rows: files, folders, hub ids, builtin:NAME.",
            metavar="TASK,...",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first items of each group; of data, rows per client.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples. Default: the task's.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows in one pass. Default: 16; of data the recipe's.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: the task's.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers per item. Default: the task's.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    extra: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A task's own setting; may be repeated.", show_default=False),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The untouched base in place of the tuned model.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="M", help="The base, where it now lies elsewhere.", show_default=False),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.", show_default=False)] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="auto, alpaca or tokenizer. Default: the recipe's.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run a model's own code.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch. Default: the recipe's, else all cores.", show_default=False)
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="Of data: auto, none, exact, final_number or pass_at_1.", show_default=False),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="For items and summaries. Default: RUN/eval.", show_default=False),
    ] = None,
    rescore: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Judge the answers in a file of items again.", show_default=False),
    ] = None,
    output: FormatOption = OutputFormat.text,
) -> None:
    """Score a run again, or ask benchmarks of a run or a model."""
    if rescore is not None:
        if target is not None or tasks is not None:
            raise UserError("--rescore takes a file and no model", f"fedloom eval --rescore {rescore}", "cli.usage")
        from fedloom.study.benchmarks import score_again

        again = score_again(rescore, folder)
        _show([again], {"target": str(rescore)}, output)
        return
    if target is None:
        raise UserError("eval needs a run or a model", "fedloom eval runs/NAME --tasks gsm8k", "cli.missing_argument")
    entries = _entries(tasks)
    data = [entry.path for entry in entries if entry.task is None]
    named = [entry for entry in entries if entry.task is not None]
    from fedloom.evaluate.tasks.base import TaskSettings

    settings = TaskSettings(num_fewshot, limit, max_new_tokens, samples, seed, _pairs(extra))
    if data:
        _refuse_for_data(
            settings,
            target,
            data,
            dtype=dtype,
            model=model,
            chat_template=chat_template,
            folder=folder,
            trust_remote_code=trust_remote_code or None,
        )
    if score is not None and not data:
        raise UserError("--score is for data: a benchmark brings its own", "leave --score out", "cli.usage")
    found: list[dict[str, Any]] = []
    if named:
        # Everything is read before a model is loaded.
        from fedloom.study.benchmarks import ask, kind_of, measure, open_target

        kind_of(target)
        asked = [ask(entry.task or "", Path(entry.path) if entry.path else None, settings) for entry in named]
    if data:
        from fedloom.study.tuned import evaluate_run

        for path in data:
            done = evaluate_run(
                Path(target),
                data=path,
                base_only=base,
                limit=limit,
                score=score,
                batch_size=batch_size,
                threads=threads,
            )
            found.append({"data": done.data, "score_name": done.score_name, "rows": done.rows, **done.outcome})
            if output is OutputFormat.text:
                _show_data(found[-1])
    if named:
        opened = open_target(
            target,
            base_only=base,
            model=model,
            dtype=dtype,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
            threads=threads,
        )
        place = folder or opened.home
        results = []
        for one in asked:
            with _bar(one.task.name) as on_progress:
                results.append(
                    measure(opened, one, batch_size=batch_size or BATCH_SIZE, out=place, on_progress=on_progress)
                )
        if output is OutputFormat.text:
            _show(results, opened.about, output)
        found += [{**_json(result), "model": opened.about} for result in results]
    if output is OutputFormat.json:
        print_data(found)


def _entries(tasks: str | None) -> list[_Entry]:
    """What --tasks names: a task's name goes before a file of the same name, and that is said."""
    from fedloom.evaluate.tasks import find_task, is_task

    if tasks is None:
        return [_Entry(None, None)]
    found = []
    for word in filter(None, map(str.strip, tasks.split(","))):
        name, mark, path = word.partition("=")
        if mark and is_task(name):
            found.append(_Entry(name, path))
        elif is_task(word):
            if Path(word).exists():
                say(f"note: {word} is the benchmark; the file or folder here is ./{word}")
            found.append(_Entry(word, None))
        elif Path(word).exists() or any(sign in name for sign in "/.:"):
            found.append(_Entry(None, word))
        else:
            find_task(name)  # says the nearest
            found.append(_Entry(name, path or None))
    if not found:
        raise UserError("--tasks names nothing", "fedloom ls tasks", "cli.usage")
    return found


def _pairs(words: Sequence[str] | None) -> dict[str, str]:
    found = {}
    for word in words or ():
        key, mark, value = word.partition("=")
        if not mark or not key:
            raise UserError(f"--set {word}: expected KEY=VALUE", "--set exemplars=FILE", "cli.usage")
        found[key] = value
    return found


def _refuse_for_data(settings: TaskSettings, target: str, data: Sequence[str | None], **given: Any) -> None:
    """Say which options have no meaning for data, and that only a run knows how to read it."""
    names = {"folder": "out"}
    unused = [names.get(name, name).replace("_", "-") for name, value in given.items() if value is not None]
    unused += [
        name.replace("_", "-")
        for name in ("num_fewshot", "max_new_tokens", "samples")
        if getattr(settings, name) is not None
    ]
    unused += ["set"] if settings.extra else []
    if unused:
        raise UserError(
            f"--{unused[0]} is for benchmarks, not for {data[0] or 'the run itself'}",
            f"--tasks exact={data[0] or 'FILE'} asks a file as a benchmark",
            "cli.usage",
        )
    from fedloom.study.benchmarks import kind_of

    kind = kind_of(target)
    if kind != "run":
        raise UserError(
            f"{target} is {'a model' if kind == 'model' else 'an adapter'} and has no test rows of its own; "
            "what is to be asked?",
            f"fedloom eval {target} --tasks gsm8k    # or exact={data[0] or 'FILE'}; see `fedloom ls tasks`",
            "eval.tasks",
        )


# ---- what is shown ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar where a person looks on, else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedloom.cli.display import stderr_console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as progress:
        bars: dict[str, Any] = {}

        def show(done: int, total: int, what: str) -> None:
            if what not in bars:
                bars[what] = progress.add_task(f"{name}: {what}", total=total)
            progress.update(bars[what], completed=done, total=total)

        yield show


def _json(result: TaskResult) -> dict[str, Any]:
    shown = result.to_json()
    return {"task": shown.pop("name"), "score": result.score, **shown}


def _show(results: Sequence[TaskResult], about: dict[str, Any], output: OutputFormat) -> None:
    if output is OutputFormat.json:
        print_data([_json(result) for result in results])
        return
    lines: list[list[str]] = []
    notes: list[str] = []
    for result in results:
        shown, more = _lines(result)
        lines += shown
        notes += [f"{result.name}: {count:,} {REASONS.get(reason, reason)}"
                  for reason, count in {**result.skipped, **result.notes}.items()]  # fmt: skip
        if more:
            notes.append(f"{result.name}: {more} more groups are in " + (_file(result, ".json") or "--format json"))
    out(table(lines, ("task", "metric", "value", "items")))
    for note in notes:
        say(f"note: {note}")
    files = [_file(result) for result in results]
    if any(files):
        say(f"items: {', '.join(file for file in files if file)}")
    else:
        say("nothing was kept: --out DIR keeps what was asked and answered")


def _file(result: TaskResult, suffix: str = ".jsonl") -> str:
    return relative(result.file.with_suffix(suffix)) if result.file is not None else ""


def _lines(result: TaskResult) -> tuple[list[list[str]], int]:
    """Rows of the table, the task's own metric first, and how many groups are not among them."""
    summary = result.summary
    plain = [name for name in summary if "/" not in name and not name.endswith(STDERR)]
    groups = [name for name in summary if name.count("/") == 1]
    shown = groups if len(groups) <= MOST_GROUPS else []
    ordered = [result.metric, *(name for name in plain if name != result.metric), *shown]
    rows = []
    for name in ordered:
        error = summary.get(name + STDERR)
        value = f"{100 * summary[name]:.2f} %" + (f" ± {100 * error:.2f}" if error is not None else "")
        first = name == result.metric
        label = "  " + name.partition("/")[2] if "/" in name else name
        rows.append([result.name if first else "", label, value, f"{result.items:,}" if first else ""])
    return rows, sum("/" in name for name in summary) - len(shown)


def _show_data(one: dict[str, Any]) -> None:
    out(f"{one['data']}: {one['rows']:,} rows, score: {one['score_name']}")
    rows = [["all", _share(one["score"]), _loss(one["loss"])]]
    rows += [[client, _share(value), ""] for client, value in one["score_per_client"].items()]
    out(table(rows if len(rows) > 2 else rows[:1], ("client", "score", "loss")))


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _loss(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"
