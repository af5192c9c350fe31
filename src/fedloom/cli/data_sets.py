"""`ls data` and `ls data NAME`: the named sets, and whether their files are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.cli.common import out, say, table

__all__ = ["entries", "facts", "show", "show_all"]

_BUILTIN = {
    "builtin:skills": "8 kinds of instruction, one per client; exact answers",
    "builtin:arith": "word problems with worked steps and a final number; 3 clients alike",
    "builtin:code": "small functions in several languages, one per client; judged by running hidden tests",
}
_OTHERS = {
    "FILE": "json, jsonl, csv or parquet: alpaca, chat, prompt_completion, completion or preference rows",
    "FOLDER": "of such files; split.kind: files makes each one a client",
    "OWNER/NAME": "a Hugging Face data set (needs the extra: pip install 'fedloom[data]')",
}


def entries() -> list[dict[str, Any]]:
    """One for each thing that data.name or data.path takes. `time` is the second column of the list: where it is."""
    from fedloom.data.catalog import CATALOG
    from fedloom.data.sources import find_files

    found: list[dict[str, Any]] = [{"name": name, "time": "built in", "about": line} for name, line in _BUILTIN.items()]
    for entry in CATALOG.values():
        here = find_files(entry, None) is not None
        sizes = [f"{entry.rows:,} rows" if entry.rows else "", f"{entry.clients} clients" if entry.clients else ""]
        about = ", ".join([*filter(None, sizes), entry.licence])
        found.append(
            {
                "name": entry.name,
                "time": "here" if here else "not here",
                "about": f"{entry.about} ({about})",
                "line": entry.about,
                "licence": entry.licence,
                "rows": entry.rows,
                "clients": entry.clients,
                "here": here,
            }
        )
    return found + [{"name": name, "time": "", "about": line} for name, line in _OTHERS.items()]


def show_all(found: Sequence[Mapping[str, Any]]) -> None:
    """`entries` for people, in columns."""
    from fedloom.data.places import data_home

    rows = [
        [
            str(entry["name"]),
            str(entry["time"]),
            f"{entry['rows']:,}" if entry.get("rows") else "",
            str(entry["clients"]) if entry.get("clients") else "",
            str(entry.get("licence", "")),
            str(entry.get("line", entry["about"])),
        ]
        for entry in found
    ]
    out(table(rows, ("name", "files", "rows", "clients", "licence", "")))
    say(f"files are looked for below {data_home()} (FEDLOOM_DATA); more of one: fedloom ls data NAME")


def facts(name: str) -> dict[str, Any]:
    """What the catalogue knows of a set, and which of its files are here.

    Raises:
        UserError: there is no such set.
    """
    from fedloom.data.catalog import find_set
    from fedloom.data.places import data_home
    from fedloom.data.sources import state_of

    entry = find_set(name)
    home = data_home() / entry.folder
    return {
        "name": entry.name,
        "about": entry.about,
        "licence": entry.licence,
        "published": entry.published,
        "revision": entry.revision,
        "hub": None if entry.hub is None else entry.hub._asdict(),
        "rows": entry.rows,
        "clients": entry.clients,
        "kind": entry.kind,
        "columns": dict(entry.columns),
        "split": dict(entry.split),
        "score": entry.score,
        "files": [
            {
                "use": use,
                "place": str(home / file.name),
                "url": file.url or None,
                "rows": file.rows,
                "sha256": file.sha256,
                "state": state_of(home, file),
            }
            for form in entry.forms
            for use, files in (("train", form.train), ("test", form.test))
            for file in files
        ],
    }


def show(known: Mapping[str, Any]) -> None:
    """`facts` for people."""
    hub = known["hub"]
    lines = [
        ("licence", known["licence"]),
        ("published", f"{known['published']}, {_at(known['revision'])}"),
        ("hub", "none" if hub is None else f"{hub['id']}, {_at(hub['revision'])}"),
        ("rows", f"{known['rows']:,}" if known["rows"] else "not on record"),
        ("read as", known["kind"]),
        ("columns", _pairs(known["columns"]) or "named as fedloom names them"),
        ("split", _pairs(known["split"]) + (f"; {known['clients']} clients" if known["clients"] else "")),
    ]
    if known["score"]:
        lines.append(("score", known["score"]))
    out(f"{known['name']}: {known['about']}")
    out(table([[f"  {name}", text] for name, text in lines]))
    out("  files")
    out(table([[f"    {file['use']}", file["state"], file["place"]] for file in known["files"]]))
    wanted = [file for file in known["files"] if file["url"] and file["state"] == "not here"]
    if all(file["state"] == "not here" for file in known["files"]):
        for file in wanted:
            say(f"to fetch: {file['url']}")
    say(f"next: fedloom init {known['name']} --model M")


def _at(revision: str | None) -> str:
    return f"at {revision}" if revision else "at no fixed revision"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
