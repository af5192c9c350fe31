"""`plan` and `preview`: what a run would do and cost, and what the model would see."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

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
    say,
    without_data_notes,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.data.federation import DataReport, Federation
    from fedloom.study.recipe import Recipe

__all__ = ["register"]

MOST_CLIENTS = 40  # lines of the table of clients; of a thousand clients nobody reads more
PALETTE = (
    "cyan",
    "magenta",
    "yellow",
    "green",
    "blue",
    "red",
    "bright_cyan",
    "bright_magenta",
    "bright_yellow",
    "white",
)
STYLES = {"trained": "bold green", "masked": "dim", "cut": "red strike"}
MARKS = {"trained": "trained on", "masked": "masked: no loss", "cut": "cut by data.max_length"}


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(context_settings=WORDS)(plan)
    app.command(context_settings=WORDS)(preview)


def plan(
    words: Words = None,
    probe: Annotated[bool, typer.Option(help="Train one block for the time and memory, without keeping it.")] = True,
    output: FormatOption = OutputFormat.text,
) -> None:
    """What a run would cost: parameters, tokens, bytes, memory, time."""
    suite = read_suite_words(words, "plan")
    if suite is not None:
        from fedloom.cli import suites

        suites.show_plan(suite, output, probe=probe)
        return
    loaded = read_words(words, "plan")
    from fedloom.study.session import open_session
    from fedloom.study.session import plan as planned

    report = planned(open_session(loaded.recipe), probe=probe)
    if output is OutputFormat.json:
        print_data(report.to_json())
        return
    for line in report.lines:
        out(line)
    say(f"next: fedloom run {loaded.source}")


def preview(
    words: Words = None,
    examples: Annotated[int, typer.Option(min=0, help="Tokenised examples to show.")] = 1,
    output: FormatOption = OutputFormat.text,
) -> None:
    """What the model would see: rows per client, an example in colour."""
    loaded = read_words(words, "preview")
    from fedloom.data.federation import prepare
    from fedloom.models.load import load_tokenizer

    without_data_notes()  # they are part of what is shown
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    federation = prepare(recipe.data, recipe.split, tokenizer, recipe.seed)
    if output is OutputFormat.json:
        shown = [_pieces(federation, place) for place in range(examples)]
        print_data({**federation.report.to_json(), "examples": [piece for piece in shown if piece is not None]})
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a file is not squeezed to the width of no terminal
        console = Console(highlight=False, width=max(120, shutil.get_terminal_size().columns))
    _show_clients(console, federation.report, recipe)
    for place in range(examples):
        _show_example(console, federation, place)
    say(f"next: fedloom plan {loaded.source}    fedloom run {loaded.source} --smoke")


def _pieces(federation: Federation, place: int) -> dict[str, Any] | None:
    """The training example at `place`, going from client to client, as text by what becomes of it."""
    clients = [client for client in federation.clients.values() if len(client.train)]
    client = clients[place % len(clients)]
    number = place // len(clients)
    if number >= len(client.train):
        return None
    example = client.train[number]
    shown: dict[str, Any] = {
        "client": client.id,
        "tokens": len(example.input_ids),
        "pieces": [{"text": text, "shade": shade} for text, shade in federation.preview(example)],
    }
    if federation.report.read_as == "preference":
        from fedloom.data.pair_batches import Pairs

        rejected = Pairs(client.train)[number].rejected
        shown["rejected_tokens"] = len(rejected.input_ids)
        shown["rejected"] = [{"text": text, "shade": shade} for text, shade in federation.preview(rejected, side=1)]
    return shown


def _show_clients(console: Console, report: DataReport, recipe: Recipe) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    head = Text(f"{report.source}: read as {report.read_as}, {report.rows_read:,} rows; {report.said}")
    console.print(head, soft_wrap=True)
    categories = list(dict.fromkeys(name for client in report.clients for name in client.categories))
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(sorted(categories))}
    most = max((client.train + client.validation + client.test for client in report.clients), default=1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("client", "train", "val", "test", "tokens"):
        table.add_column(heading, justify="left" if heading == "client" else "right", no_wrap=True)
    table.add_column("rows by category" if categories else "rows", no_wrap=True)
    width = 30
    for client in report.clients[:MOST_CLIENTS]:
        rows = client.train + client.validation + client.test
        bar = Text()
        held = dict(client.categories) or {"": rows}
        for name, count in held.items():
            cells = max(1, round(width * count / max(1, most)))
            bar.append("█" * cells, style=colours.get(name, "cyan"))
        names = ", ".join(f"{name} {count:,}" for name, count in list(client.categories.items())[:3])
        more = f" and {len(client.categories) - 3} more" if len(client.categories) > 3 else ""
        bar.append(f" {names}{more}" if names else "")
        counts = (f"{client.train:,}", f"{client.validation:,}", f"{client.test:,}", f"{client.train_tokens:,}")
        table.add_row(Text(client.id), *counts, bar)
    console.print(table)
    if len(report.clients) > MOST_CLIENTS:
        console.print(Text(f"and {len(report.clients) - MOST_CLIENTS:,} more clients"))
    lengths = ", ".join(f"{name} {value:,}" for name, value in report.lengths.items())
    lines = [f"tokens per row: {lengths}; data.max_length {recipe.data.max_length:,}; {report.cut:,} rows cut"]
    lines += [f"left out: {count:,} rows: {reason}" for reason, count in report.left_out.items()]
    lines += [f"note: {note}" for note in report.notes]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _show_example(console: Console, federation: Federation, place: int) -> None:
    from rich.text import Text

    shown = _pieces(federation, place)
    if shown is None:
        return
    console.print()
    pair = "rejected" in shown
    legend = Text(f"{'a pair' if pair else 'an example'} of {shown['client']}, {shown['tokens']} tokens: ")
    plain = not console.is_terminal or console.color_system is None
    for shade, meaning in MARKS.items():
        legend.append(f"[{meaning}] ", style=STYLES[shade])
    console.print(legend)
    _show_pieces(console, shown["pieces"], plain)
    if pair:
        console.print()
        console.print(Text(f"and what was rejected, {shown['rejected_tokens']} tokens:"))
        _show_pieces(console, shown["rejected"], plain)


def _show_pieces(console: Console, pieces: list[dict[str, str]], plain: bool) -> None:
    from rich.text import Text

    text = Text()
    for piece in pieces:
        if plain:  # no colours: the kind stands before each stretch
            text.append(f"<{piece['shade']}>")
        text.append(piece["text"], style=STYLES[piece["shade"]])
    console.print(text, soft_wrap=True)
