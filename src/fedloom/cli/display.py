"""What a person sees while a run goes on and after: live progress, one row a round, the final table, `fedloom watch`.

On a terminal a live line under the rows shows the round in progress, what is left and the clock time of the end. Where
there is no terminal (a log file, a pipe) the rows alone are written: no bars, no escape codes, no line broken.
"""

from __future__ import annotations

import datetime
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedloom.errors import UserError
from fedloom.study.folder import RunFolder, is_running
from fedloom.study.progress import amount, byte_text, duration, round_text
from fedloom.study.result import ARMS, skipped_leaves

__all__ = ["RichDisplay", "arms_in_order", "next_commands", "print_result", "watch"]

_PACE_WINDOW = 10  # rounds over which the pace is taken; the first one is slower than the rest


def stderr_console() -> Console:
    """The console for people; stdout is kept for data. A log file gets no escape codes, whatever FORCE_COLOR says."""
    return Console(stderr=True, highlight=False, force_terminal=sys.stderr.isatty())


def arms_in_order(arms: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The arms as tables show them: base, local, federated, global, then any others as they come."""
    return [arm for arm in ARMS if arm in arms] + [arm for arm in arms if arm not in ARMS]


class Pace:
    """How long the rest will take, from the rounds so far. Times are of `time.monotonic`."""

    def __init__(self, now: float) -> None:
        self._last = now
        self._took: list[float] = []

    def tick(self, now: float, seconds: float) -> None:
        """A round has ended that says it took `seconds`; the clock says more when something was evaluated besides.

        It says less when rounds of the past are shown in a row, as `watch` does.
        """
        self._took = [*self._took, max(seconds, now - self._last)][-_PACE_WINDOW:]
        self._last = now

    def left(self, rounds: int, now: float) -> float | None:
        """Seconds that `rounds` more will take; None before the first round has ended."""
        if not self._took:
            return None
        per_round = sum(self._took) / len(self._took)
        return max(0.0, rounds * per_round - (now - self._last))


class _Status:
    """The live lines under the rows: drawn anew several times a second, hence the times in them run."""

    def __init__(self, display: RichDisplay) -> None:
        self._display = display

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._display._status_lines(options.max_width)


class RichDisplay:
    """A `fedloom.study.progress.Display` on a terminal, or plain lines where there is none.

    Use it as a context manager, or call `close`: the terminal's cursor comes back however the run ends.

    Args:
        console: where to write; standard error by default.
        rounds: arm -> rounds, of all arms the run will have, for a time left that counts later arms too.
        elapsed: seconds that the run has taken already.
    """

    def __init__(
        self, console: Console | None = None, rounds: Mapping[str, int] | None = None, elapsed: float = 0.0
    ) -> None:
        self.console = console or stderr_console()
        self._rounds_of = dict(rounds or {})
        self._started = time.monotonic() - elapsed
        self._arm = ""
        self._arm_rounds = 0
        self._round = 0
        self._pace = Pace(self._started)
        self._step: tuple[int, int, str] | None = None
        self._val: dict[str, float] = {}
        self._live: Live | None = None

    # -- the protocol

    def plan(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._say(line)

    def arm(self, arm: str, rounds: int) -> None:
        self._arm, self._arm_rounds, self._round, self._step = arm, rounds, 0, None
        self._rounds_of.setdefault(arm, rounds)
        self._pace = Pace(time.monotonic())
        self._say(f"{arm}: {rounds} rounds" if rounds > 1 else f"{arm}: 1 round" if rounds else arm, style="bold")
        self._draw()

    def advance(self, done: int, total: int, what: str) -> None:
        self._step = (done, total, what)
        self._draw()

    def round(self, line: Mapping[str, Any]) -> None:
        arm = str(line.get("arm", self._arm))
        self._round = int(line["round"])
        self._step = None
        if self._round > 0:
            self._pace.tick(time.monotonic(), float(line.get("seconds") or 0.0))
        else:  # what was measured before round 1
            self._pace = Pace(time.monotonic())
        self._say(round_text(line, self._val.get(arm)))
        if line.get("val_loss") is not None:
            self._val[arm] = line["val_loss"]
        self._draw()

    def message(self, text: str) -> None:
        for line in text.splitlines():
            self._say(line)

    def end(self, result: Mapping[str, Any]) -> None:
        self.close()

    # -- life

    def close(self) -> None:
        """Take the live lines away. What was said stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> RichDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- drawing

    def _say(self, text: str, style: str | None = None) -> None:
        # Text, not str: a client may be called "[red]". On a terminal long rows wrap; elsewhere they stay whole.
        self.console.print(Text(_printable(text), style=style or ""), soft_wrap=not self.console.is_terminal)

    def _draw(self) -> None:
        if not self.console.is_terminal:
            return
        if self._live is None:
            self._live = Live(_Status(self), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def _status_lines(self, width: int) -> list[Text | Table]:
        now = time.monotonic()
        elapsed = duration(now - self._started)
        parts = [f"{elapsed} elapsed"]
        left = self._pace.left(self._rounds_left(), now)
        if left is not None:
            end = datetime.datetime.now() + datetime.timedelta(seconds=left)
            far = end.date() != datetime.date.today()
            parts += [f"{duration(left)} left", f"ends {end:%a %H:%M}" if far else f"ends {end:%H:%M:%S}"]
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(self._arm, style="bold")
        if self._arm_rounds:
            head.append(f" round {min(self._round + 1, self._arm_rounds)}/{self._arm_rounds}")
        head.append(" · " + " · ".join(parts), style="dim")
        lines: list[Text | Table] = [head]
        if self._step is not None:
            done, total, what = self._step
            step = Table.grid(padding=(0, 1))
            step.add_row(
                ProgressBar(total=max(total, 1), completed=done, width=max(10, min(40, width // 3))),
                Text(f"{done}/{total} {_printable(what)}", no_wrap=True, overflow="ellipsis"),
            )
            lines.append(step)
        return lines

    def _rounds_left(self) -> int:
        """Of this arm, and of arms that have not begun. Arms are taken in the order they were announced in."""
        names = list(self._rounds_of)
        later = names[names.index(self._arm) + 1 :] if self._arm in names else []
        return max(0, self._arm_rounds - self._round) + sum(self._rounds_of[name] for name in later)


def _printable(text: str) -> str:
    """Ids and reasons come from data: nothing in them may move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


# ------------------------------------------------------------------------------------------------- the final table


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


class _Column(NamedTuple):
    heading: str
    cell: Callable[[Mapping[str, Any], Mapping[str, Any]], str]  # an arm's result, an arm's costs
    rank: int  # the column with the highest goes first when the terminal is narrow


_SCORES = (
    _Column("score", lambda arm, cost: _share(arm["score"]), 0),
    _Column("own test", lambda arm, cost: _share(arm["own_test"]["score"]), 1),
    _Column("worst", lambda arm, cost: _share(arm["own_test"]["score_worst"]), 2),
    _Column("std", lambda arm, cost: _points(arm["own_test"]["score_std"]), 5),
)
_PREFERENCES = (
    _Column("ranked right", lambda arm, cost: _share(arm.get("preference_accuracy")), 1),
    _Column("margin", lambda arm, cost: "–" if arm.get("reward_margin") is None else f"{arm['reward_margin']:.2f}", 2),
)
_LOSS = _Column("loss", lambda arm, cost: "–" if arm["loss"] is None else f"{arm['loss']:.3f}", 0)
_ROUND = _Column("round", lambda arm, cost: f"{cost['round']}" if cost.get("round") else "–", 1)
_SAMPLES = _Column("samples", lambda arm, cost: _cost(cost, "samples_per_model", amount), 3)
_COSTS = (
    _LOSS,
    _SAMPLES,
    _Column("up", lambda arm, cost: _cost(cost, "bytes_up_per_client_round", byte_text), 4),
    _Column("down", lambda arm, cost: _cost(cost, "bytes_down_per_client_round", byte_text), 6),
    _Column("training", lambda arm, cost: _cost(cost, "train_seconds", duration), 3),
    _Column("FLOPs", lambda arm, cost: _cost(cost, "flops", lambda value: f"{value:.1e}"), 8),
    _Column("tok/s", lambda arm, cost: _cost(cost, "tokens_per_second", amount), 7),
)


def result_table(result: Mapping[str, Any], width: int) -> Table:
    """The outcome, a row per arm: scores, loss, samples, bytes, seconds; fewer columns where `width` is too small."""
    arms: Mapping[str, Any] = result["arms"]
    return _fitting(arms, result.get("costs_per_arm", {}), [*_scores_of(arms), *_tasks_of(result), *_COSTS], width)


def equal_samples_table(compared: Mapping[str, Any], width: int) -> Table:
    """The same arms after their models have seen the same number of samples."""
    arms = {name: one["result"] for name, one in compared["arms"].items()}
    seen = {
        name: {"round": one["round"], "samples_per_model": one["samples"]} for name, one in compared["arms"].items()
    }
    return _fitting(arms, seen, [*_scores_of(arms), _LOSS, _SAMPLES, _ROUND], width)


def _scores_of(arms: Mapping[str, Any]) -> Sequence[_Column]:
    scored = _SCORES if any(arm["score"] is not None for arm in arms.values()) else ()
    paired = _PREFERENCES if any("preference_accuracy" in arm for arm in arms.values()) else ()
    return (*scored, *paired)


def _tasks_of(result: Mapping[str, Any]) -> list[_Column]:
    """A column per benchmark, with its first metric."""
    tasks: Mapping[str, Any] = result.get("tasks") or {}
    names = list(dict.fromkeys(task for found in tasks.values() for task in found))

    def column(task: str) -> _Column:
        by_arm = {
            id(result["arms"][arm]): next(iter(found[task].values())) for arm, found in tasks.items() if task in found
        }
        return _Column(_printable(task), lambda arm, cost: _share(by_arm.get(id(arm))), 2)

    return [column(task) for task in names]


def _fitting(arms: Mapping[str, Any], costs: Mapping[str, Any], wanted: Sequence[_Column], width: int) -> Table:
    """A table with as many of the columns as fit; one in which nothing stands is left out."""
    columns = [one for one in wanted if any(one.cell(arms[arm], costs.get(arm, {})) != "–" for arm in arms)]
    columns = columns or [_LOSS]
    unbounded = Console(width=10_000, file=io.StringIO())
    while True:
        table = _table(arms, costs, columns)
        if len(columns) == 1 or unbounded.measure(table).maximum <= width:
            return table
        columns.remove(max(columns, key=lambda column: column.rank))


def _table(arms: Mapping[str, Any], costs: Mapping[str, Any], columns: Sequence[_Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    by = "score" if any(arm["score"] is not None for arm in arms.values()) else "preference_accuracy"
    best = max((arm[by] for name, arm in arms.items() if name != "base" and arm.get(by) is not None), default=None)
    for name in arms_in_order(arms):
        style = "bold" if best is not None and arms[name].get(by) == best else ""
        cells = (column.cell(arms[name], costs.get(name, {})) for column in columns)
        table.add_row(escape(_printable(name)), *cells, style=style)
    return table


def _cost(costs: Mapping[str, Any], key: str, text: Callable[[float], str]) -> str:
    return text(costs[key]) if costs.get(key) else "–"


def next_commands(result: Mapping[str, Any] | None, run: Path) -> list[str]:
    """Commands ready to paste that make sense for this run as it is."""
    folder = shlex.quote(str(run))
    commands = []
    if result is None or result.get("status") != "done":
        commands.append(f"fedloom run --resume {folder}")
    if (run / "model").is_dir():  # the whole model, ready for others as it is
        commands.append(f"fedloom chat {folder}")
    elif (run / "adapter").is_dir():
        commands.append(f"fedloom chat {folder}")
        if _can_merge(run / "adapter" / "adapter_config.json"):
            commands.append(f"fedloom export {folder} {shlex.quote(str(run) + '-merged')} --format merged")
    commands.append(f"fedloom report {folder}")
    return commands


def loss_of(result: Mapping[str, Any]) -> str:
    """What the loss of a result is a mean of."""
    paired = any("preference_accuracy" in arm for arm in result["arms"].values())
    return "of the comparison, per pair" if paired else "nats per answer token"


def _can_merge(config: Path) -> bool:
    """Whether an adapter's folder is of a kind that can be added to the weights; what cannot be read may be."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("peft_type") in ("LORA", "IA3")
    except (OSError, ValueError, AttributeError):
        return True


def print_result(result: Mapping[str, Any], run: Path, console: Console | None = None) -> None:
    """Print the final table and the commands to go on with, on standard error by default."""
    console = console or stderr_console()
    paired = any("preference_accuracy" in arm for arm in result["arms"].values())
    examples = "pairs" if paired else "examples"
    notes = [
        "score: on all clients' test sets together; own test, worst, std: each client on its own test set",
        f"loss: {loss_of(result)}; samples: {examples} that one model was trained on",
        "up, down: bytes per client and round as they go over the wire",
    ]
    if all(arm["score"] is None for arm in result["arms"].values()):
        notes = notes[1:]
    if paired:
        notes.insert(
            0,
            "ranked right: pairs whose chosen answer has the higher reward (a tie counts half); "
            "margin: reward of the chosen less that of the rejected",
        )
    compared = result.get("equal_samples")
    console.print()
    if compared:
        ended = {one["rounds"] for one in (result.get("outcomes") or {}).values()}
        console.print(Text("after equal rounds" if len(ended) <= 1 else "at the end of each arm", style="bold"))
    _print_table(console, lambda width: result_table(result, width))
    if compared:
        console.print()
        console.print(Text(f"after equal samples: {compared['samples']:,} for each model", style="bold"))
        _print_table(console, lambda width: equal_samples_table(compared, width))
        notes.append(
            "equal samples: the state after the first round in which a model has seen as many as one local model does"
        )
    console.print()
    for line in outcome_lines(result):
        console.print(Text(_printable(line)), soft_wrap=not console.is_terminal)
    for note in notes:
        console.print(Text(note, style="dim"), soft_wrap=not console.is_terminal)
    for place, what in skipped_leaves(result):
        console.print(Text(_printable(f"skipped {place}: {what}"), style="yellow"), soft_wrap=True)
    report = run / "report.html"
    console.print()
    if report.is_file():
        console.print(Text(f"report: {report}"), soft_wrap=True)
    console.print(Text("next:"))
    for command in next_commands(result, run):
        console.print(Text(f"  {command}"), soft_wrap=True)


def _print_table(console: Console, table: Callable[[int], Table]) -> None:
    if console.is_terminal:
        console.print(table(console.width))
    else:  # a log file has no width to squeeze a table into
        Console(file=console.file, force_terminal=False, width=200).print(table(200))


def outcome_lines(result: Mapping[str, Any]) -> list[str]:
    """Which states were tested, where it is not simply each arm's last one."""
    lines = []
    for arm, ended in (result.get("outcomes") or {}).items():
        if ended["stopped_early"]:
            lines.append(f"{arm}: stopped early, after round {ended['rounds']} of {ended['planned_rounds']}")
        if ended["round"] != ended["rounds"]:
            lines.append(f"{arm}: its best state by {ended['best_by']}, after round {ended['round']}, is what is shown")
        elif ended["best_round"] != ended["rounds"]:
            better = f"by {ended['best_by']} that after round {ended['best_round']} was better"
            lines.append(f"{arm}: its last state is shown; {better}")
    return lines


# ------------------------------------------------------------------------------------------------------------ watch


def watch(
    run: Path,
    *,
    follow: bool = True,
    format: str = "text",
    interval: float = 0.5,
    console: Console | None = None,
    out: TextIO | None = None,
) -> None:
    """Show a run of another process: the rounds so far, then each as it ends, then the result.

    Ends when the run has its result, or when no process writes to the folder any more.

    Args:
        follow: False shows what is there and returns.
        format: "text" for people (standard error), "json" for the lines of rounds.jsonl on standard output.
        interval: seconds between looks.

    Raises:
        UserError: there is no run in this folder, or the format is another.
    """
    if format not in ("text", "json"):
        raise UserError(f"format {format!r} is neither text nor json", code="watch.format")
    folder = RunFolder.look(run)
    out = out or sys.stdout
    facts = folder.read_facts()
    elapsed = max(0.0, time.time() - (facts.get("started") or folder.recipe.stat().st_mtime))
    with RichDisplay(console, rounds=facts.get("arms"), elapsed=elapsed) as display:
        shown = 0
        arm = None
        while True:
            running = is_running(run)  # asked before reading, so that the last lines of a run that ends now are seen
            lines = folder.read_rounds()
            if len(lines) < shown:  # resumed from an earlier round
                display.message("the run went back to its last checkpoint")
                shown = len(lines)
            for line in lines[shown:]:
                if format == "json":
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
                    continue
                if line["arm"] != arm:
                    arm = line["arm"]
                    display.arm(arm, int(line.get("rounds") or 0))
                display.round(line)
            out.flush()
            shown = len(lines)
            if not running or not follow:
                break
            time.sleep(interval)
        if format == "json":
            return
        result = folder.read_result()
        display.close()
        if result is not None:
            print_result(result, run, display.console)
        elif running:
            display.message(f"{run} goes on")
        else:
            display.message(f"{run} is not running and has no result" + ("" if shown else "; no round has ended yet"))
            for command in next_commands(None, run):
                display.message(f"  {command}")
