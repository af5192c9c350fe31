"""`compare`: runs or suites side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.common import FormatOption, OutputFormat, print_data

if TYPE_CHECKING:
    from rich.table import Table

    from fedloom.study.compare import Compared, Line

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(compare)


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, or suite folders.")],
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help="Of runs: what to compare, as in a suite.")
    ] = None,
    output: FormatOption = OutputFormat.text,
) -> None:
    """Runs or suites side by side: what differs, scores, costs."""
    from fedloom.study import compare as comparing

    found = comparing.compare(folders, metric)
    if output is OutputFormat.json:
        print_data(found.to_json())
        return
    _show(found)


def _show(found: Compared) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    for title, rows in (("settings that differ", found.settings), ("versions that differ", found.versions)):
        if rows:
            console.print(Text(title, style="bold"))
            console.print(_plain(found.names, [(key, [_value(one) for one in values]) for key, values in rows.items()]))
            console.print()
    for comparison, title in (("rounds", "figures at equal rounds"), ("samples", "figures at equal samples")):
        lines = [line for line in found.lines if line.comparison == comparison]
        if lines:
            console.print(Text(title, style="bold"))
            console.print(_figures(found.names, lines))
            console.print()
    if found.costs:
        console.print(Text("costs", style="bold"))
        console.print(_costs(found))
        console.print()
    for note in found.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


def _value(value: Any) -> str:
    from fedloom.study.yaml_text import yaml_value

    return "–" if value is None else value if isinstance(value, str) else yaml_value(value)


def _new_table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")


def _plain(names: list[str], rows: list[tuple[str, list[str]]]) -> Table:
    from rich.markup import escape

    shown = _new_table()
    shown.add_column("", no_wrap=True)
    for name in names:
        shown.add_column(escape(name), overflow="fold")
    for key, cells in rows:
        shown.add_row(escape(key), *map(escape, cells))
    return shown


def _settings(settings: dict[str, Any]) -> str:
    from fedloom.study.suite import settings_text

    return settings_text(settings)


def _figures(names: list[str], lines: list[Line]) -> Table:
    from rich.markup import escape

    from fedloom.study.suite_table import mean_text

    shown = _new_table()
    with_settings = any(line.settings for line in lines)
    for heading in (*(["settings"] if with_settings else []), "arm", ""):
        shown.add_column(heading, no_wrap=True)
    for number, name in enumerate(names):
        shown.add_column(escape(name), justify="right")
        if number:
            shown.add_column("difference", justify="right", no_wrap=True)
    last = ("", "")
    for line in lines:
        settings = _settings(line.settings)
        place = (settings, line.arm)
        if last != ("", "") and place != last:
            shown.add_section()
        cells = []
        for number, (value, std) in enumerate(zip(line.values, line.stds, strict=True)):
            cells.append(mean_text(line.metric, value, std))
            if number:
                cells.append(_difference(line, number))
        first = [settings if settings != last[0] else ""] if with_settings else []
        arm = line.arm if place != last else ""
        shown.add_row(*map(escape, (*first, arm, line.metric["title"], *cells)))
        last = place
    return shown


def _difference(line: Line, number: int) -> str:
    one = line.differences[number]
    if one is None:
        return "–"
    factor, digits = (100, 1) if line.metric["unit"] == "share" else (1, 3)
    text = f"{factor * one['mean']:+.{digits}f}"
    if one.get("low") is not None:
        text += f" [{factor * one['low']:.{digits}f}, {factor * one['high']:.{digits}f}]"
        text += " *" if one["resolved"] else " ~"
    return text


def _costs(found: Compared) -> Table:
    from rich.markup import escape

    from fedloom.study.suite_result import COSTS
    from fedloom.study.suite_table import cost_text

    rows = []
    for one in found.costs:
        key = one["cost"]
        place = ", ".join(part for part in (_settings(one["settings"]), one["arm"], COSTS[key][0]) if part)
        rows.append((place, ["–" if value is None else cost_text(key, value) for value in one["values"]]))
    shown = _new_table()
    shown.add_column("", no_wrap=True)
    for name in found.names:
        shown.add_column(escape(name), justify="right")
    for place, cells in rows:
        shown.add_row(escape(place), *cells)
    return shown
