"""The pictures of several runs and of suites: scores side by side, rounds, quality against bytes, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.study.draw import (
    ACCENT,
    GRID,
    INK,
    MUTED,
    PAPER,
    SECOND,
    Draw,
    Tips,
    arm_colour,
    arm_marker,
    end_names,
    names_beside,
    percent_axis,
    picture,
    series_colour,
    series_marker,
    share_limits,
    short,
    tick,
)
from fedloom.study.progress import byte_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Contrast",
    "Mark",
    "Point",
    "contrasts_picture",
    "marks_picture",
    "quality_bytes",
    "quality_bytes_picture",
    "rounds_picture",
]

_MOST_ROWS = 40
_MOST_CURVES = 8  # with a colour and a name of their own


def _value_text(value: float, shares: bool) -> str:
    return f"{100 * value:.1f} %" if shares else f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def _value_axis(axes: Axes, which: str, shares: bool, values: Sequence[float]) -> None:
    """Shares from 0; anything else from where it is, or from 0 where that leaves room to see differences."""
    low, high = min(values), max(values)
    if shares:
        limits = share_limits(values)
        percent_axis(axes, which)
    elif 0 <= low < 0.6 * high:
        limits = (0.0, 1.08 * high)
    else:
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        limits = (low - margin, high + margin)
    if which == "x":
        axes.set_xlim(*limits)
    else:
        axes.set_ylim(*limits)


class Mark(NamedTuple):
    """A value of an arm, with the standard deviation over seeds where there is one."""

    arm: str
    value: float
    std: float | None
    about: str  # to hover over


def marks_picture(name: str, rows: Sequence[tuple[str, Sequence[Mark]]], what: str, shares: bool) -> str:
    """A row per run or choice of settings, with a mark for each arm, and whiskers of one standard deviation."""
    rows = rows[:_MOST_ROWS]
    arms = list(dict.fromkeys(mark.arm for _, marks in rows for mark in marks))
    values = [mark.value + sign * (mark.std or 0.0) for _, marks in rows for mark in marks for sign in (-1, 0, 1)]

    def draw(figure: Figure, tips: Tips) -> None:
        from matplotlib.lines import Line2D

        axes = figure.add_subplot()
        spans = [(row, [mark.value for mark in marks]) for row, (_, marks) in enumerate(rows) if marks]
        axes.hlines(
            [row for row, _ in spans], [min(own) for _, own in spans], [max(own) for _, own in spans],
            color=GRID, linewidth=3, zorder=1.5,
        )  # fmt: skip
        for order, arm in enumerate(arms):
            own = [(mark, row) for row, (_, marks) in enumerate(rows) for mark in marks if mark.arm == arm]
            x, y = [mark.value for mark, _ in own], [row for _, row in own]
            colour = arm_colour(arm)
            if any(mark.std for mark, _ in own):
                axes.errorbar(
                    x, y, xerr=[mark.std or 0.0 for mark, _ in own], color=colour, linewidth=0, elinewidth=1.4,
                    capsize=2.5, zorder=2 + order,
                )  # fmt: skip
            axes.scatter(
                x, y, s=44, marker=arm_marker(arm), color=colour, edgecolors=PAPER, linewidths=0.8, zorder=3 + order,
                clip_on=False,
            )  # fmt: skip
            for mark, row in own:
                tips.point(axes, mark.value, row, mark.about)
        axes.set_yticks(range(len(rows)), [short(label, 30) for label, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=9.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _value_axis(axes, "x", shares, values)
        axes.set_xlabel(what)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        handles = [
            Line2D(
                [], [], color=arm_colour(arm), marker=arm_marker(arm), linestyle="", markersize=6.5,
                markeredgecolor=PAPER, label=short(arm),
            )
            for arm in arms
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2)

    data = [[label, [list(mark) for mark in marks]] for label, marks in rows]
    return picture(name, [data, what, shares], 1.1 + 0.3 * max(len(rows), 2), draw)


def rounds_picture(
    name: str, curves: Mapping[str, Sequence[Sequence[float]]], what: str, shares: bool, axis: str = "round"
) -> str:
    """A value over the rounds, as (round, value) of each run; past the eighth, runs are grey and have no name.

    `axis` is what stands in the place of rounds.
    """
    data = {run: [list(point) for point in points] for run, points in curves.items()}

    def draw(figure: Figure, tips: Tips) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        ends = []
        for place, (run, points) in enumerate(data.items()):
            x, y = zip(*points, strict=True)
            named = place < _MOST_CURVES
            axes.plot(
                x, y, color=series_colour(place), linewidth=2.1 if named else 0.9, alpha=1.0 if named else 0.6,
                marker=series_marker(place) if named else "", markersize=5, markevery=max(1, len(x) // 10),
                solid_capstyle="round", clip_on=False, zorder=3 if named else 2,
            )  # fmt: skip
            if named:
                ends.append((x[-1], y[-1], short(run, 20), series_colour(place)))
            for at, value in points:
                tips.point(axes, at, value, f"{short(run, 60)}, {axis} {at:,.0f}: {_value_text(value, shares)}")
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.02)
        _value_axis(axes, "y", shares, [value for points in data.values() for _, value in points])
        axes.set_ylabel(what)
        end_names(axes, ends, 190)

    return picture(name, [list(data.items()), what, shares, axis], 3.3, draw)


# ---------------------------------------------------------------------------------------------- quality against bytes


class Point(NamedTuple):
    """What an arm reached with one choice of settings, and the bytes that it took."""

    series: str  # the run, or the choice of settings; "" where there is but one
    arm: str
    bytes: float
    value: float
    std: float | None


def quality_bytes(
    panels: Sequence[tuple[str, Sequence[Point]]], what: str, shares: bool
) -> tuple[list[Any], float, Draw] | None:
    """Quality against all bytes sent and received: a panel per title, a point per arm and series.

    Returns what `picture` and `picture_file` take: data, height and how to draw. None where nothing was sent, as there
    is nothing to weigh then.
    """
    panels = [(title, points) for title, points in panels if any(point.bytes > 0 for point in points)]
    if not panels:
        return None
    series = list(dict.fromkeys(point.series for _, points in panels for point in points))
    arms = list(dict.fromkeys(point.arm for _, points in panels for point in points))
    by_series = 1 < len(series) <= _MOST_CURVES
    height = 0.55 + 2.75 * len(panels)

    def colour(point: Point) -> str:
        return series_colour(series.index(point.series)) if by_series else arm_colour(point.arm)

    def panel(axes: Axes, tips: Tips, points: Sequence[Point]) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        sent = [point.bytes for point in points if point.bytes > 0]
        wide = max(sent) > 12 * min(sent)  # then a place of its own for what sends nothing, left of a log scale
        nothing = 0.0
        if wide:
            axes.set_xscale("log")
            nothing = min(sent) / 6
            axes.set_xlim(nothing / 1.8, max(sent) * 2.2)
            if any(point.bytes == 0 for point in points):
                axes.axvline(nothing * 2.2, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        else:
            axes.set_xlim(-0.07 * max(sent), 1.14 * max(sent))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(byte_text(x)) if x > 0 else "0"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        spans = [point.value + sign * (point.std or 0.0) for point in points for sign in (-1, 0, 1)]
        _value_axis(axes, "y", shares, spans)
        named = []
        for point in points:
            x = point.bytes if point.bytes > 0 else nothing
            if point.std:
                axes.errorbar([x], [point.value], yerr=[point.std], color=colour(point), linewidth=1.3, capsize=2.5)
            axes.scatter(
                [x], [point.value], s=58, marker=arm_marker(point.arm), color=colour(point), edgecolors=PAPER,
                linewidths=0.8, zorder=3, clip_on=False,
            )  # fmt: skip
            deviation = f" ± {_value_text(point.std, shares)}" if point.std is not None else ""
            run = f"{short(point.series, 60)}, " if point.series else ""
            text = f"{run}{point.arm}: {_value_text(point.value, shares)}{deviation} for {byte_text(point.bytes)}"
            tips.point(axes, x, point.value, text)
            if by_series and point.bytes > 0:
                named.append((x, point.value, short(point.series, 22)))
        if wide and any(point.bytes == 0 for point in points):
            ticks = [tick for tick in axes.get_xticks() if min(sent) / 2 < tick < max(sent) * 2.2]
            axes.set_xticks([nothing, *ticks])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "none" if x <= nothing else tick(byte_text(x))))
        marks = [(point.bytes if point.bytes > 0 else nothing, point.value) for point in points]
        names_beside(axes, named, 270, 150, marks)

    def draw(figure: Figure, tips: Tips) -> None:
        from matplotlib.lines import Line2D

        places = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (title, points) in zip(places, panels, strict=True):
            panel(axes, tips, points)
            if len(panels) > 1:
                axes.set_title(short(title, 60), loc="left", fontsize=10, color=INK)
            axes.set_ylabel(what)
        places[-1].set_xlabel("sent and received by all clients, in all")
        handles = [
            Line2D(
                [], [], color=MUTED if by_series else arm_colour(arm), marker=arm_marker(arm), linestyle="",
                markersize=7, markeredgecolor=PAPER, label=short(arm),
            )
            for arm in arms
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2)

    data = [[[title, [list(point) for point in points]] for title, points in panels], what, shares]
    return data, height, draw


def quality_bytes_picture(name: str, points: Sequence[Point], what: str, shares: bool) -> str:
    """`quality_bytes` in one panel, for a page; empty where nothing was sent."""
    drawn = quality_bytes([("", points)], what, shares)
    return picture(name, *drawn) if drawn is not None else ""


# -------------------------------------------------------------------------------------------------------- differences


class Contrast(NamedTuple):
    """The mean difference of two arms or settings over seeds, with its interval."""

    pair: str  # "federated − local": rows of one pair stand together
    label: str  # with which settings
    comparison: str  # "rounds" or "samples"
    mean: float
    low: float | None
    high: float | None
    resolved: bool
    better: bool  # the first of the pair is the better one, going by the mean
    about: str  # to hover over


def contrasts_picture(name: str, contrasts: Sequence[Contrast], what: str, points: bool) -> str:
    """Differences with their intervals around 0, a panel with a scale of its own per pair. Hollow: not resolved.

    `points` says that the values are shares, shown in percentage points.
    """
    scale = 100.0 if points else 1.0
    panels: dict[str, dict[str, list[Contrast]]] = {}
    for one in contrasts:
        panels.setdefault(one.pair, {}).setdefault(one.label, []).append(one)
    kept: list[tuple[str, list[tuple[str, list[Contrast]]]]] = []
    room = _MOST_ROWS
    for pair, by_label in panels.items():
        rows = list(by_label.items())[:room]
        room -= len(rows) + 1
        if rows:
            kept.append((pair, rows))
    seen = [one for _, rows in kept for _, own in rows for one in own]
    both = len({one.comparison for one in seen}) > 1

    def panel(axes: Axes, tips: Tips, pair: str, rows: Sequence[tuple[str, Sequence[Contrast]]]) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.axvline(0, color=MUTED, linewidth=1.2)
        kinds: dict[tuple[str, bool, str], list[tuple[Contrast, float]]] = {}
        for row, (_, own) in enumerate(rows):
            for one in own:
                y = row + (0.17 if one.comparison == "samples" else -0.17) * both
                colour = (ACCENT if one.better else SECOND) if one.resolved else MUTED
                kinds.setdefault((colour, one.resolved, one.comparison), []).append((one, y))
                tips.point(axes, scale * one.mean, y, one.about)
        for (colour, filled, comparison), marks in kinds.items():
            wide = [
                (scale * one.low, scale * one.high, y)
                for one, y in marks
                if one.low is not None and one.high is not None
            ]
            axes.hlines(
                [y for *_, y in wide], [x for x, *_ in wide], [x for _, x, _ in wide], color=colour, linewidth=1.7
            )
            axes.scatter(
                [scale * one.mean for one, _ in marks], [y for _, y in marks], s=38, zorder=3,
                marker="D" if comparison == "samples" else "o", facecolors=colour if filled else PAPER,
                edgecolors=colour, linewidths=1.5,
            )  # fmt: skip
        axes.set_title(pair, loc="left", fontsize=10, fontweight="bold", color=INK, pad=4)
        axes.set_yticks(range(len(rows)), [short(label or " ", 30) for label, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=9.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        ends = [scale * x for _, own in rows for one in own for x in (one.mean, one.low, one.high) if x is not None]
        low, high = min(*ends, 0.0), max(*ends, 0.0)
        margin = 0.07 * (high - low) or 1.0
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)

    def draw(figure: Figure, tips: Tips) -> None:
        from matplotlib.lines import Line2D

        heights = [len(rows) + 0.6 for _, rows in kept]
        places = figure.subplots(len(kept), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (pair, rows) in zip(places, kept, strict=True):
            panel(axes, tips, pair, rows)
        places[-1].set_xlabel(what)
        kinds = [
            (any(one.resolved and one.better for one in seen), ACCENT, ACCENT, "first is better"),
            (any(one.resolved and not one.better for one in seen), SECOND, SECOND, "first is worse"),
            (any(not one.resolved for one in seen), MUTED, PAPER, "not resolved"),
        ]
        handles = [
            Line2D([], [], color=edge, marker="o", markerfacecolor=fill, linewidth=1.6, markersize=6, label=text)
            for there, edge, fill, text in kinds
            if there
        ]
        if both:
            handles += [
                Line2D([], [], color=MUTED, marker=shape, linestyle="", markersize=6, label=text)
                for shape, text in (("o", "equal rounds"), ("D", "equal samples"))
            ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.4, columnspacing=1.2)

    if not kept:
        return ""
    data = [[pair, [[label, [list(one) for one in own]] for label, own in rows]] for pair, rows in kept]
    rows_in_all = sum(len(rows) for _, rows in kept)
    height = 0.75 + 0.55 * len(kept) + (0.32 if both else 0.26) * rows_in_all
    return picture(name, [data, what, points], height, draw)
