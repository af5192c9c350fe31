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
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or a suite's folder.")],
    dest: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the page goes. Default: report.html in RUN, or for several in the current folder.",
            show_default=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Quality against bytes as a picture too: .svg, .png or .pdf."),
    ] = None,
) -> None:
    """Write report.html of a run, of a suite, or of several runs."""
    from fedloom.study.report import write_picture, write_report

    if picture is not None:
        out(relative(write_picture(folders, picture)))
    out(relative(write_report(folders, dest)))
