"""Drawing for the reports: one theme, shapes with colours, names beside lines, and values to hover.

Every picture is drawn once, in the light theme's colours. On a page they become CSS variables, so that one file serves
light and dark; in a picture file of its own they stay. Text stays text: it can be searched and takes the page's font. A
user's own matplotlib settings neither show nor are changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "PICTURE_FILES",
    "SECOND",
    "Draw",
    "Tips",
    "arm_colour",
    "arm_marker",
    "check_picture_file",
    "end_names",
    "names_beside",
    "percent_axis",
    "picture",
    "picture_file",
    "series_colour",
    "series_marker",
    "share_limits",
    "short",
    "tick",
]

# As in page.css, where the variables are that take their place; each colour is there once.
INK, MUTED, GRID, PAPER = "#1b1f24", "#5c6570", "#e4e3de", "#ffffff"
_ARMS = {"base": "#7d858f", "local": "#c97700", "federated": "#0067a8", "global": "#00825e"}
# For runs and settings, in this order. Blue, orange, green, purple and so on are told apart by all kinds of eyes, and
# each comes with a shape of its own.
_SERIES = ("#0067a8", "#c97700", "#00825e", "#a0478a", "#b5402f", "#3d7f99", "#8a6d00", "#4d5a66")
ACCENT = _ARMS["federated"]
SECOND = _SERIES[4]  # against the accent: worse, where the accent is better
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "card",
    **{colour: f"series-{place}" for place, colour in enumerate(_SERIES)},
    **{colour: f"arm-{arm}" for arm, colour in _ARMS.items()},
}
# Shape says the arm as well as colour does, for those who see colours otherwise and for paper.
_ARM_MARKERS = {"base": "X", "local": "s", "federated": "o", "global": "D"}
_SERIES_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")

PICTURE_FILES = (".svg", ".png", ".pdf")
WIDTH_INCHES = 4.7
_POINTS = 72.0  # per inch, and the figure's dots: a place in the figure is a place in the SVG
_FONT = 10.0
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedloom",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": _FONT,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": _FONT - 0.5,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

_drawn: dict[str, str] = {}  # a report is rewritten as the run goes, and most of its pictures stay as they are
_DRAWN_LIMIT = 64
_MOST_TIPS = 1200


def arm_colour(arm: str) -> str:
    """The colour of an arm, the same in every picture and table."""
    return _ARMS.get(arm, _SERIES[3])


def arm_marker(arm: str) -> str:
    return _ARM_MARKERS.get(arm, "v")


def series_colour(place: int) -> str:
    """The colour of the run or setting at `place`; past the eighth they are grey and told apart by name alone."""
    return _SERIES[place] if place < len(_SERIES) else MUTED


def series_marker(place: int) -> str:
    return _SERIES_MARKERS[place] if place < len(_SERIES_MARKERS) else "."


def short(name: str, width: int = 18) -> str:
    """A name from data as a label: no control characters (SVG has none), no line breaks, not too long."""
    clean = "".join(char if char.isprintable() else "\ufffd" for char in name) or "(no name)"
    return clean if len(clean) <= width else clean[: width - 1] + "…"


class Tips:
    """Values to hover over: places in a picture, in data coordinates, with what is said there."""

    def __init__(self) -> None:
        self._spots: list[tuple[Axes, tuple[float, float], tuple[float, float] | None, str]] = []

    def point(self, axes: Axes, x: float, y: float, text: str) -> None:
        self._spots.append((axes, (x, y), None, text))

    def box(self, axes: Axes, x: tuple[float, float], y: tuple[float, float], text: str) -> None:
        self._spots.append((axes, (x[0], y[0]), (x[1], y[1]), text))

    def svg(self, height: float) -> str:
        """As elements to lie over the drawn figure of this height, in points."""
        from markupsafe import escape

        parts = []
        for axes, (x, y), other, text in self._spots[:_MOST_TIPS]:
            left, bottom = axes.transData.transform((x, y))
            title = f"<title>{escape(short(text, 160))}</title>"
            if other is None:
                parts.append(f'<circle cx="{left:.1f}" cy="{height - bottom:.1f}" r="7">{title}</circle>')
            else:
                right, top = axes.transData.transform(other)
                across = sorted((left, right))
                down = sorted((height - bottom, height - top))
                wide, tall = max(across[1] - across[0], 4.0), max(down[1] - down[0], 4.0)
                place = f'x="{across[0]:.1f}" y="{down[0]:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
                parts.append(f"<rect {place}>{title}</rect>")
        return f'<g class="tips">{"".join(parts)}</g>' if parts else ""


Draw = Callable[["Figure", Tips], None]


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=_POINTS, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def picture(name: str, data: Any, height: float, draw: Draw) -> str:
    """The SVG of a figure, for a page; the same text again, without drawing, while `data` is the same.

    `name` is the figure's on its page: its finding has the id `name`-is, and its explanation `name`-about.
    """
    key = hashlib.sha256(json.dumps([name, data, height], sort_keys=True).encode()).hexdigest()
    if key not in _drawn:
        tips = Tips()
        with _figure(height) as figure:
            draw(figure, tips)
            target = io.StringIO()
            nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(target, format="svg", metadata=nothing)
            over = tips.svg(height * _POINTS)
        while len(_drawn) >= _DRAWN_LIMIT:
            _drawn.pop(next(iter(_drawn)))
        _drawn[key] = _for_page(target.getvalue(), over, name)
    return _drawn[key]


def picture_file(path: Path, height: float, draw: Draw) -> None:
    """Write a picture of its own, in the light theme: an SVG, PNG or PDF, as the name ends.

    Raises:
        UserError: the name ends otherwise, or the folder is not there. RunError: the disk is full.
    """
    from fedloom.study.folder import write_atomic

    check_picture_file(path)
    target = io.BytesIO()
    with _figure(height) as figure:
        draw(figure, Tips())
        metadata = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else {}
        figure.savefig(
            target,
            format=path.suffix[1:],
            dpi=220,
            facecolor=PAPER,
            bbox_inches="tight",
            pad_inches=0.12,
            metadata={**metadata, "Creator": "fedloom"},
        )
    write_atomic(path, target.getvalue())


def check_picture_file(path: Path) -> None:
    """Refuse a picture file that could not be written.

    Raises:
        UserError: its name ends with none of `PICTURE_FILES`, or the folder is not there.
    """
    if path.suffix not in PICTURE_FILES:
        ending = f"ends with {path.suffix}" if path.suffix else "has no ending"
        raise UserError(
            f"{path} {ending}, and a picture is written as {', '.join(PICTURE_FILES)}",
            f"name it {path.with_suffix('.svg')}",
            code="report.picture",
        )
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}", code="report.dest")


def _for_page(svg: str, over: str, name: str) -> str:
    """A file's SVG as a part of a page: without prologue, style sheet and size, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    if view is None:  # pragma: no cover  matplotlib always writes one
        raise ValueError("the picture has no viewBox")
    # Only inside style attributes: a client's name is text and stays as it is.
    rest = re.sub(r'style="[^"]*"', lambda found: _themed(found[0]), rest)
    # Groups' names are matplotlib's own business; what is referred to keeps an id.
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub(r'(<[^<>]* )id="([^"]*)"', rf'\1id="{name}-\2"', rest)
    rest = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', rest)
    rest = re.sub(r'"url\(#([^)]*)\)"', rf'"url(#{name}-\1)"', rest)
    rest = re.sub(r">\s+<(?!/?text)", "><", rest)
    end = rest.rindex("</svg>")
    return (
        f'<svg {view[0]} role="img" aria-labelledby="{name}-is" aria-describedby="{name}-about">'
        f"{rest[:end]}{over}</svg>\n"
    )


def _themed(style: str) -> str:
    for stand_in, variable in _VARIABLES.items():
        style = style.replace(stand_in, f"var(--{variable})")
    style = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", style)
    return re.sub(r"font: ([^;\"']*?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", style)


# ------------------------------------------------------------------------------------------------------------- parts


def percent_axis(axes: Axes, which: str) -> None:
    """Shares as per cent along "x" or "y"."""
    from matplotlib.ticker import FuncFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):.3g} %"))


def tick(text: str) -> str:
    """A number with its unit as a tick of an axis: 10.0 MB is 10 MB there."""
    return re.sub(r"\.0(?=\D|$)", "", text)


def share_limits(values: Iterable[float]) -> tuple[float, float]:
    """The limits of an axis of shares: all of 0 to 1, unless all the values are small, and then from 0 all the same."""
    high = max(values, default=1.0)
    top = 1.0 if high > 0.4 else max(1.2 * high, 0.01)
    return -0.02 * top, 1.02 * top


def _text_width(text: str, size: float) -> float:
    return 0.56 * size * len(text)


def end_names(axes: Axes, ends: Sequence[tuple[float, float, str, str]], height_points: float) -> None:
    """Names to the right of lines' ends, (x, y, name, colour) each, pushed apart where they would overlap.

    Call it last: it reads the limits of the axes. `height_points` is about how tall the axes will be.
    """
    if not ends:
        return
    to_share = axes.transData + axes.transAxes.inverted()
    gap = min((_FONT + 2.5) / height_points, 1.0 / max(len(ends) - 1, 1))
    order = sorted(range(len(ends)), key=lambda i: (to_share.transform(ends[i][:2])[1], -i))
    places = [float(to_share.transform(ends[i][:2])[1]) for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    if places[-1] > 1.0:  # what was pushed above the top comes down again, in the same order
        places[-1] = 1.0
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    for i, place in zip(order, places, strict=True):
        x, y, name, colour = ends[i]
        moved = abs(place - float(to_share.transform((x, y))[1])) * height_points > 3
        axes.annotate(
            name,
            (x, y),
            xytext=(1.035, place),
            textcoords="axes fraction",
            va="center",
            ha="left",
            color=INK,
            fontsize=_FONT - 0.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            }
            if moved
            else None,
        )


class _Box(NamedTuple):
    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )


def names_beside(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    width_points: float,
    height_points: float,
    avoid: Sequence[tuple[float, float]] = (),
) -> list[str]:
    """Names beside points where there is room for them, the first ones first; returns those that found none.

    No name lies over a point, or over a place of `avoid`. Call it last: it reads the limits of the axes, whose size
    will be about the one that is given.
    """
    to_share = axes.transData + axes.transAxes.inverted()
    size = _FONT - 1.0
    places = [to_share.transform((x, y)) * (width_points, height_points) for x, y, _ in points]
    others = [to_share.transform(place) * (width_points, height_points) for place in avoid]
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in (*places, *others)]
    left_out = []
    for (x, y, name), at in zip(points, places, strict=True):
        wide, tall = _text_width(name, size), size + 1
        for right, up in ((7, 0), (-7 - wide, 0), (-wide / 2, 11), (-wide / 2, -11), (6, 9), (6, -9), (-6 - wide, 9)):
            box = _Box(at[0] + right, at[1] + up - tall / 2, at[0] + right + wide, at[1] + up + tall / 2)
            inside = box.left > -4 and box.right < width_points + 4 and box.bottom > -2 and box.top < height_points + 6
            if inside and not any(box.meets(other) for other in taken):
                taken.append(box)
                axes.annotate(
                    name, (x, y), xytext=(right, up), textcoords="offset points", ha="left", va="center",
                    fontsize=size, color=INK, annotation_clip=False,
                )  # fmt: skip
                break
        else:
            left_out.append(name)
    return left_out
