"""The pictures of a run: scores, rounds, clients, costs, and who holds what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.study.draw import (
    ACCENT,
    GRID,
    INK,
    MUTED,
    PAPER,
    Tips,
    arm_colour,
    arm_marker,
    end_names,
    percent_axis,
    picture,
    share_limits,
    short,
    tick,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "bytes_picture",
    "clients_picture",
    "cost_picture",
    "lengths_picture",
    "loss_picture",
    "partition_note",
    "partition_picture",
    "score_picture",
    "share_rounds_picture",
    "sizes_picture",
    "spread_picture",
    "worst_tenth",
]

_MAX_CLIENT_ROWS = 30
_MAX_LINES = 40  # of single clients, each a line of its own
_MAX_PARTITION_ROWS = 36
_MAX_CATEGORIES = 24


def loss_per(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the losses of some arms, or lines of rounds, are means over."""
    return "pair" if any(row.get("preference_accuracy") is not None for row in rows) else "answer token"


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

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        rows = range(len(values))
        axes.barh(rows, list(values.values()), height=0.56, color=[arm_colour(arm) for arm in values])
        span = max(values.values()) or 1.0
        if shares:
            span = share_limits([*values.values(), *(x for own in ticks.values() for x in own)])[1] / 1.02
        for row, (arm, value) in enumerate(values.items()):
            if ticks[arm] and len(ticks[arm]) <= 200:
                axes.scatter(ticks[arm], [row + 0.39] * len(ticks[arm]), marker="|", s=22, color=MUTED, linewidths=1.1)
            text = f"{100 * value:.1f} %" if shares else f"{value:.3f}"
            axes.annotate(
                text, (value, row), xytext=(6, 0), textcoords="offset points", ha="left", va="center",
                color=INK, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
            tips.box(axes, (0, value), (row - 0.3, row + 0.3), f"{arm}: {text}")
        axes.set_yticks(rows, [short(arm) for arm in values])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=10.5)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, span * (1.0 if shares else 1.02))
        if shares:
            percent_axis(axes, "x")
            axes.set_xlabel(
                "score on the common test set; ticks: clients on their own"
                if any(ticks.values())
                else "score on the common test set"
            )
        else:
            axes.set_xlabel(f"loss on the common test set (nats per {loss_per(arms.values())})")

    return picture("score", [values, ticks, measure], 0.9 + 0.55 * len(values), draw)


def _round_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


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

    def draw(figure: Figure, tips: Tips) -> None:
        from matplotlib.lines import Line2D

        axes = figure.add_subplot()
        ends = []
        for arm, curves in data.items():
            colour = arm_colour(arm)
            if curves["train"]:
                x, y = zip(*curves["train"], strict=True)
                axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.55, marker="." if len(x) == 1 else "")
            if curves["val"]:
                x, y = zip(*curves["val"], strict=True)
                every = max(1, len(x) // 10)
                axes.plot(
                    x, y, color=colour, linewidth=2.2, solid_capstyle="round", marker=arm_marker(arm), markersize=5,
                    markevery=every,
                )  # fmt: skip
                for at, value in curves["val"]:
                    tips.point(axes, at, value, f"{arm}, round {at:.0f}: validation loss {value:.3f}")
            last = curves["val"][-1] if curves["val"] else curves["train"][-1]
            ends.append((last[0], last[1], short(arm, 14), colour))
        _round_axis(axes)
        axes.set_ylabel(f"loss (nats per {loss_per(lines)})")
        axes.margins(x=0.02, y=0.07)
        seen = [point[1] for curves in data.values() for curve in curves.values() for point in curve]
        if 0 <= min(seen) < 0.6 * max(seen):  # from zero where that leaves room to see the change
            axes.set_ylim(bottom=0)
        end_names(axes, ends, 175)
        handles = [
            Line2D([], [], color=MUTED, linewidth=width, alpha=alpha, label=text)
            for name, text, width, alpha in (("val", "validation", 2.2, 1.0), ("train", "training", 1.0, 0.55))
            if any(curves[name] for curves in data.values())
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.8, columnspacing=1.4)

    return picture("loss", data, 3.3, draw)


def share_rounds_picture(name: str, curves: Mapping[str, Sequence[Sequence[float]]], what: str) -> str:
    """A share over the rounds, as (round, share) of each arm."""
    data = {arm: [list(point) for point in points] for arm, points in curves.items()}

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        ends = []
        for arm, points in data.items():
            x, y = zip(*points, strict=True)
            axes.plot(
                x, y, color=arm_colour(arm), linewidth=2.2, marker=arm_marker(arm), markersize=5,
                markevery=max(1, len(x) // 10), solid_capstyle="round", clip_on=False,
            )  # fmt: skip
            ends.append((x[-1], y[-1], short(arm, 14), arm_colour(arm)))
            for at, value in points:
                tips.point(axes, at, value, f"{arm}, round {at:.0f}: {100 * value:.1f} %")
        _round_axis(axes)
        axes.margins(x=0.02)
        axes.set_ylim(*share_limits([value for points in data.values() for _, value in points]))
        percent_axis(axes, "y")
        axes.set_ylabel(what)
        end_names(axes, ends, 175)

    return picture(name, [data, what], 3.1, draw)


# ------------------------------------------------------------------------------------------------------------ clients


def clients_picture(arms: Mapping[str, Mapping[str, Any]], order: Sequence[str], measure: str = "score") -> str:
    """Each client's score or loss on its own test set, by arm: a row per client, or a curve per arm of many clients."""
    shares = measure == "score"
    data = {}
    for arm, one in arms.items():
        values = one["own_test"].get(f"{measure}_per_client") or {}
        data[arm] = [values.get(client) for client in order]
    seen = [value for values in data.values() for value in values if value is not None]
    many = len(order) > _MAX_CLIENT_ROWS

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if shares else f"{value:.3f}"

    def rows(axes: Axes, tips: Tips) -> None:
        for row in range(len(order)):
            known = [value for values in data.values() if (value := values[row]) is not None]
            if known:
                axes.plot(
                    [min(known), max(known)], [row, row], color=GRID, linewidth=3, zorder=1.5, solid_capstyle="round"
                )
        for arm, values in data.items():
            points = [(value, row) for row, value in enumerate(values) if value is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            axes.scatter(
                x, y, s=46, marker=arm_marker(arm), color=arm_colour(arm), edgecolors=PAPER, linewidths=0.8,
                zorder=2 + list(data).index(arm), label=short(arm), clip_on=False,
            )  # fmt: skip
            for value, row in points:
                same = [name for name, others in data.items() if others[row] == value]  # one mark may hide another
                tips.point(axes, value, row, f"{short(order[row], 60)}, {' and '.join(same)}: {text(value)}")
        axes.set_yticks(range(len(order)), [short(client) for client in order])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(order) - 0.5, -0.5)
        if shares:
            axes.set_xlim(*share_limits(seen))
            percent_axis(axes, "x")
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel("score on the client's own test set" if shares else "loss on the client's own test set (nats)")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)

    def curves(axes: Axes, tips: Tips) -> None:
        for arm, values in data.items():
            known = sorted((value for value in values if value is not None), reverse=not shares)
            if not known:
                continue
            parts = [(i + 0.5) / len(known) for i in range(len(known))]
            every = max(1, len(known) // 8)
            axes.plot(
                parts, known, color=arm_colour(arm), linewidth=2.2, marker=arm_marker(arm), markersize=5,
                markevery=every, label=short(arm),
            )  # fmt: skip
            for part, value in list(zip(parts, known, strict=True))[:: max(1, len(known) // 40)]:
                tips.point(
                    axes, part, value, f"{arm}: {100 * part:.0f} % of the clients fare no better than {text(value)}"
                )
        axes.set_xlim(0, 1)
        percent_axis(axes, "x")
        if shares:
            axes.set_ylim(*share_limits(seen))
            percent_axis(axes, "y")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("share of the clients, from the worst to the best")
        axes.set_ylabel(f"{measure} on the own test set")

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        (curves if many else rows)(axes, tips)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, handletextpad=0.3, columnspacing=1.4)

    height = 3.4 if many else 1.15 + 0.31 * max(len(order), 2)
    return picture("clients", [data, list(order), measure], height, draw)


def worst_tenth(values: Sequence[float], *, lowest: bool) -> float:
    """The mean of the worst tenth of the clients, at least one; `lowest` says that little is bad."""
    ordered = sorted(values, reverse=not lowest)
    worst = ordered[: max(1, len(ordered) // 10)]
    return math.fsum(worst) / len(worst)


def spread_picture(lines: Sequence[Mapping[str, Any]], arms: Sequence[str], key: str) -> str:
    """How far the clients lie apart as the rounds go: a panel per arm, with all clients, their mean and worst tenth.

    `key` is "score_per_client" or "val_loss_per_client" of the lines.
    """
    shares = key == "score_per_client"
    data: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for arm in arms:
        rounds = [(line["round"], line[key]) for line in lines if line["arm"] == arm and line.get(key)]
        known = [(at, {id: x for id, x in table.items() if x is not None}) for at, table in rounds]
        data[arm] = [(at, table) for at, table in known if table]
    data = {arm: rounds for arm, rounds in data.items() if len(rounds) > 1}

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if shares else f"{value:.3f}"

    def panel(axes: Axes, tips: Tips, arm: str, rounds: list[tuple[int, dict[str, float]]]) -> None:
        at = [place for place, _ in rounds]
        tables = [table for _, table in rounds]
        clients = list(dict.fromkeys(client for table in tables for client in table))
        if len(clients) <= _MAX_LINES:
            for client in clients:
                own = [(place, table[client]) for place, table in rounds if client in table]
                axes.plot(*zip(*own, strict=True), color=arm_colour(arm), linewidth=0.9, alpha=0.45)
                tips.point(axes, *own[-1], f"{short(client, 60)}, {arm}, round {own[-1][0]}: {text(own[-1][1])}")
        else:
            ordered = [sorted(table.values()) for table in tables]
            low, high = ([one[round(part * (len(one) - 1))] for one in ordered] for part in (0.1, 0.9))
            axes.fill_between(at, low, high, color=arm_colour(arm), alpha=0.22, linewidth=0)
        mean = [math.fsum(table.values()) / len(table) for table in tables]
        worst = [worst_tenth(list(table.values()), lowest=shares) for table in tables]
        axes.plot(at, mean, color=arm_colour(arm), linewidth=2.4, solid_capstyle="round")
        axes.plot(at, worst, color=INK, linewidth=1.3, linestyle=(0, (4, 2)))
        for place, middle, last in zip(at, mean, worst, strict=True):
            tips.point(axes, place, middle, f"{arm}, round {place}: mean of the clients {text(middle)}")
            tips.point(axes, place, last, f"{arm}, round {place}: worst tenth {text(last)}")
        axes.set_title(short(arm), loc="left", fontsize=10, color=INK, pad=4)
        axes.margins(x=0.02)
        end_names(axes, [(at[-1], mean[-1], "mean", MUTED), (at[-1], worst[-1], "worst tenth", MUTED)], 95)

    def draw(figure: Figure, tips: Tips) -> None:
        panels = figure.subplots(len(data), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        values = [x for rounds in data.values() for _, table in rounds for x in table.values()]
        panels[0].set_ylim(*(share_limits(values) if shares else (0, 1.05 * max(values))))
        for axes, (arm, rounds) in zip(panels, data.items(), strict=True):
            panel(axes, tips, arm, rounds)
            if shares:
                percent_axis(axes, "y")
        _round_axis(panels[-1])
        for axes in panels[:-1]:
            axes.grid(visible=False, axis="x")
            axes.tick_params(labelbottom=False)
        figure.supylabel(
            "score on validation rows" if shares else f"validation loss (nats per {loss_per(lines)})",
            fontsize=10, color=MUTED,
        )  # fmt: skip

    return picture("spread", [data, key], 0.7 + 1.55 * len(data), draw) if data else ""


# -------------------------------------------------------------------------------------------------------------- costs


def bytes_picture(per_arm: Mapping[str, tuple[float, float]], whole_model: float | None) -> str:
    """Bytes a client sends and receives in a round, by arm, and for comparison what all weights would be."""
    from fedloom.study.progress import byte_text

    data = [[arm, up, down] for arm, (up, down) in per_arm.items()]

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        bars: list[tuple[str, float, str]] = []
        for arm, (up, down) in per_arm.items():
            bars.append((f"{short(arm)}, sent", up, arm_colour(arm)))
            bars.append((f"{short(arm)}, received", down, arm_colour(arm)))
        if whole_model:
            bars.append(("all weights", whole_model, MUTED))
        largest = max(value for _, value, _ in bars)
        for row, (name, value, colour) in enumerate(bars):
            axes.barh(row, value, height=0.56, color=colour)
            axes.annotate(
                byte_text(value), (value, row), xytext=(6, 0), textcoords="offset points", ha="left", va="center",
                color=INK, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
            tips.box(axes, (0, value), (row - 0.3, row + 0.3), f"{name}: {value:,.0f} bytes")
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_xlim(0, largest * 1.02)
        axes.set_xlabel("bytes per client and round")
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return picture("bytes", [data, whole_model], 0.6 + 0.5 * (2 * len(per_arm) + bool(whole_model)), draw)


def cost_picture(arms: Mapping[str, Mapping[str, Any]], costs: Mapping[str, Mapping[str, Any]], measure: str) -> str:
    """What was reached against what it took, a point per arm: time training, and all bytes of all clients.

    `costs` has, of each arm, "seconds" and "bytes". The picture is empty when there are not two arms to compare.
    """
    from fedloom.study.progress import byte_text, duration

    shares = measure == "score"
    data = {
        arm: [one[measure], costs[arm]["seconds"], costs[arm]["bytes"]]
        for arm, one in arms.items()
        if one[measure] is not None and arm in costs
    }
    kinds: list[tuple[int, str, Any]] = [
        (1, "time training", duration),
        (2, "sent and received, all clients", byte_text),
    ]
    kinds = [kind for kind in kinds if any(row[kind[0]] > 0 for row in data.values())]
    if len(data) < 2 or not kinds:
        return ""

    def draw(figure: Figure, tips: Tips) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, (place, name, text) in zip(panels, kinds, strict=True):
            largest = max(row[place] for row in data.values())
            for arm, row in data.items():
                axes.scatter(
                    [row[place]], [row[0]], s=62, marker=arm_marker(arm), color=arm_colour(arm), edgecolors=PAPER,
                    linewidths=0.8, zorder=3, clip_on=False, label=short(arm),
                )  # fmt: skip
                value = f"{100 * row[0]:.1f} %" if shares else f"{row[0]:.3f}"
                tips.point(axes, row[place], row[0], f"{arm}: {value} for {text(row[place])}")
            axes.set_xlim(-0.06 * largest, 1.1 * largest)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _, text=text: tick(text(x)) if x > 0 else "0"))
            axes.set_xlabel(name)
        if shares:
            panels[0].set_ylim(*(1.04 * x for x in share_limits([row[0] for row in data.values()])))
            percent_axis(panels[0], "y")
        panels[0].set_ylabel("score on the common test set" if shares else "loss on the common test set")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, handletextpad=0.3, columnspacing=1.4)

    return picture("cost", [data, measure], 3.0, draw)


# --------------------------------------------------------------------------------------------------- who holds what


def _natural(name: str) -> list[Any]:
    """A key that puts "topic 2" before "topic 10"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def partition_note(clients: int) -> str:
    """What a reader must know of a picture of so many clients."""
    if clients <= _MAX_PARTITION_ROWS:
        return ""
    return f" {_MAX_PARTITION_ROWS} of {clients:,} clients, picked evenly in the order of what they hold most."


def partition_picture(clients: Sequence[Mapping[str, Any]]) -> str:
    """Which client holds which category: a row per client, darker where more of its rows are.

    Of many clients some are picked evenly, in the order of what they hold most; of many categories the rarest are one
    column.
    """
    totals: dict[str, int] = {}
    for client in clients:
        for name, count in (client.get("categories") or {}).items():
            totals[name] = totals.get(name, 0) + count
    columns = sorted(totals, key=lambda name: (-totals[name], _natural(name)))
    rest = columns[_MAX_CATEGORIES:] if len(columns) > _MAX_CATEGORIES + 1 else []
    columns = columns[: len(columns) - len(rest)]
    place = {name: i for i, name in enumerate(columns)}
    rows = []
    for client in clients:
        counts = [0] * (len(columns) + bool(rest))
        for name, count in (client.get("categories") or {}).items():
            counts[place.get(name, len(columns))] += count
        rows.append((str(client["id"]), counts))
    rows.sort(key=lambda row: (row[1].index(max(row[1])), -max(row[1]) / max(sum(row[1]), 1)))
    if len(rows) > _MAX_PARTITION_ROWS:
        step = (len(rows) - 1) / (_MAX_PARTITION_ROWS - 1)
        rows = [rows[round(i * step)] for i in range(_MAX_PARTITION_ROWS)]
    names = [short(name, 22) for name in columns] + (["all others"] if rest else [])

    def draw(figure: Figure, tips: Tips) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.add_subplot()
        for y, (id, counts) in enumerate(rows):
            held = sum(counts)
            for x, count in enumerate(counts):
                box = (x - 0.47, y - 0.46)
                axes.add_patch(Rectangle(box, 0.94, 0.92, facecolor=GRID, alpha=0.45, linewidth=0))
                if count:
                    share = count / held
                    shade = 0.12 + 0.88 * share
                    axes.add_patch(Rectangle(box, 0.94, 0.92, facecolor=ACCENT, alpha=shade, linewidth=0))
                    text = f"{short(id, 40)}: {count:,} rows of {names[x]}, {100 * share:.0f} % of its own"
                    tips.box(axes, (x - 0.47, x + 0.47), (y - 0.46, y + 0.46), text)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(names)), names, rotation=40 if max(map(len, names)) * len(names) > 44 else 0)
        for label in axes.get_xticklabels():
            if label.get_rotation():
                label.set(ha="right", rotation_mode="anchor")
        small = len(rows) > _MAX_CLIENT_ROWS
        axes.set_yticks(range(len(rows)), [short(id, 16) for id, _ in rows], fontsize=7.5 if small else 9.5)
        axes.tick_params(axis="both", labelcolor=INK)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    longest = max(map(len, names), default=0)
    return picture("partition", [rows, names], 0.5 + 0.045 * longest + max(0.9, min(0.26 * len(rows), 4.6)), draw)


def sizes_picture(clients: Sequence[Mapping[str, Any]]) -> str:
    """How many rows each client trains on, the largest first."""
    sizes = sorted(((client["train"], str(client["id"])) for client in clients), key=lambda one: -one[0])
    many = len(sizes) > _MAX_CLIENT_ROWS

    def draw(figure: Figure, tips: Tips) -> None:
        axes = figure.add_subplot()
        counts = [count for count, _ in sizes]
        if many:
            axes.fill_between(range(len(sizes)), counts, step="mid", color=ACCENT, alpha=0.85, linewidth=0)
            step = max(1, len(sizes) // 60)
            for place in range(0, len(sizes), step):
                text = f"{short(sizes[place][1], 60)}: {counts[place]:,} rows"
                tips.box(axes, (place - step / 2, place + step / 2), (0, counts[place]), text)
            axes.set_xlabel("clients, the largest first")
            axes.set_ylabel("rows to train on")
            axes.set_xlim(-0.5, len(sizes) - 0.5)
            axes.set_ylim(0, 1.05 * max(counts) or 1)
            return
        axes.barh(range(len(sizes)), counts, height=0.6, color=ACCENT)
        for row, (count, id) in enumerate(sizes):
            axes.annotate(
                f"{count:,}", (count, row), xytext=(5, 0), textcoords="offset points", va="center", color=INK,
                annotation_clip=False,
            )  # fmt: skip
            tips.box(axes, (0, count), (row - 0.3, row + 0.3), f"{short(id, 60)}: {count:,} rows")
        axes.set_yticks(range(len(sizes)), [short(id) for _, id in sizes])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(sizes) - 0.5, -0.5)
        axes.set_xlim(0, 1.02 * max(counts) or 1)
        axes.set_xlabel("rows to train on")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)

    return picture("sizes", sizes, 2.6 if many else 0.75 + 0.27 * max(len(sizes), 2), draw)


def lengths_picture(clients: Sequence[Mapping[str, Any]], limit: int | None) -> str:
    """How long each client's rows are, the one with the longest first; `limit` is where rows are cut.

    A line per client, or of many clients bands over all of them.
    """
    shares = ("p10", "p25", "p50", "p75", "p90")
    rows = [(str(one["id"]), [int(one["lengths"][share]) for share in shares]) for one in clients if one.get("lengths")]
    rows.sort(key=lambda row: (-row[1][2], -row[1][4]))
    many = len(rows) > _MAX_CLIENT_ROWS
    low, high = min(values[0] for _, values in rows), max(values[4] for _, values in rows)
    wide = high > 12 * max(low, 1)

    def said(id: str, values: Sequence[int]) -> str:
        return f"{short(id, 60)}: median {values[2]:,} tokens, 10 to 90 % {values[0]:,} to {values[4]:,}"

    def scaled(axes: Axes, which: str) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis = axes.xaxis if which == "x" else axes.yaxis
        limits = (0.8 * max(low, 1), 1.25 * high) if wide else (0.0, 1.08 * high)
        if wide:
            (axes.set_xscale if which == "x" else axes.set_yscale)("log")
            axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
            axis.set_minor_formatter(NullFormatter())
        (axes.set_xlim if which == "x" else axes.set_ylim)(*limits)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if limit is not None and limits[0] < limit < limits[1]:
            (axes.axvline if which == "x" else axes.axhline)(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            end = (limit, 1.0) if which == "x" else (1.0, limit)
            axes.annotate(
                f"cut at {limit:,}", end, ha="right", va="bottom", xytext=(-3, 2), textcoords="offset points",
                xycoords=axes.get_xaxis_transform() if which == "x" else axes.get_yaxis_transform(),
                color=MUTED, fontsize=8.5,
            )  # fmt: skip

    def bands(axes: Axes, tips: Tips) -> None:
        at = range(len(rows))
        columns = list(zip(*(values for _, values in rows), strict=True))
        for first, last, alpha in ((0, 4, 0.22), (1, 3, 0.4)):
            axes.fill_between(at, columns[first], columns[last], color=ACCENT, alpha=alpha, linewidth=0)
        axes.plot(at, columns[2], color=ACCENT, linewidth=2)
        for place in range(0, len(rows), max(1, len(rows) // 60)):
            tips.point(axes, place, rows[place][1][2], said(*rows[place]))
        axes.set_xlim(0, len(rows) - 1)
        axes.set_xlabel("clients, the one with the longest rows first")
        axes.set_ylabel("tokens per row")
        scaled(axes, "y")

    def lines(axes: Axes, tips: Tips) -> None:
        at = list(range(len(rows)))
        p10, p25, p50, p75, p90 = zip(*(values for _, values in rows), strict=True)
        axes.hlines(at, p10, p90, color=ACCENT, linewidth=1.6, alpha=0.6)
        axes.hlines(at, p25, p75, color=ACCENT, linewidth=6, alpha=0.5)
        axes.scatter(p50, at, s=38, color=ACCENT, edgecolors=PAPER, linewidths=0.8, zorder=3)
        for place, (id, values) in enumerate(rows):
            tips.box(axes, (values[0], values[4]), (place - 0.3, place + 0.3), said(id, values))
        axes.set_yticks(at, [short(id) for id, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("tokens per row")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        scaled(axes, "x")

    def draw(figure: Figure, tips: Tips) -> None:
        (bands if many else lines)(figure.add_subplot(), tips)

    return picture("lengths", [rows, limit], 2.8 if many else 0.85 + 0.27 * max(len(rows), 2), draw)
