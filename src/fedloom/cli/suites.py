"""What a person sees of a suite: its cells, its plan, how it goes on, its table."""

from __future__ import annotations

import datetime
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.cli.common import OutputFormat, out, print_data, relative, say, table
from fedloom.errors import FedloomError, UserError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.table import Table

    from fedloom.study.suite import Suite
    from fedloom.study.suite_result import Comparison, SuiteResult
    from fedloom.study.suite_run import Job
    from fedloom.study.suite_table import Group

__all__ = ["print_suite", "run_suite", "show_cells", "show_plan"]

MOST_LINES = 60  # of a list of cells


def show_cells(suite: Suite, output: OutputFormat) -> None:
    """`validate`: every cell of a sound suite, without model and data."""
    cells = [
        {"settings": dict(cell.settings), "seed": cell.seed, "arms": list(cell.recipe.arms)} for cell in suite.cells
    ]
    if output is OutputFormat.json:
        print_data({"ok": True, "problems": [], "notes": list(suite.notes), "name": suite.name, "cells": cells})
    else:
        groups: dict[str, list[Any]] = {}
        for cell in suite.cells:
            groups.setdefault(repr(dict(cell.settings)), []).append(cell)
        rows = [
            [*_texts(group[0].settings), ", ".join(str(cell.seed) for cell in group), ", ".join(group[0].recipe.arms),
             _said_time(suite.bases.get(str(group[0].settings.get("recipe")), ""))]
            for group in groups.values()
        ]  # fmt: skip
        out(_cut(table(rows, [*suite.settings, "seeds", "arms", "one run takes"])))
        out(f"{suite.source}: sound; {len(suite.cells)} runs in {relative(suite.output_dir)}")
    say(f"next: fedloom plan {suite.source}")


def _texts(settings: Mapping[str, Any]) -> list[str]:
    from fedloom.study.suite import value_text

    return [value_text(value) for value in settings.values()]


def _cut(text: str) -> str:
    lines = text.splitlines()
    return "\n".join([*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else lines)


def _said_time(text: str) -> str:
    """What a recipe's comment says of its time."""
    lines = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("time:")), "")


def show_plan(suite: Suite, output: OutputFormat, *, jobs: int | None = None, probe: bool = True) -> None:
    """`plan`, and `run --dry-run`: what each choice of settings costs, and what is done already.

    Raises:
        UserError: some cells cannot be run; every reason is named.
    """
    from fedloom.study.progress import amount, byte_text, duration
    from fedloom.study.suite_plan import plan_suite

    planned = plan_suite(suite, jobs=jobs, probe=probe)
    if output is OutputFormat.json:
        print_data({"name": suite.name, "runs": [group.to_json() for group in planned.groups], "jobs": planned.jobs,
                    "threads": planned.threads, "seconds": planned.seconds})  # fmt: skip
    else:
        rows = []
        for group in planned.groups:
            report = group.report or {}
            length = "–" if group.seconds is None else duration(group.seconds) + ("" if group.measured else " training")
            rows.append([
                *_texts(group.settings),
                ", ".join(map(str, group.seeds)),
                f"{len(group.done)} of {len(group.seeds)}",
                amount(report["tokens"]["train"]) if report else "–",
                byte_text(report["bytes_up_per_client_round"]) if report else "–",
                byte_text(report["peak_memory_bytes"]) if report else "–",
                length,
            ])  # fmt: skip
        out(_cut(table(rows, [*suite.settings, "seeds", "done", "tokens", "up", "memory", "time of a run"])))
        left = sum(len(group.seeds) - len(group.done) for group in planned.groups)
        at_once = f"{planned.jobs} at once, {planned.threads} thread{'s' * (planned.threads > 1)} each"
        if planned.seconds is not None:
            what = "" if all(group.measured or not group.seconds for group in planned.groups) else (
                " of training; evaluation and loading come on top")  # fmt: skip
            out(f"{left} runs to do, {at_once}: about {duration(planned.seconds)}{what}")
        else:
            out(f"{left} runs to do, {at_once}")
        minutes = suite.limits.minutes
        if minutes is not None and planned.seconds is not None and planned.seconds > 60 * minutes:
            say(f"note: limits.minutes is {minutes:g}, so it will stop before its end; the next call goes on")
    if planned.problems:
        shown = "\n".join(f"  {problem}" for problem in planned.problems)
        raise UserError(f"{suite.source}: {len(planned.problems)} of its settings cannot be run\n{shown}",
                        code="suite.cells")  # fmt: skip
    say(f"next: fedloom run {suite.source}")


def run_suite(suite: Suite, output: OutputFormat, *, jobs: int | None = None, smoke: bool = False) -> None:
    """`run`: what is not done yet, then the table."""
    from rich.console import Console

    from fedloom.study import suite_run

    folder = suite.output_dir if not smoke else suite.output_dir.with_name(f"{suite.output_dir.name}-smoke")
    try:
        with SuiteDisplay() as display:
            result = suite_run.run_suite(suite, jobs=jobs, smoke=smoke, display=display)
    except FedloomError as error:
        if error.code == "suite.failed":  # what there is, is shown
            _finish(suite, folder, output)
        raise
    del result
    _finish(suite, folder, output, Console(highlight=False) if output is OutputFormat.text else None)


def _finish(suite: Suite, folder: Path, output: OutputFormat, console: Console | None = None) -> None:
    from fedloom.study.suite_result import read_suite

    result = read_suite(folder)
    if output is OutputFormat.json:
        print_data(result)
    print_suite(result, folder, console)


# ---- while it runs ---------------------------------------------------------------------------------------------------


class SuiteDisplay:
    """A live table of what runs, under a line for each event; off a terminal the lines alone."""

    def __init__(self, console: Console | None = None) -> None:
        from fedloom.cli.display import stderr_console

        self.console = console or stderr_console()
        self.jobs: Sequence[Job] = ()
        self.started = time.monotonic()
        self._live: Live | None = None

    def say(self, text: str) -> None:
        from rich.text import Text

        from fedloom.cli.display import _printable

        self.console.print(Text(_printable(text)), soft_wrap=not self.console.is_terminal)

    def draw(self, jobs: Sequence[Job], started: float) -> None:
        self.jobs, self.started = jobs, started
        if self.console.is_terminal and self._live is None:
            from rich.live import Live

            self._live = Live(_Lines(self), console=self.console, refresh_per_second=2, transient=True)
            self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> SuiteDisplay:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


class _Lines:
    def __init__(self, display: SuiteDisplay) -> None:
        self.display = display

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        from fedloom.cli.display import _printable

        yield Text(status_text(self.display.jobs, time.monotonic() - self.display.started), style="bold")
        for job in self.display.jobs:
            if job.process is not None:
                yield Text(_printable(f"  {job_text(job)}"), no_wrap=True, overflow="ellipsis")


def status_text(jobs: Sequence[Job], elapsed: float) -> str:
    """How a suite stands: `7/27 done · 2 running · 3 min 10 s elapsed · about 12 min 00 s left, ends 14:10`."""
    from fedloom.study.progress import duration

    counts = {status: sum(job.status == status for job in jobs) for status in ("done", "running", "failed")}
    parts = [f"{counts['done']}/{len(jobs)} done", f"{counts['running']} running"]
    parts += [f"{counts['failed']} failed"] * bool(counts["failed"])
    parts.append(f"{duration(elapsed)} elapsed")
    left = seconds_left(jobs)
    if left is not None:
        end = datetime.datetime.now() + datetime.timedelta(seconds=left)
        far = end.date() != datetime.date.today()
        parts.append(f"about {duration(left)} left, ends {end:%a %H:%M}" if far else
                     f"about {duration(left)} left, ends {end:%H:%M}")  # fmt: skip
    return " · ".join(parts)


def seconds_left(jobs: Sequence[Job]) -> float | None:
    """Of all that is not done, with as many at once as now, by the runs that are; None before the first one is."""
    from fedloom.study.suite_plan import known_seconds

    known = known_seconds(jobs)
    running = [job for job in jobs if job.process is not None]
    if not known or not running:
        return None
    usual = math.fsum(known.values()) / len(known)
    left = [max(0.0, known.get(job.group, usual) - job.elapsed) for job in jobs if job.status in ("waiting", "running")]
    return max(math.fsum(left) / len(running), max(left, default=0.0))


def job_text(job: Job) -> str:
    """`builtin_code, lora, seed 1 · federated round 12/30 · val 0.512 · 47.9 s`."""
    from fedloom.study.progress import duration

    parts = [job.cell.label]
    line = job.progress
    if line.get("rounds"):
        parts.append(f"{line['arm']} round {line['round']}/{line['rounds']}")
    elif line:
        parts.append(str(line["arm"]))
    else:
        parts.append("loading")
    if line.get("val_loss") is not None:
        parts.append(f"val {line['val_loss']:.3f}")
    parts.append(duration(job.elapsed))
    return " · ".join(parts)


# ---- the table -------------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    heading: str
    cell: Callable[[Group], str]
    rank: int  # the column with the highest goes first when the terminal is narrow


def print_suite(suite: SuiteResult, folder: Path, console: Console | None = None) -> None:
    """Print the table of a suite, the differences and what to do next; on standard error by default."""
    from rich.console import Console
    from rich.text import Text

    from fedloom.cli.display import stderr_console
    from fedloom.study.suite_table import COMPARISONS, grouped

    console = console or stderr_console()
    wide = console if console.is_terminal else Console(file=console.file, force_terminal=False, width=240)
    for comparison, title in COMPARISONS.items():
        if grouped(suite, comparison):
            wide.print()
            wide.print(Text(f"scores {title}" if comparison == "rounds" else f"the same {title}", style="bold"))
            wide.print(_scores(suite, comparison, wide.width))
    for comparison, title in COMPARISONS.items():
        for by, shown in _differences(suite, comparison):
            wide.print()
            what = "arms" if by == "arm" else f"values of {by}"
            wide.print(Text(f"differences between {what} {title}", style="bold"))
            wide.print(shown)
    wide.print()
    for note in suite["notes"]:
        wide.print(Text(note, style="dim"), soft_wrap=not console.is_terminal)
    for cell in suite["cells"]:
        if cell["status"] == "failed":
            text = f"failed: {', '.join(_texts(cell['settings']))}, seed {cell['seed']}: {cell.get('reason', '')}"
            wide.print(Text(text, style="yellow"), soft_wrap=True)
    wide.print()
    names = [name for name in ("report.html", "table.md", "table.csv", "suite.json") if (folder / name).is_file()]
    wide.print(Text(f"written: {', '.join(str(folder / name) for name in names)}"), soft_wrap=True)
    wide.print(Text("next:"))
    wide.print(Text(f"  fedloom report {folder}"), soft_wrap=True)


def _scores(suite: SuiteResult, comparison: Comparison, width: int) -> Table:
    from rich.console import Console

    from fedloom.study.suite_table import COMPARISONS, cost_text, grouped, mean_text

    del COMPARISONS
    groups = grouped(suite, comparison)
    columns = []
    for rank, metric in enumerate(suite["metrics"]):
        if any(metric["name"] in group.metrics for group in groups):

            def cell(group: Group, metric: Any = metric) -> str:
                row = group.metrics.get(metric["name"])
                return "–" if row is None else mean_text(metric, row["mean"], row["std"])

            columns.append(_Column(metric["title"], cell, 0 if rank == 0 else 10 + 2 * rank))
    columns.append(_Column("n", lambda group: group.n, 1))
    if comparison == "rounds":
        for rank, (key, heading) in enumerate(_SHOWN_COSTS.items()):
            if any(group.costs.get(key) for group in groups):

                def cost(group: Group, key: str = key) -> str:
                    return cost_text(key, group.costs[key]) if group.costs.get(key) else "–"

                columns.append(_Column(heading, cost, 11 + 2 * rank))
    unbounded = Console(width=10_000, file=io.StringIO())
    while True:
        shown = _table(suite, groups, columns)
        if len(columns) <= 2 or unbounded.measure(shown).maximum <= width:
            return shown
        columns.remove(max(columns, key=lambda column: column.rank))


_SHOWN_COSTS = {
    "bytes_up_per_client_round": "up",
    "train_seconds": "training",
    "peak_memory_bytes": "memory",
    "trainable_share": "trained",
    "tokens_per_second": "tok/s",
    "flops": "FLOP",
    "evaluate_seconds": "evaluation",
    "bytes_down_per_client_round": "down",
    "communication_seconds": "messages",
}


def _table(suite: SuiteResult, groups: Sequence[Group], columns: Sequence[_Column]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from fedloom.study.suite import value_text
    from fedloom.study.suite_table import varied

    names = varied(suite)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    for name in (*names, "arm"):
        shown.add_column(escape(name), no_wrap=True)
    for column in columns:
        shown.add_column(column.heading, justify="right", no_wrap=True)
    last: list[str] = []
    for group in groups:
        texts = [value_text(group.settings[name]) for name in names]
        first = [escape(text) if texts != last else "" for text in texts]
        if last and texts != last:
            shown.add_section()
        last = texts
        shown.add_row(*first, escape(group.arm), *(column.cell(group) for column in columns))
    return shown


def _differences(suite: SuiteResult, comparison: Comparison) -> list[tuple[str, Table]]:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from fedloom.study.suite import value_text
    from fedloom.study.suite_table import difference_text, varied

    metrics = {metric["name"]: metric for metric in suite["metrics"]}
    found = []
    for by in dict.fromkeys(one["by"] for one in suite["differences"]):
        wanted = [one for one in suite["differences"] if one["by"] == by and one["comparison"] == comparison]
        if not wanted:
            continue
        names = [name for name in varied(suite) if name != by]
        known = [name for name in metrics if any(one["metric"] == name for one in wanted)]
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
        for name in (*names, *(["arm"] if by != "arm" else []), "difference"):
            shown.add_column(escape(name), no_wrap=True)
        for name in known:
            shown.add_column(escape(metrics[name]["title"]), justify="right", no_wrap=True)
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        for one in wanted:
            place = (*(value_text(one["settings"][name]) for name in names),
                     *([one.get("arm", "")] if by != "arm" else []), f"{one['a']} − {one['b']}")  # fmt: skip
            lines.setdefault(place, {})[one["metric"]] = difference_text(metrics[one["metric"]], one)
        for place, cells in lines.items():
            shown.add_row(*map(escape, place), *(escape(cells.get(name, "–")) for name in known))
        found.append((by, shown))
    return found
