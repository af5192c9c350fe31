"""`cache`: the prepared data that is kept, and clearing it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fedloom.cli.common import FormatOption, OutputFormat, out, print_data, say, table

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(cache)


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
    output: FormatOption = OutputFormat.text,
) -> None:
    """The prepared data that is kept for the next time."""
    from fedloom.data import cache as kept
    from fedloom.study.progress import byte_text, duration

    home, limit = kept.cache_home(), kept.cache_limit()
    if clear:
        number, size = kept.clear()
        if output is OutputFormat.json:
            print_data({"place": str(home), "removed": number, "bytes": size})
        else:
            out(f"{home}: {number} removed, {byte_text(size)}")
        return
    found = kept.entries()
    total = sum(one.bytes for one in found)
    if output is OutputFormat.json:
        lines = [
            {"name": one.path.name, "kind": one.kind, "of": one.source, "bytes": one.bytes, "used": one.used}
            for one in found
        ]
        print_data({"place": str(home), "limit": limit, "bytes": total, "entries": lines})
        return
    now = time.time()
    rows = [(one.kind, byte_text(one.bytes), f"{duration(max(0.0, now - one.used))} ago", one.source) for one in found]
    if rows:
        out(table(rows, ("kind", "size", "used", "of")))
    out(f"{home}: {len(found)} kept, {byte_text(total)} of at most {byte_text(limit)}")
    say("next: fedloom cache --clear    # FEDLOOM_CACHE=FOLDER is another place, FEDLOOM_CACHE_LIMIT=5GB another limit")
