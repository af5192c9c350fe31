"""`explain`: what a method, an adapter kind or a compression does on each side, sends and keeps."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fedloom.cli.common import FormatOption, OutputFormat, out, print_data, say, table

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(explain)


def explain(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", show_default=False, help="A method, an adapter kind or a compression; without one: all."
        ),
    ] = None,
    sizes: Annotated[
        bool, typer.Option("--bytes/--no-bytes", help="Compute the bytes of its messages (some seconds).")
    ] = True,
    output: FormatOption = OutputFormat.text,
) -> None:
    """What a method computes, sends and keeps; its paper."""
    from fedloom.study.explain import entry, known, message_sizes

    if name is None:
        _list(known(), output)
        return
    found = entry(name)
    measured = message_sizes(found.shelf, name) if sizes else []
    if output is OutputFormat.json:
        value = {
            "name": name,
            "shelf": found.shelf,
            "about": found.about,
            **found.explained._asdict(),
            "write": found.write,
            "keys": [key._asdict() for key in found.keys],
            "bytes": [one._asdict() for one in measured],
        }
        print_data(value)
        return
    _show(found, measured)


def _list(names: Any, output: OutputFormat) -> None:
    from fedloom.study.explain import NAMES
    from fedloom.study.methods import METHOD_LINES

    rows = {
        shelf: [
            {"name": name, "about": METHOD_LINES.get(name) if shelf == "method" else NAMES[shelf][name].client}
            for name in of_shelf
        ]
        for shelf, of_shelf in names.items()
    }
    if output is OutputFormat.json:
        print_data(rows)
        return
    titles = {"method": "method: NAME", "adapter": "adapter.kind: NAME", "compress": "compress.up: [NAME]"}
    for shelf, entries in rows.items():
        out(f"{titles[shelf]}")
        out("\n".join(f"  {line}" for line in table([[one["name"], one["about"]] for one in entries]).splitlines()))
    say("next: fedloom explain fedavg")


def _show(found: Any, measured: list[Any]) -> None:
    from fedloom.study.progress import amount, byte_text
    from fedloom.study.yaml_text import yaml_value

    texts = found.explained
    kept = "it is" if found.shelf == "adapter" else "client"
    lines = [(kept, texts.client), ("sends", texts.sends), ("server", texts.server), ("keeps", texts.keeps)]
    if found.about:
        lines.insert(0, ("in short", found.about))
    lines.append(("paper", texts.paper))
    written = "; ".join(f"{key}: {yaml_value(value)}" for key, value in found.write.items())
    lines.append(("recipe", written))
    for key in found.keys:
        lines.append((f"  {key.key}", f"{yaml_value(key.default)}   {key.about}"))
    for one in measured:
        lines.append(
            (
                "bytes",
                f"{one.model}: up {byte_text(one.up)}, down {byte_text(one.down)} per client and round "
                f"({one.up:,} and {one.down:,} bytes; {amount(one.trained)} numbers)",
            )
        )
    if not sys.stdout.isatty():
        out(found.name)
        out(table(lines))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for label, text in lines:
        grid.add_row(label, Text(text))
    console = Console()
    console.print(found.name, style="bold cyan")
    console.print(grid)
