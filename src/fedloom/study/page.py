"""What all report pages share: tables that can be sorted, figures with their findings, and the one file they become.

A page asks for nothing from anywhere and says so itself, by its content security policy: of scripts it lets run the one
that sorts and filters tables, by its hash. Without scripts the page is all there, in the order in which it was written.
Whatever comes from data or recipes is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.errors import UserError
from fedloom.study.draw import short
from fedloom.study.folder import write_atomic
from fedloom.study.progress import amount, byte_text, duration

__all__ = [
    "MOST_ROWS",
    "Cell",
    "Column",
    "Figure",
    "Table",
    "bytes_cell",
    "cell",
    "count_cell",
    "flops_cell",
    "flops_text",
    "loss_cell",
    "name_cell",
    "perplexity_cell",
    "plain_text",
    "points_cell",
    "render",
    "seconds_cell",
    "share_cell",
    "tables_of",
    "text_cell",
    "write_page",
]

MOST_ROWS = 200  # of a table; the rest is in the run's own files
NOTHING = "–"
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # control characters and halves of pairs
_SIGNATURE = "· fedloom</title>"  # early in every page, of older versions too


class Cell(NamedTuple):
    """What stands in a place of a table. `value` is what it is sorted by: "" comes last, None is by the text."""

    text: str
    value: float | str | None = None
    note: str = ""  # to hover over
    small: str = ""  # a second line
    arm: str | None = None  # its colour stands in front
    strong: bool = False

    @property
    def key(self) -> str | None:
        return f"{self.value:.8g}" if isinstance(self.value, int | float) else self.value


class Column(NamedTuple):
    """The head of a column; numbers stand to the right and are sorted from the largest at first."""

    name: str
    note: str = ""
    text: bool = False
    arm: str | None = None


class Table(NamedTuple):
    """A table. The first cell of a row is its name."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


class Figure(NamedTuple):
    """A picture: what it shows, as a sentence with the figures, and how to read it."""

    name: str
    finding: str
    about: str
    svg: str
    wide: bool = False


# -------------------------------------------------------------------------------------------------------------- cells


def text_cell(text: str, width: int = 60) -> Cell:
    return Cell(short(text, width), note=text if len(text) > width else "")


name_cell = text_cell


def cell(value: float | None, text: Callable[[float], str], exact: Callable[[float], str] | None = None) -> Cell:
    """A number as `text` writes it; "–", sorted last, where there is none."""
    if value is None:
        return Cell(NOTHING, "")
    return Cell(text(value), float(value), note=exact(value) if exact is not None else "")


def share_cell(value: float | None) -> Cell:
    return cell(value, lambda x: f"{100 * x:.1f} %")


def points_cell(value: float | None) -> Cell:
    """A spread of shares, in percentage points."""
    return cell(value, lambda x: f"{100 * x:.1f}")


def loss_cell(value: float | None) -> Cell:
    return cell(value, lambda x: f"{x:.3f}")


def perplexity_cell(value: float | None) -> Cell:
    """As many digits as tell perplexities apart."""
    return cell(value, lambda x: f"{x:.3f}" if x < 10 else f"{x:.1f}" if x < 1000 else amount(x), lambda x: f"{x:,.6g}")


def _or_none(value: float | None) -> float | None:
    return value or None  # an arm that sends or trains nothing has no cost, which is no measurement


def bytes_cell(value: float | None) -> Cell:
    return cell(_or_none(value), byte_text, lambda x: f"{x:,.0f} bytes")


def seconds_cell(value: float | None) -> Cell:
    return cell(_or_none(value), duration, lambda x: f"{x:,.2f} s")


def count_cell(value: float | None) -> Cell:
    return cell(_or_none(value), amount, lambda x: f"{x:,.0f}")


def flops_text(value: float) -> str:
    """Floating-point operations: 3.2 TFLOP."""
    for factor, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def flops_cell(value: float | None) -> Cell:
    return cell(_or_none(value), flops_text, lambda x: f"{x:.4g} FLOP")


def plain_text(value: Any) -> str:
    """Any JSON value as a person reads it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        sentences = any(isinstance(item, str) and " " in item for item in value)
        return ("\n" if sentences else ", ").join(plain_text(item) for item in value) or "none"
    return str(value)


def _any_cell(value: Any) -> Cell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(plain_text(value), "" if value is None else float(value) if number else None)


def tables_of(value: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[Table]]:
    """Any JSON object for reading: its plain values, and a table for each table inside it."""
    plain: list[tuple[str, str]] = []
    tables: list[Table] = []
    for key, item in value.items():
        name = str(key).replace("_", " ")
        rows = list(item.items()) if isinstance(item, Mapping) else []
        if isinstance(item, list) and item and all(isinstance(row, Mapping) for row in item):
            rows = [(str(row.get("id", number)), row) for number, row in enumerate(item, start=1)]
        if not rows or not all(isinstance(row, Mapping) for _, row in rows):
            plain.append((name, plain_text(item)))
            continue
        seen = dict.fromkeys(column for _, row in rows for column in row if column != "id")
        kept = [column for column in seen if any(row.get(column) not in (None, {}, [], "") for _, row in rows)]
        numbers = {column: all(isinstance(row.get(column), int | float | None) for _, row in rows) for column in kept}
        more = len(rows) - MOST_ROWS
        tables.append(
            Table(
                name,
                [
                    Column(name, text=True),
                    *(Column(str(column).replace("_", " "), text=not numbers[column]) for column in kept),
                ],
                [
                    [text_cell(str(id)), *(_any_cell(row.get(column)) for column in kept)]
                    for id, row in rows[:MOST_ROWS]
                ],
                f"{more:,} more rows are in result.json." if more > 0 else "",
            )
        )
    return plain, tables


# --------------------------------------------------------------------------------------------------------------- page


def render(template: str, content: Mapping[str, Any]) -> str:
    """The page that a template of templates/ makes of `content`."""
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).with_name("templates")
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = Markup  # a picture, which is safe as it is made
    page = environment.get_template(template).render(
        {
            **content,
            "style": Markup((folder / "page.css").read_text(encoding="utf-8")),
            "script": Markup(script),
            "script_hash": digest,
        }
    )
    return _UNSHOWABLE.sub("\ufffd", page)


def write_page(page: str, target: Path, *, ours: bool = False) -> None:
    """Write a page, whole; `ours` says that the place is a report's own, whatever lies there.

    Raises:
        UserError: `target` is in no folder, or is a file that is no report.
        RunError: the disk is full; an older page is still there.
    """
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}", code="report.dest")
    if not ours and target.is_file() and target.stat().st_size:
        with target.open("rb") as file:
            head = file.read(4096)
        if _SIGNATURE.encode() not in head:
            raise UserError(
                f"{target} is there and is no report of fedloom's, so it stays",
                "name another file with -o, or move that one away",
                code="report.dest",
            )
    write_atomic(target, page)
