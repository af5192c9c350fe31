"""The report's pictures, as inline SVG that follows the page's theme.

Every picture is drawn once, in stand-in colours; the SVG then gets CSS variables in their place, so that one file
serves light and dark. Text stays text: it can be searched and takes the page's font. A user's own matplotlib settings
neither show nor are changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bytes_picture", "clients_picture", "loss_picture", "score_picture"]

# Stand-in colours, replaced by the page's variables; unlikely enough not to be met otherwise.
_INK, _MUTED, _GRID, _PAPER = "#010203", "#020304", "#030405", "#040506"
_ARM_COLOURS = {"base": "#050607", "local": "#060708", "federated": "#070809", "global": "#08090a"}
_OTHER_COLOUR = "#090a0b"
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _PAPER: "card",
    **{colour: f"arm-{arm}" for arm, colour in _ARM_COLOURS.items()},
    _OTHER_COLOUR: "arm-other",
}
# Shape says the arm as well as colour does, for those who see colours otherwise and for paper.
_MARKERS = {"base": "X", "local": "s", "federated": "o", "global": "D"}

_WIDTH_INCHES = 4.7
_MAX_CLIENT_ROWS = 30
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedloom",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

_drawn: dict[str, str] = {}  # a report is rewritten as the run goes, and most of its pictures stay as they are
_DRAWN_LIMIT = 32


def _colour(arm: str) -> str:
    return _ARM_COLOURS.get(arm, _OTHER_COLOUR)


def short(name: str, width: int = 18) -> str:
    """A name from data as a label: no control characters (SVG has none), no line breaks, not too long."""
    clean = "".join(char if char.isprintable() else "\ufffd" for char in name) or "(no name)"
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def _picture(name: str, data: Any, height: float, draw: Callable[[Figure, Axes], None]) -> str:
    """The SVG of a figure; the same text again, without drawing, while `data` is the same."""
    key = hashlib.sha256(json.dumps([name, data], sort_keys=True).encode()).hexdigest()
    if key not in _drawn:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_SETTINGS)
            figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
            FigureCanvasSVG(figure)
            draw(figure, figure.add_subplot())
            target = io.StringIO()
            figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        while len(_drawn) >= _DRAWN_LIMIT:
            _drawn.pop(next(iter(_drawn)))
        _drawn[key] = _for_page(target.getvalue(), name)
    return _drawn[key]


def _for_page(svg: str, name: str) -> str:
    """A file's SVG as a part of a page: no prologue, no size, the page's colours and font, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    if view is None:  # pragma: no cover  matplotlib always writes one
        raise ValueError("the picture has no viewBox")
    # Only inside style attributes: a client's name is text and stays as it is.
    rest = re.sub(r'style="[^"]*"', lambda found: _themed(found[0]), rest)
    rest = re.sub(r'(<[^<>]* )id="([^"]*)"', rf'\1id="{name}-\2"', rest)
    rest = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', rest)
    rest = re.sub(r'"url\(#([^)]*)\)"', rf'"url(#{name}-\1)"', rest)
    return f'<svg {view[0]} aria-hidden="true">{rest}'


def _themed(style: str) -> str:
    for stand_in, variable in _VARIABLES.items():
        style = style.replace(stand_in, f"var(--{variable})")
    style = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", style)
    return re.sub(r"font: ([^;\"']*?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", style)


def _percent_axis(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def score_picture(arms: Mapping[str, Mapping[str, Any]], measure: str) -> str:
    """A bar per arm on the common test set; `measure` is "score" (a share) or "loss" (nats per answer token).

    With scores, a tick marks each client on its own test set.
    """
    shares = measure == "score"
    values = {arm: one[measure] for arm, one in arms.items() if one[measure] is not None}
    ticks: dict[str, list[float]] = {
        arm: [x for x in arms[arm]["own_test"]["score_per_client"].values() if x is not None] if shares else []
        for arm in values
    }

    def draw(figure: Figure, axes: Axes) -> None:
        rows = range(len(values))
        axes.barh(rows, list(values.values()), height=0.58, color=[_colour(arm) for arm in values])
        span = 1.0 if shares else max(values.values()) or 1.0
        for row, (arm, value) in enumerate(values.items()):
            if ticks[arm] and len(ticks[arm]) <= 200:
                axes.scatter(ticks[arm], [row + 0.39] * len(ticks[arm]), marker="|", s=22, color=_MUTED, linewidths=1.1)
            text = f"{100 * value:.1f} %" if shares else f"{value:.3f}"
            inside = value > 0.82 * span
            axes.annotate(
                text,
                (value, row),
                xytext=(-6 if inside else 6, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                color=_PAPER if inside else _INK,
                fontweight="bold",
            )
        axes.set_yticks(rows, [short(arm) for arm in values])
        axes.tick_params(axis="y", labelcolor=_INK, labelsize=10.5)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, span * (1.0 if shares else 1.02))
        if shares:
            _percent_axis(axes, "x")
            axes.set_xlabel(
                "score on the common test set; ticks: clients on their own"
                if any(ticks.values())
                else "score on the common test set"
            )
        else:
            axes.set_xlabel("loss on the common test set (nats per answer token)")

    return _picture("score", [values, ticks, measure], 0.9 + 0.55 * len(values), draw)


def loss_picture(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """Training (thin) and validation loss (thick) over the rounds, for each arm that trains."""
    data: dict[str, dict[str, list[list[float]]]] = {}
    for arm in arms:
        own = [line for line in lines if line["arm"] == arm]
        curves = {
            name: [[line["round"], line[f"{name}_loss"]] for line in own if line.get(f"{name}_loss") is not None]
            for name in ("train", "val")
        }
        if any(curves.values()):
            data[arm] = curves

    def draw(figure: Figure, axes: Axes) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator

        for arm, curves in data.items():
            colour = _colour(arm)
            if curves["train"]:
                x, y = zip(*curves["train"], strict=True)
                axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.55, marker="." if len(x) == 1 else "")
            if curves["val"]:
                x, y = zip(*curves["val"], strict=True)
                every = max(1, len(x) // 10)
                axes.plot(x, y, color=colour, linewidth=2.2, solid_capstyle="round")
                axes.plot(
                    x, y, color=colour, linestyle="", marker=_MARKERS.get(arm, "v"), markersize=5, markevery=every
                )
        axes.set_xlabel("round")
        axes.set_ylabel("loss (nats per answer token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.02, y=0.07)
        seen = [point[1] for curves in data.values() for curve in curves.values() for point in curve]
        if 0 <= min(seen) < 0.6 * max(seen):  # from zero where that leaves room to see the change
            axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        handles = [
            Line2D(
                [], [], color=_colour(arm), linewidth=2.2, marker=_MARKERS.get(arm, "v"), markersize=5, label=short(arm)
            )
            for arm in data
        ]
        for name, width, alpha in (("train", 1.0, 0.55), ("val", 2.2, 1.0)):
            if any(curves[name] for curves in data.values()):
                text = "training" if name == "train" else "validation"
                handles.append(Line2D([], [], color=_MUTED, linewidth=width, alpha=alpha, label=text))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.4)

    return _picture("loss", data, 3.3, draw)


def clients_picture(arms: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    """Each client's score on its own test set, by arm: a row per client, or one curve per arm when there are many."""
    data = {arm: [one["own_test"]["score_per_client"].get(client) for client in order] for arm, one in arms.items()}
    many = len(order) > _MAX_CLIENT_ROWS

    def rows(axes: Axes) -> None:
        for row in range(len(order)):
            known = [values[row] for values in data.values() if values[row] is not None]
            if known:
                axes.plot(
                    [min(known), max(known)], [row, row], color=_GRID, linewidth=3, zorder=1.5, solid_capstyle="round"
                )
        for arm, values in data.items():
            points = [(value, row) for row, value in enumerate(values) if value is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            axes.scatter(
                x, y, s=46, marker=_MARKERS.get(arm, "v"), color=_colour(arm), edgecolors=_PAPER, linewidths=0.8,
                zorder=2 + list(data).index(arm), label=short(arm), clip_on=False,
            )  # fmt: skip
        axes.set_yticks(range(len(order)), [short(client) for client in order])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        _percent_axis(axes, "x")
        axes.set_xlabel("score on the client's own test set")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)

    def curves(axes: Axes) -> None:
        for arm, values in data.items():
            known = sorted(value for value in values if value is not None)
            if not known:
                continue
            shares = [(i + 0.5) / len(known) for i in range(len(known))]
            every = max(1, len(known) // 8)
            axes.plot(
                shares, known, color=_colour(arm), linewidth=2.2, marker=_MARKERS.get(arm, "v"), markersize=5,
                markevery=every, label=short(arm),
            )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.02, 1.02)
        _percent_axis(axes, "x")
        _percent_axis(axes, "y")
        axes.set_xlabel("share of the clients, from the worst to the best")
        axes.set_ylabel("score on the own test set")

    def draw(figure: Figure, axes: Axes) -> None:
        (curves if many else rows)(axes)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, handletextpad=0.3, columnspacing=1.4)

    return _picture("clients", [data, list(order)], 3.4 if many else 1.15 + 0.31 * max(len(order), 2), draw)


def bytes_picture(per_arm: Mapping[str, tuple[float, float]], whole_model: float | None) -> str:
    """Bytes a client sends and receives in a round, by arm, and for comparison what all weights would be."""
    from fedloom.study.progress import byte_text

    data = [[arm, up, down] for arm, (up, down) in per_arm.items()]

    def draw(figure: Figure, axes: Axes) -> None:
        bars: list[tuple[str, float, str]] = []
        for arm, (up, down) in per_arm.items():
            bars.append((f"{short(arm)}, sent", up, _colour(arm)))
            bars.append((f"{short(arm)}, received", down, _colour(arm)))
        if whole_model:
            bars.append(("all weights", whole_model, _MUTED))
        largest = max(value for _, value, _ in bars)
        for row, (_, value, colour) in enumerate(bars):
            axes.barh(row, value, height=0.58, color=colour)
            inside = value > 0.75 * largest
            axes.annotate(
                byte_text(value), (value, row), xytext=(-6 if inside else 6, 0), textcoords="offset points",
                ha="right" if inside else "left", va="center", color=_PAPER if inside else _INK, fontweight="bold",
            )  # fmt: skip
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_xlim(0, largest * 1.02)
        axes.set_xlabel("bytes per client and round")
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return _picture("bytes", [data, whole_model], 0.6 + 0.5 * (2 * len(per_arm) + bool(whole_model)), draw)
