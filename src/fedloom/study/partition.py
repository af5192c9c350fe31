"""The picture of a partition: what each client holds, how much, and how long its rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.study.draw import ACCENT, INK, MUTED, PAPER, Draw, Tips, percent_axis, picture_file, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["partition_drawing", "partition_file"]

MOST_ROWS = 40  # clients with a line of their own; more are drawn side by side
MOST_CATEGORIES = 10  # with a colour of their own
# Of like weight and far apart, also in print and for eyes that do not tell red from green.
_COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#b07aa1",
    "#edc948",
    "#d1605e",
    "#76b7b2",
    "#9c755f",
    "#ff9da7",
    "#5b6b8c",
)
_OTHERS = "#c9c6c0"
_WIDTH = 9.4
_COLUMNS = 6  # of the legend
_PARTS = ("train", "validation", "test")
_PART_COLOURS = (ACCENT, "#7fb3d5", "#c9dfee")


class _Bar(NamedTuple):
    """A client: its rows by colour, and its lengths."""

    id: str
    counts: list[int]
    lengths: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts)


class _Plan(NamedTuple):
    bars: list[_Bar]
    names: list[str]
    colours: list[str]
    by_category: bool


def partition_file(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a data report (`DataReport.to_json()`) as .svg, .png or .pdf, on a light ground.

    Raises:
        UserError: the name ends otherwise, or the folder is not there. RunError: the disk is full.
    """
    height, draw = partition_drawing(report)
    picture_file(path, height, draw)


def partition_drawing(report: Mapping[str, Any]) -> tuple[float, Draw]:
    """Height in inches, and what draws it: a line per client, or of many clients all side by side."""
    plan = _plan(report["clients"])
    many = len(plan.bars) > MOST_ROWS
    caption = _caption(report)
    named = plan.by_category or not many
    head = 0.34 + (0.23 * -(-len(plan.names) // _COLUMNS) if named else 0.0)
    body = 5.6 if many else 0.75 + 0.30 * max(2, len(plan.bars))
    foot = 0.05 + 0.19 * len(caption)

    def draw(figure: Figure, tips: Tips) -> None:
        figure.set_figwidth(_WIDTH)
        parts: Any = figure.subfigures(3, 1, height_ratios=(head, body, foot))
        top, middle, bottom = parts
        top.text(0.008, 1.0, _title(report), ha="left", va="top", color=INK, fontsize=12, fontweight="bold")
        if named:
            _legend(top, plan)
        (_side_by_side if many else _in_lines)(middle, plan, report, tips)
        bottom.text(0.008, 1.0, "\n".join(caption), ha="left", va="top", color=MUTED, fontsize=9, linespacing=1.35)

    return head + body + foot, draw


def _plan(clients: Sequence[Mapping[str, Any]]) -> _Plan:
    totals: dict[str, int] = {}
    for client in clients:
        for name, count in client["categories"].items():
            totals[name] = totals.get(name, 0) + count
    if not totals:
        bars = [_Bar(str(one["id"]), [one[part] for part in _PARTS], one.get("lengths") or {}) for one in clients]
        return _Plan(bars, list(_PARTS), list(_PART_COLOURS), False)
    names = sorted(totals, key=lambda name: (-totals[name], name))
    kept = names if len(names) <= MOST_CATEGORIES else names[: MOST_CATEGORIES - 1]
    place = {name: number for number, name in enumerate(kept)}
    rest = len(names) - len(kept)
    bars = []
    for one in clients:
        counts = [0] * (len(kept) + bool(rest))
        for name, count in one["categories"].items():
            counts[place.get(name, len(kept))] += count
        bars.append(_Bar(str(one["id"]), counts, one.get("lengths") or {}))
    colours = [*_COLOURS[: len(kept)], *([_OTHERS] if rest else [])]
    return _Plan(bars, [*kept, *([f"{rest:,} others"] if rest else [])], colours, True)


def _title(report: Mapping[str, Any]) -> str:
    clients = report.get("num_clients", len(report["clients"]))
    rows = sum((report.get("rows") or {}).values()) or sum(one[part] for one in report["clients"] for part in _PARTS)
    dealt = str(report["split"]).replace("_", " ")
    source = str(report["source"]).rstrip("/").rpartition("/")[2]
    return f"{short(source, 48)}: {rows:,} rows, {clients:,} client{'s' * (clients > 1)}, {dealt}"


def _caption(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, what in (("category", "categories"), ("length", "lengths")):
        one = (report.get("heterogeneity") or {}).get(name)
        if one:
            even = f"; an even deal would have {_amount(one['js_even'])}" if one.get("js_even") is not None else ""
            lines.append(f"Divergence of {what} from the pool: {_amount(one['js_mean'])} on average, "
                         f"{_amount(one['js_max'])} at most (Jensen–Shannon, 0 to 1{even})")  # fmt: skip
    return lines


def _amount(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "below 0.001"


def _legend(figure: Any, plan: _Plan) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, label=short(name, 26)) for name, colour in zip(plan.names, plan.colours, strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, -0.02),
        ncols=_COLUMNS,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.6,
        borderaxespad=0.2,
    )


# ---------------------------------------------------------------- a line per client


def _in_lines(figure: Any, plan: _Plan, report: Mapping[str, Any], tips: Tips) -> None:
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    ys = list(range(len(plan.bars)))
    starts = [0] * len(plan.bars)
    for place, (name, colour) in enumerate(zip(plan.names, plan.colours, strict=True)):
        counts = [bar.counts[place] for bar in plan.bars]
        left.barh(ys, counts, left=starts, height=0.66, color=colour, edgecolor=PAPER, linewidth=0.6)
        for y, bar in enumerate(plan.bars):
            if counts[y]:
                spot = (starts[y], starts[y] + counts[y])
                tips.box(left, spot, (y - 0.33, y + 0.33), f"{bar.id}: {counts[y]:,} rows of {name}")
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    most = max(starts)
    for y, total in zip(ys, starts, strict=True):
        left.annotate(
            f"{total:,}", (total, y), xytext=(5, 0), textcoords="offset points", va="center", color=MUTED, fontsize=9
        )
    left.set_xlim(0, max(most, 1) * 1.09)
    left.set_yticks(ys, [short(bar.id, 24) for bar in plan.bars])
    left.tick_params(axis="y", labelcolor=INK)
    left.set_ylim(len(plan.bars) - 0.45, -1.0)  # from top to bottom, with room for the limit's name
    left.set_title("rows" + (" by category" if plan.by_category else ""), loc="left", fontsize=10)
    left.grid(visible=False, axis="y")
    _thousands(left, "x")
    for y, bar in enumerate(plan.bars):
        if not bar.lengths:
            continue
        p10, p25, p50, p75, p90 = (bar.lengths[name] for name in ("p10", "p25", "p50", "p75", "p90"))
        right.plot((p10, p90), (y, y), color=ACCENT, linewidth=1.4, alpha=0.55, solid_capstyle="round")
        right.plot((p25, p75), (y, y), color=ACCENT, linewidth=6, alpha=0.45, solid_capstyle="butt")
        right.plot((p50,), (y,), marker="o", markersize=5.5, color=ACCENT, markeredgecolor=PAPER, markeredgewidth=0.9)
        tips.box(right, (p10, p90), (y - 0.33, y + 0.33), f"{bar.id}: {p50:,} tokens, mostly {p10:,} to {p90:,}")
    _length_axis(right, plan, report, "x")
    right.set_title("tokens per row: median, middle half, 10 to 90 %", loc="left", fontsize=10)
    right.grid(visible=False, axis="y")
    right.tick_params(axis="y", labelleft=False)


# ---------------------------------------------------------------- many clients side by side


def _side_by_side(figure: Any, plan: _Plan, report: Mapping[str, Any], tips: Tips) -> None:
    import numpy as np

    number = len(plan.bars)
    counts = np.asarray([bar.counts for bar in plan.bars], dtype=np.float64)
    totals = counts.sum(axis=1)
    edges = np.arange(number + 1)

    def steps(values: Any) -> Any:
        return np.append(values, values[-1:])

    ratios = (1.6, 0.9, 1.0) if plan.by_category else (0.9, 1.0)
    found = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    if plan.by_category:
        # Each client's largest category is at the bottom, and clients are in the order of it.
        shares = counts / np.maximum(totals[:, None], 1)
        top = shares.argmax(axis=1)
        order = np.lexsort((-shares.max(axis=1), top))
        shares, top = shares[order], top[order]
        largest = shares[np.arange(number), top]
        base = largest.copy()
        for place, colour in enumerate(plan.colours):
            mine = top == place
            lower = np.where(mine, 0.0, base)
            upper = np.where(mine, largest, base + shares[:, place])
            for where, alpha in ((mine, 1.0), (~mine, 0.5)):
                ends = steps(lower), steps(np.where(where, upper, lower))
                found[0].fill_between(
                    edges, *ends, step="post", color=colour, alpha=alpha, linewidth=0, antialiased=False
                )
            base = np.where(mine, base, upper)
        found[0].set_ylim(0, 1)
        percent_axis(found[0], "y")
        found[0].grid(visible=False)
        found[0].set_title("shares of categories, the client's largest at the bottom", loc="left", fontsize=10)
    sizes, lengths = found[-2], found[-1]
    order = np.argsort(-totals, kind="stable")
    sizes.fill_between(edges, steps(totals[order]), step="post", color=ACCENT, alpha=0.8, linewidth=0)
    sizes.set_ylim(bottom=0)
    if totals.max() > 30 * max(1.0, float(np.median(totals))):
        sizes.set_yscale("log")
        sizes.set_ylim(bottom=0.8)
    _thousands(sizes, "y")
    sizes.set_title("rows, the largest client first", loc="left", fontsize=10)
    step = max(1, number // 200)
    for x in range(0, number, step):
        tips.box(sizes, (x, x + step), (0, totals[order[x]]), f"{plan.bars[order[x]].id}: {totals[order[x]]:,.0f} rows")
    known = sorted((bar.lengths for bar in plan.bars if bar.lengths), key=lambda one: (one["p50"], one["p90"]))
    at = np.arange(len(known) + 1)
    for low, high, alpha in (("p10", "p90", 0.22), ("p25", "p75", 0.4)):
        values = [np.asarray([one[name] for one in known]) for name in (low, high)]
        lengths.fill_between(at, *map(steps, values), step="post", color=ACCENT, alpha=alpha, linewidth=0)
    lengths.step(at, steps(np.asarray([one["p50"] for one in known])), where="post", color=ACCENT, linewidth=1.8)
    _length_axis(lengths, plan, report, "y")
    said = "tokens per row, clients by their median: median, middle half, 10 to 90 %"
    lengths.set_title(said, loc="left", fontsize=10)
    lengths.set_xlim(0, number)
    lengths.set_xlabel(f"{number:,} clients, in an order of its own in each part")
    _thousands(lengths, "x")
    for axes in found[:-1]:
        axes.tick_params(axis="x", labelbottom=False)


# ---------------------------------------------------------------- axes


def _length_axis(axes: Axes, plan: _Plan, report: Mapping[str, Any], which: str) -> None:
    """Tokens, on a scale that shows short and long ones; with the limit, where rows reach it."""
    low = min((bar.lengths["p10"] for bar in plan.bars if bar.lengths), default=1)
    high = max((bar.lengths["p90"] for bar in plan.bars if bar.lengths), default=1)
    wide = high > 12 * max(low, 1)
    limits = (0.8 * max(low, 1), 1.25 * high) if wide else (0, 1.08 * high)
    if which == "x":
        if wide:
            axes.set_xscale("log")
        axes.set_xlim(*limits)
    else:
        if wide:
            axes.set_yscale("log")
        axes.set_ylim(*limits)
    _thousands(axes, which)
    limit = report.get("max_length")
    if limit is not None and limits[0] < limit < limits[1]:
        line = axes.axvline if which == "x" else axes.axhline
        line(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        place = (limit, 1.0) if which == "x" else (1.0, limit)
        axes.annotate(
            f"max_length {limit:,}",
            place,
            xycoords=axes.get_xaxis_transform() if which == "x" else axes.get_yaxis_transform(),
            xytext=(-4, -10) if which == "x" else (-2, 3),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=8.5,
        )


def _thousands(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(nbins=5 if which == "x" else 4, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
