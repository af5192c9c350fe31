"""`watch` and `report`: a run from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.common import FormatOption, OutputFormat, out, relative

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(watch)
    app.command()(report)


def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    follow: Annotated[bool, typer.Option(help="Stay until the run ends.")] = True,
    output: FormatOption = OutputFormat.text,
) -> None:
    """Show the rounds of a run that another process drives."""
    from fedloom.cli import display

    display.watch(folder, follow=follow, format=output.value)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
) -> None:
    """Write report.html again from the run folder."""
    from fedloom.study.report import write_report

    for folder in folders:
        out(relative(write_report(folder)))
