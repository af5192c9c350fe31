"""`plan` and `preview`: what a run would do and cost, and what the model would see of which data."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
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
from fedloom.errors import FedloomError, UserError, suggest

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.data.federation import DataReport, Federation
    from fedloom.study.load import Loaded

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
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", show_default=False, help="What it may take, as 8GB; default: what there is."),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, metavar="N", show_default=False, help="For a run of N processes on this host."),
    ] = None,
    output: FormatOption = OutputFormat.text,
) -> None:
    """What a run would cost: parameters, tokens, bytes, memory, time."""
    limit = None if memory is None else _bytes_of(memory)
    suite = read_suite_words(words, "plan")
    if suite is not None:
        from fedloom.cli import suites

        if nproc is not None:
            raise UserError(f"--nproc {nproc}, but a suite's runs have one process each", "leave it out", "cli.option")
        suites.show_plan(suite, output, probe=probe)
        return
    loaded = read_words(words, "plan")
    from fedloom.ops.host import imports

    with imports():
        from fedloom.study.plan import plan as planned
        from fedloom.study.processes import check_processes
        from fedloom.study.session import open_session

    if nproc is not None:
        check_processes(loaded.recipe, nproc)
    number = nproc or 1
    session = open_session(loaded.recipe, processes=number)
    report = planned(session, probe=probe, whole=probe, limit=limit, processes=number)
    if output is OutputFormat.json:
        print_data(report.to_json())
        return
    for line in report.lines:
        out(line)
    say(f"next: fedloom run {loaded.source}" + (f" --nproc {nproc}" if nproc is not None else ""))


def _bytes_of(text: str) -> int:
    """Bytes of "8GB", "500 MB", "7.5GiB".

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise UserError(f"--memory {text}: not a size", "a number and a unit: --memory 8GB", "cli.option")
    factor = (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * factor)


def preview(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|DATA [KEY=VALUE]...",
            show_default=False,
            help="A recipe; or a named set, a file or a folder (model=builtin unless it is given).",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Tokenised examples to show.")] = 1,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Of the partition: .svg, .png or .pdf. Default: partition_NAME.svg.",
        ),
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write no picture.")] = False,
    output: FormatOption = OutputFormat.text,
) -> None:
    """Who holds what, in a table and a picture; an example in colour."""
    loaded = _recipe_or_data(words)
    from fedloom.data.federation import prepare
    from fedloom.models.load import load_tokenizer
    from fedloom.study.draw import check_picture_file
    from fedloom.study.partition import partition_file

    if picture is not None:
        check_picture_file(picture)  # before the data is read, which may take a while
    without_data_notes()  # they are part of what is shown
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    federation = prepare(recipe.data, recipe.split, tokenizer, recipe.seed)
    if output is OutputFormat.json:
        shown = [_pieces(federation, place) for place in range(examples)]
        if picture is not None:
            partition_file(federation.report.to_json(), picture)
        print_data({**federation.report.to_json(), "examples": [piece for piece in shown if piece is not None]})
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a file is not squeezed to the width of no terminal
        console = Console(highlight=False, width=max(120, shutil.get_terminal_size().columns))
    _show_clients(console, federation.report)
    for place in range(examples):
        _show_example(console, federation, place)
    if not no_picture:
        _write_picture(console, federation.report, picture, loaded)
    if _is_data(loaded):
        say(f"next: fedloom init {loaded.source} --model {recipe.model}")
    else:
        say(f"next: fedloom plan {loaded.source}    fedloom run {loaded.source} --smoke")


def _recipe_or_data(words: Sequence[str] | None) -> Loaded:
    """The recipe that a command line names; of data, the recipe that `fedloom init` would begin with.

    Raises:
        UserError: neither is there, or it is wrong.
    """
    from fedloom.cli.initialise import recipe_for
    from fedloom.data.catalog import CATALOG
    from fedloom.data.rows import files_of, read
    from fedloom.study.load import Loaded, packaged_recipes, split_words, validate_text
    from fedloom.study.yaml_text import yaml_value

    overrides, rest = split_words(words or [])
    names = [word for word in rest if not word.startswith("-")]
    if len(names) != 1 or len(rest) != 1:
        return read_words(words, "preview")  # which says what is wrong
    name = names[0]
    given = {override.key: override.value for override in overrides}
    model = given.get("model", "builtin")
    kind = given.get("data.type", given.get("type", "auto"))
    columns = {key.removeprefix("data.columns."): value for key, value in given.items() if "columns." in key}
    path = Path(name)
    run = path.is_dir() and any((path / part).is_file() for part in ("recipe.yaml", "suite.yaml"))
    if run or path.suffix in (".yaml", ".yml") or (name in packaged_recipes() and not path.exists()):
        return read_words(words, "preview")
    if name in CATALOG or name.startswith("builtin:"):
        key = "name" if name in CATALOG else "path"
        text = f"model: {yaml_value(model)}\ndata: {{{key}: {yaml_value(name)}}}\nlocal_steps: 1\n"
    else:
        try:
            files_of(name, ())  # None is the id of a hub
        except UserError as error:
            if path.exists() or any(mark in name for mark in "*?[/"):
                raise
            known = [*packaged_recipes(), *CATALOG]
            raise UserError(
                f"{name}: no such recipe, data set, file or folder{suggest(name, known)}",
                hint="fedloom ls recipes    fedloom ls data",
                code="recipe.missing",
            ) from error
        text = recipe_for(read(name, type=kind, columns=columns), name, model, path.stem)
    said = [one.said if "=" in one.said else f"--{one.key}={one.value}" for one in overrides]
    recipe, notes = validate_text(text, said, source=name, name=_stem(name))
    for note in notes:
        say(f"note: {note}")
    # What init writes down of the columns was found in the data, and is found again: the same rows, read once.
    asked = {"type": kind, "columns": recipe.data.columns if columns else {}}
    return Loaded(recipe.model_copy(update={"data": recipe.data.model_copy(update=asked)}), notes, name, text)


def _is_data(loaded: Loaded) -> bool:
    return loaded.source in (loaded.recipe.data.path, loaded.recipe.data.name)


def _stem(name: str) -> str:
    """A name for files, from a path or the name of a recipe or a data set."""
    stem = Path(name.rstrip("/").removeprefix("builtin:")).name.split(".")[0]
    return re.sub(r"[^\w-]+", "_", stem).strip("_") or "data"


def _write_picture(console: Console, report: DataReport, picture: Path | None, loaded: Loaded) -> None:
    from rich.text import Text

    from fedloom.study.partition import partition_file

    place = picture or Path(f"partition_{_stem(loaded.source)}.svg")
    try:
        partition_file(report.to_json(), place)
    except (FedloomError, OSError) as error:
        if picture is not None:
            raise
        say(f"note: no picture: {error}")  # nobody asked for one, and the folder may not be ours
        return
    console.print(Text(f"picture: {place}"), soft_wrap=True)


def _pieces(federation: Federation, place: int) -> dict[str, Any] | None:
    """The training example at `place`, going from client to client, as text by what becomes of it."""
    ids = federation.having("train")
    client = federation.clients[ids[place % len(ids)]]
    number = place // len(ids)
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


def _show_clients(console: Console, report: DataReport) -> None:
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
    if report.num_clients > MOST_CLIENTS:
        console.print(Text(f"and {report.num_clients - MOST_CLIENTS:,} more clients"))
    lengths = ", ".join(f"{name} {value:,}" for name, value in report.lengths.items())
    _show_categories(console, report, colours)
    _show_heterogeneity(console, report)
    limit = "none" if report.max_length is None else f"{report.max_length:,}"
    lines = [f"tokens per row: {lengths}; data.max_length {limit}; {report.cut:,} rows cut"]
    lines.append(f"exact duplicates: {report.duplicates:,} rows")
    lines += [f"left out: {count:,} rows: {reason}" for reason, count in report.left_out.items()]
    lines += [f"note: {note}" for note in report.notes]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _show_categories(console: Console, report: DataReport, colours: dict[str, str]) -> None:
    """Rows of each client by category, where a client has several: the largest categories that fit."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if max((len(client.categories) for client in report.clients), default=0) < 2:
        return
    totals: dict[str, int] = {}
    for client in report.clients:
        for name, count in client.categories.items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda name: (-totals[name], name))
    room = console.width - max(len(client.id) for client in report.clients[:MOST_CLIENTS]) - 12
    shown: list[str] = []
    for name in names:
        room -= max(len(name), len(f"{totals[name]:,}")) + 2
        if room < 0 and shown:
            break
        shown.append(name)
    rest = names[len(shown) :]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rows of", no_wrap=True)
    for name in shown:
        table.add_column(Text(name, style=colours[name]), justify="right", no_wrap=True)
    if rest:
        table.add_column(f"{len(rest):,} others", justify="right", no_wrap=True)

    def line(id: str, held: dict[str, int], style: str = "") -> None:
        cells = [Text(f"{held[name]:,}", style=colours[name]) if held.get(name) else Text("·", "dim") for name in shown]
        cells += [Text(f"{sum(held.get(name, 0) for name in rest):,}")] if rest else []
        table.add_row(Text(id), *cells, style=style)

    for client in report.clients[:MOST_CLIENTS]:
        line(client.id, dict(client.categories))
    line("all", totals, "bold")
    console.print(table)


def _show_heterogeneity(console: Console, report: DataReport) -> None:
    """How unlike the pool clients are, beside what an even deal of the same sizes would have."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ("from the pool, 0 to 1", "JS mean", "max", "pairs", "even deal", "TV mean", "max", "even deal")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for name, what in (("category", "categories"), ("length", "lengths")):
        found = report.heterogeneity.get(name)
        if found is None:
            continue
        keys = ("js_mean", "js_max", "js_pairs", "js_even", "tv_mean", "tv_max", "tv_even")
        values = ["–" if found[key] is None else f"{found[key]:.3f}" for key in keys]
        style = "yellow" if (found["js_even"] or 0.0) * 3 + 0.01 < (found["js_mean"] or 0.0) else ""
        table.add_row(Text(what), *(Text(value, style=style) for value in values))
    if table.row_count:
        console.print(table)


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
