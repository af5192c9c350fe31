"""`eval`: a run on its own test rows or on other data, and benchmark tasks on anything that answers."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedloom.cli.common import FormatOption, OutputFormat, out, print_data, relative, say, table
from fedloom.cli.models import Which, which_checkpoint
from fedloom.errors import FedloomError, UserError

if TYPE_CHECKING:
    from fedloom.evaluate.tasks.base import TaskSettings
    from fedloom.evaluate.tasks.run import TaskResult
    from fedloom.evaluate.tasks.sets import SetResult

__all__ = ["register"]

BATCH_SIZE = 16
MOST_GROUPS = 12  # lines of groups that are printed; more are in the files
STDERR = "_stderr"
_NO_SHARE = re.compile("perplexity|bits|brier|likelihood|loss")  # metrics of the harness
REASONS = {
    "too_long": "items were not asked and count as wrong: the question alone is longer than the model's positions",
    "fewer_shots": "items had fewer solved examples than meant, to fit into the model's positions",
    "cut_on_the_left": "questions lost their start, to fit into the model's positions",
    "less_room": "answers could not become as long as they may, for the model's positions",
}


class _Entry(NamedTuple):
    """One entry of --tasks."""

    task: str | None
    path: str | None  # of a task: its files; without a task: data
    optional: bool = False  # only a set names it


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
            help="Benchmarks (NAME, NAME=FILE, a set, lm_eval:NAME, lm_eval:FILE.yaml; see `fedloom ls tasks`), or "
            "for a run other data in place of its own test rows: files, folders, hub ids, builtin:NAME, named sets.",
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
    checkpoint: Which = None,
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
    if base and checkpoint is not None:
        raise UserError("--base and --checkpoint: one of them", "leave one out", "cli.usage")
    entries, set_names = _entries(tasks)
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
        from fedloom.evaluate.tasks.sets import set_result
        from fedloom.study.benchmarks import ask, kind_of, measure, open_target

        kind_of(target)
        reasons: dict[str, str] = {}  # task of a set -> why it is not measured
        asked = []
        for entry in named:
            with _optional(entry, reasons):
                asked.append((entry, ask(entry.task or "", Path(entry.path) if entry.path else None, settings)))
        if not asked:
            raise UserError("none of these tasks can be measured", "the reasons are above", "task.none")
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
                checkpoint=which_checkpoint(checkpoint),
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
            checkpoint=which_checkpoint(checkpoint),
        )
        place = folder or opened.home
        results = []
        for entry, one in asked:
            with _optional(entry, reasons), _bar(one.task.name) as on_progress:
                results.append(
                    measure(opened, one, batch_size=batch_size or BATCH_SIZE, out=place, on_progress=on_progress)
                )
        summaries = {result.name: result.summary for result in results}
        sets = [set_result(name, summaries, reasons) for name in set_names]
        if output is OutputFormat.text:
            _show(results, opened.about, output)
            for one_set in sets:
                _show_set(one_set)
        found += [{**_json(result), "model": opened.about} for result in results]
        found += [{**one_set.to_json(), "model": opened.about} for one_set in sets]
    if output is OutputFormat.json:
        print_data(found)


def _entries(tasks: str | None) -> tuple[list[_Entry], list[str]]:
    """What --tasks names, and the sets among it. A task goes before a file of the same name, and that is said."""
    from fedloom.data.catalog import CATALOG
    from fedloom.evaluate.tasks import is_task
    from fedloom.evaluate.tasks.sets import SETS, expanded_names

    if tasks is None:
        return [_Entry(None, None)], []
    found: list[_Entry] = []
    sets: list[str] = []
    for word in filter(None, map(str.strip, tasks.split(","))):
        name, mark, path = word.partition("=")
        known = is_task(name) if mark else is_task(word)
        if word in SETS:
            sets.append(word)
        elif not known and (word in CATALOG or Path(word).exists() or any(sign in name for sign in "/.:")):
            found.append(_Entry(None, word))
        else:
            if known and not mark and Path(word).exists():
                say(f"note: {word} is the benchmark; the file or folder here is ./{word}")
            found += [_Entry(task, path or None) for task in expanded_names([name])]  # or says the nearest
    named = {entry.task for entry in found}
    found += [_Entry(task, None, optional=True) for task in expanded_names(sets) if task not in named]
    if not found:
        raise UserError("--tasks names nothing", "fedloom ls tasks", "cli.usage")
    return found, sets


@contextlib.contextmanager
def _optional(entry: _Entry, reasons: dict[str, str]) -> Iterator[None]:
    """In a set a task that cannot be measured is a row that says why; by itself it is an error."""
    try:
        yield
    except FedloomError as error:
        if not entry.optional:
            raise
        reason = error.message.removeprefix(f"{entry.task}: ")
        reasons[str(entry.task)] = reason
        hint = f"\n  {error.hint}" if error.hint else ""
        say(f"note: {entry.task} is left out: {reason}{hint}")


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


def _show_set(result: SetResult) -> None:
    """A row for each scenario; the mean only where all were measured."""
    lines = [[row.scenario, row.task or "-", row.metric or "-", _value(row.metric, row.value), row.note]
             for row in result.rows]  # fmt: skip
    done = f"{result.measured} of {len(result.rows)} measured"
    mean = "no mean: that needs all of them" if result.mean is None else f"mean {_value('', result.mean)}"
    out(f"\n{result.name}: {done}, {mean}")
    out(table(lines, ("scenario", "task", "metric", "value", "note")))


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
        value = _value(name, summary[name], error)
        first = name == result.metric
        label = "  " + name.partition("/")[2] if "/" in name else name
        rows.append([result.name if first else "", label, value, f"{result.items:,}" if first else ""])
    return rows, sum("/" in name for name in summary) - len(shown)


def _value(metric: str, value: float | None, error: float | None = None) -> str:
    """A share as a percentage; anything else as it is."""
    if value is None:
        return "-"
    share = 0 <= value <= 1 and not _NO_SHARE.search(metric)
    number, of = (100 * value, 100.0) if share else (value, 1.0)
    shown = f"{number:.2f} %" if share else f"{number:.5g}"
    return shown + (f" ± {of * error:.2f}" if error is not None else "")


def _show_data(one: dict[str, Any]) -> None:
    out(f"{one['data']}: {one['rows']:,} rows, score: {one['score_name']}")
    ranked = one.get("preference_accuracy_per_client")  # of pairs of answers
    heads = ["client", "score", "loss"] + ["ranked right", "margin"] * (ranked is not None)
    rows = [["all", _share(one["score"]), _loss(one["loss"])]]
    rows += [[client, _share(value), ""] for client, value in one["score_per_client"].items()]
    if ranked is not None:
        rows[0] += [_share(one["preference_accuracy"]), _loss(one["reward_margin"])]
        rows = [rows[0], *([*row, _share(ranked[row[0]]), ""] for row in rows[1:])]
    out(table(rows if len(rows) > 2 else rows[:1], heads))


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _loss(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"
