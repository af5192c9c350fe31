"""The page of a suite: means with their spread over seeds, what is resolved and what is not, and at what cost."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.study import pictures_many
from fedloom.study.draw import short
from fedloom.study.findings import lead_of, percent, points, tied
from fedloom.study.page import (
    MOST_ROWS,
    Cell,
    Column,
    Figure,
    Table,
    bytes_cell,
    cell,
    count_cell,
    flops_cell,
    plain_text,
    render,
    seconds_cell,
    text_cell,
)
from fedloom.study.pictures_many import Contrast, Mark, Point
from fedloom.study.progress import amount, duration
from fedloom.study.report import written_now
from fedloom.study.report_compare import bytes_finding
from fedloom.study.report_tables import arm_cell
from fedloom.study.suite_result import COSTS, read_suite

__all__ = ["suite_page", "suite_panels"]

_MOST_PANELS = 6
_COMPARISONS = {"rounds": "equal rounds", "samples": "equal samples"}
_BADGES = {"done": "finished", "running": "running", "failed": "failed", "stopped": "stopped"}


def suite_page(folder: Path) -> str:
    """The page of the suite in this folder, finished or not.

    Raises:
        UserError: there is no suite, or suite.json is damaged.
    """
    suite: Mapping[str, Any] = read_suite(folder)
    metric = main_metric(suite)
    cells = suite["cells"]
    done = [one for one in cells if one["status"] == "done"]
    parts: dict[str, tuple[str, list[Table | None], str]] = {
        "rounds": (
            "Equal rounds",
            [_results(suite, "rounds")],
            "Every arm as it ends, after the same rounds and steps. Mean ± standard deviation over n seeds.",
        ),
        "samples": (
            "Equal samples",
            [_results(suite, "samples")],
            "Every arm after the first round by which its model has seen as many samples as a local model sees in the "
            "whole run. Mean ± standard deviation over n seeds.",
        ),
        "differences": (
            "Differences",
            [_differences(suite)],
            "Mean of the first less the second, over the seeds that both have, with the interval of a paired t-test. "
            "~ is not resolved: the interval holds 0, so these seeds do not show a difference. * holds alone, ** after "
            "Holm's correction for all comparisons of the same kind, too.",
        ),
        "cells": ("Runs", [_cells(suite)], ""),
    }
    found = {
        id: (title, [one for one in tables if one is not None], about) for id, (title, tables, about) in parts.items()
    }
    where = f" ({len(done)} of {len(cells)} runs)" if suite["status"] != "done" or len(done) < len(cells) else ""
    text = folder / "suite.yaml"
    return render(
        "many.html.j2",
        {
            "name": short(suite["name"], 120),
            "status": {"kind": suite["status"], "text": _BADGES[suite["status"]] + where},
            "finding": tied(_headline(suite, metric)),
            "written": written_now(),
            "warnings": _warnings(suite),
            "tiles": _tiles(suite, done),
            "figures": _figures(suite, metric) if metric is not None else [],
            "sections": [
                *((id, one[0]) for id, one in found.items() if one[1]),
                *([("notes", "Notes")] if suite["notes"] else []),
                ("reproduce", "How to reproduce"),
            ],
            "parts": [(id, *one) for id, one in found.items()],
            "same": "",
            "notes": [_sentence(note) for note in suite["notes"]],
            "commands": [
                f"pip install fedloom=={suite['fedloom_version']}",
                f"fedloom run {shlex.quote(str(text))} output_dir={shlex.quote(str(folder) + '-again')}",
            ],
            "recipes": [("The suite", text.read_text(encoding="utf-8"))]
            if text.is_file()
            else [("The suite", plain_text(suite["suite"]))],
            "versions": list(suite["versions"].items()),
            "machine": [(key.replace("_", " "), plain_text(value)) for key, value in suite["machine"].items()],
            "version": suite["fedloom_version"],
        },
    )  # fmt: skip


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:].removesuffix('.')}."


# ------------------------------------------------------------------------------------------------------------- naming


def main_metric(suite: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The metric that pictures and sentences are about: the first one with a value."""
    measured = {row["metric"] for row in suite["table"] if row["mean"] is not None}
    return next((one for one in suite["metrics"] if one["name"] in measured), None)


def _varying(suite: Mapping[str, Any]) -> list[str]:
    """The settings with more than one value, in the suite's order."""
    return [name for name, values in suite["settings"].items() if len(values) > 1]


def _apart(suite: Mapping[str, Any]) -> list[str]:
    """Varying settings that change the task: figures of different values cannot be set against each other."""
    return [name for name in _varying(suite) if name == "recipe" or name.split(".")[0] in ("data", "task", "dataset")]


def _said(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Settings as words, without those that are the same everywhere."""
    words = []
    for name in names:
        if name in settings:
            value = settings[name]
            plain = isinstance(value, str) and not value.replace(".", "").isdigit()
            words.append(value if plain else f"{name.rsplit('.', 1)[-1]} {plain_text(value)}")
    return ", ".join(words)


def _text(value: float, metric: Mapping[str, Any]) -> str:
    if metric["unit"] == "share":
        return f"{100 * value:.1f} %"
    if metric["unit"] == "nats":
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 1000 else amount(value)


def _plus_minus(value: float, metric: Mapping[str, Any]) -> str:
    if metric["unit"] == "share":
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if metric["unit"] == "nats" else f"{value:.2g}"


def _difference_text(value: float, metric: Mapping[str, Any], unit: bool = True) -> str:
    """A signed difference: +12.3 points, −0.041."""
    sign = "+" if value >= 0 else "−"
    if metric["unit"] == "share":
        return f"{sign}{abs(100 * value):.1f}" + (" points" if unit else "")
    size = f"{abs(value):.3f}" if metric["unit"] == "nats" else f"{abs(value):.3g}"
    return sign + size


def _pair(one: Mapping[str, Any]) -> str:
    """federated − local, or lora_r: 16 − 2."""
    pair = f"{short(str(one['a']), 24)} − {short(str(one['b']), 24)}"
    return pair if one["by"] == "arm" else f"{short(one['by'], 24)}: {pair}"


def _interval_text(one: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    return " to ".join(_difference_text(one[end], metric, unit=False) for end in ("low", "high"))


# ------------------------------------------------------------------------------------------------------------- tables

_COST_CELLS: Mapping[str, Callable[[float | None], Cell]] = {
    "bytes": bytes_cell,
    "seconds": seconds_cell,
    "FLOP": flops_cell,
    "share": lambda value: cell(value or None, lambda x: f"{100 * x:.3g} %"),
}
_COST_NAMES = {
    "bytes_up_per_client_round": "up",
    "bytes_down_per_client_round": "down",
    "bytes_up": "up in all",
    "bytes_down": "down in all",
    "train_tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "trainable_share": "trained",
    "samples": "samples",
    "samples_per_model": "samples",
}


def _cost_cell(name: str, rows: Sequence[Mapping[str, Any]]) -> Cell:
    """A cost, without the exact figure to hover over: a suite has very many of them."""
    value = next((row["costs"][name] for row in rows if name in row["costs"]), None)
    return _COST_CELLS.get(COSTS[name][1], count_cell)(value)._replace(note="")


def _results(suite: Mapping[str, Any], comparison: str) -> Table | None:
    """A row per choice of settings and arm: every metric with its spread, then what it cost."""
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    order: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in suite["table"]:
        if row["comparison"] == comparison:
            place = (repr(sorted(row["settings"].items(), key=str)), row["arm"])
            rows.setdefault(place, []).append(row)
            order.setdefault(place, row["settings"])
    if not rows:
        return None
    varying = _varying(suite)
    metrics = [m for m in suite["metrics"] if any(r["metric"] == m["name"] for own in rows.values() for r in own)]
    costs = [name for name in COSTS if any((r["costs"].get(name) or 0) > 0 for own in rows.values() for r in own)]
    columns = [
        *(Column(name, text=True) for name in varying),
        Column("arm", text=True),
        *(Column(metric["title"], f"{metric['name']}, {metric['better']} is better") for metric in metrics),
        Column("n", "seeds"),
        *(Column(_COST_NAMES.get(name, COSTS[name][0]), COSTS[name][0]) for name in costs),
    ]
    lines = []
    for place, own in list(rows.items())[:MOST_ROWS]:
        settings = order[place]
        by_metric = {row["metric"]: row for row in own}
        most = max(row["n"] for row in own)
        lines.append(
            [
                *(_setting_cell(settings.get(name)) for name in varying),
                arm_cell(place[1]),
                *(_mean_cell(by_metric.get(metric["name"]), metric, most) for metric in metrics),
                cell(float(most), lambda x: f"{x:.0f}"),
                *(_cost_cell(name, own) for name in costs),
            ]
        )
    more = len(rows) - MOST_ROWS
    note = f"{more:,} more rows are in suite.json." if more > 0 else ""
    return Table(_COMPARISONS[comparison].capitalize(), columns, lines, note)


def _setting_cell(value: Any) -> Cell:
    if value is None:
        return Cell("–", "")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return text_cell(f"{value:g}" if isinstance(value, float) else plain_text(value), 40)._replace(
        value=float(value) if number else None
    )


def _mean_cell(row: Mapping[str, Any] | None, metric: Mapping[str, Any], most: int) -> Cell:
    if row is None or row["mean"] is None:
        return Cell("–", "")
    text = _text(row["mean"], metric)
    if row["std"] is not None:
        unit = " %" if metric["unit"] == "share" else ""
        text = f"{text.removesuffix(' %')} ± {_plus_minus(row['std'], metric)}{unit}"
    seeds = ", ".join(f"seed {seed}: {_text(value, metric)}" for seed, value in list(row["values"].items())[:12])
    return Cell(text, row["mean"], note=seeds, small=f"n = {row['n']}" if row["n"] != most else "")


def _by_weight(suite: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The differences, those of the first metrics first, and of arms before settings."""
    place = {metric["name"]: i for i, metric in enumerate(suite["metrics"])}
    return sorted(suite["differences"], key=lambda d: (place.get(d["metric"], len(place)), d["by"] != "arm"))


def _mark(one: Mapping[str, Any]) -> str:
    """Whether the seeds show a difference."""
    if one["low"] is None:
        return "one seed"
    if not one["resolved"]:
        return "not resolved"
    return "resolved" if one["resolved_holm"] else "resolved, not after Holm"


def _verdict_cell(one: Mapping[str, Any], metric: Mapping[str, Any]) -> Cell:
    mark = _mark(one)
    if not one["resolved"]:
        return Cell(f"~ {mark}", f"2 {mark}")
    better = one["a"] if (one["mean"] > 0) == (metric["better"] == "higher") else one["b"]
    stars, after = ("**", "") if one["resolved_holm"] else ("*", ", not after Holm")
    return Cell(f"{stars} {short(str(better), 24)} better{after}", f"{0 if one['resolved_holm'] else 1} {better}")


def _p_text(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def _differences(suite: Mapping[str, Any]) -> Table | None:
    metrics = {metric["name"]: metric for metric in suite["metrics"]}
    found = [one for one in _by_weight(suite) if one["metric"] in metrics]
    if not found:
        return None
    varying = _varying(suite)
    level = found[0]["level"]
    columns = [
        Column("difference", text=True),
        *(Column(name, text=True) for name in varying),
        Column("of", "a metric, after equal rounds or equal samples", text=True),
        Column("mean"),
        Column(f"{100 * level:.0f} % interval", "sorted by its width"),
        Column("verdict", "whether these seeds show a difference", text=True),
        Column("n", "seeds"),
        Column("p", "of a paired t-test"),
        Column("p, Holm", "adjusted for all comparisons of the same kind"),
    ]
    rows = []
    for one in found[:MOST_ROWS]:
        metric = metrics[one["metric"]]
        interval = Cell("–", "")
        if one["low"] is not None and one["high"] is not None:
            interval = Cell(_interval_text(one, metric), one["high"] - one["low"])
        rows.append(
            [
                text_cell(_pair(one))._replace(small=one.get("arm", "")),
                *(_setting_cell(one["settings"].get(name)) for name in varying),
                text_cell(f"{metric['title']}, {_COMPARISONS[one['comparison']]}"),
                Cell(_difference_text(one["mean"], metric), one["mean"], strong=one["resolved"]),
                interval,
                _verdict_cell(one, metric),
                cell(float(one["n"]), lambda x: f"{x:.0f}"),
                cell(one["p"], _p_text),
                cell(one["p_holm"], _p_text),
            ]
        )
    more = len(found) - MOST_ROWS
    note = f"{more:,} more rows are in suite.json." if more > 0 else ""
    return Table("Differences", columns, rows, note)


def _cells(suite: Mapping[str, Any]) -> Table:
    names = list(suite["settings"])
    failed = any(one.get("reason") for one in suite["cells"])
    columns = [
        Column("run", text=True),
        *(Column(name, text=True) for name in names),
        Column("seed"),
        Column("state", text=True),
        Column("time"),
        Column("peak memory"),
        Column("folder", text=True),
        *([Column("what failed", text=True)] if failed else []),
    ]
    rows = [
        [
            text_cell(one["id"], 24),
            *(_setting_cell(one["settings"].get(name)) for name in names),
            cell(float(one["seed"]), lambda x: f"{x:.0f}"),
            Cell(one["status"]),
            seconds_cell(one["seconds"]),
            bytes_cell(one.get("peak_memory_bytes")),
            text_cell(one["run"], 80),
            *([text_cell(one["reason"], 300) if one.get("reason") else Cell("")] if failed else []),
        ]
        for one in suite["cells"][:MOST_ROWS]
    ]
    more = len(suite["cells"]) - MOST_ROWS
    return Table("Runs", columns, rows, f"{more:,} more are in suite.json." if more > 0 else "")


# -------------------------------------------------------------------------------------------------------------- words


def _tiles(suite: Mapping[str, Any], done: Sequence[Any]) -> list[tuple[str, str, str]]:
    cells = suite["cells"]
    tiles = [(f"{len(done)} of {len(cells)}", "runs done", f"{len(suite['seeds'])} seeds each")]
    ways = 1
    for values in suite["settings"].values():
        ways *= max(1, len(values))
    tiles.append((str(ways), "choices of settings", ", ".join(short(name, 24) for name in _varying(suite)) or "one"))
    if suite["seconds"]:
        tiles.append((duration(suite["seconds"]), "wall-clock", f"at most {suite['jobs']} at once"))
    compared = [one for one in suite["differences"] if one["low"] is not None]
    if compared:
        resolved = sum(one["resolved"] for one in compared)
        tiles.append(
            (f"{resolved} of {len(compared)}", "differences resolved", f"at {100 * compared[0]['level']:.0f} %")
        )
    return [(tied(figure), what, tied(more)) for figure, what, more in tiles]


def _warnings(suite: Mapping[str, Any]) -> list[str]:
    lines = []
    failed = [one for one in suite["cells"] if one["status"] == "failed"]
    if failed:
        lines.append(f"{len(failed)} of {len(suite['cells'])} runs failed, and their seeds are missing from the means.")
    if len(suite["seeds"]) == 1:
        lines.append("One seed: what seeds alone would change is not known, and nothing can be resolved.")
    elif len(suite["seeds"]) == 2:
        lines.append("Two seeds: intervals are very wide, and little can be resolved.")
    return lines


def _headline(suite: Mapping[str, Any], metric: Mapping[str, Any] | None) -> str:
    """For how many choices of settings the federation is better than its rivals, as far as the seeds can tell."""
    if metric is None:
        return "No run has ended yet."
    said = []
    for rival in ("local", "global"):
        own = [
            _turned(one, "federated")
            for one in suite["differences"]
            if one["by"] == "arm" and {one["a"], one["b"]} == {"federated", rival}
            and one["metric"] == metric["name"] and one["comparison"] == "rounds"
        ]  # fmt: skip
        if not own:
            continue
        up = metric["better"] == "higher"
        better = sum(one["resolved"] and (one["mean"] > 0) == up for one in own)
        worse = sum(one["resolved"] and (one["mean"] > 0) != up for one in own)
        if len(own) == 1:
            size = own[0]["mean"]
            much = points(size) if metric["unit"] == "share" else f"{abs(size):.3f}"
            way = "above" if size > 0 else "below"
            verdict = "" if own[0]["resolved"] else " (not resolved)"
            said.append(f"{much} {way} {rival}{verdict}")
        else:
            words = [f"better than {rival} in {better} of {len(own)}"] if better else []
            it = "it" if words else rival
            words += [f"worse than {it} in {worse}" + f" of {len(own)}" * (not words)] if worse else []
            open_ = len(own) - better - worse
            it = "it" if words else rival
            words += [f"not told apart from {it} in {open_}" + f" of {len(own)}" * (not words)] if open_ else []
            said.append(
                words[0] + "".join(f", {word}" for word in words[1:-1]) + f" and {words[-1]}" * (len(words) > 1)
            )
    if said:
        return f"By {metric['title']}, federated is {'; '.join(said)}."
    rows = [row for row in suite["table"] if row["metric"] == metric["name"] and row["mean"] is not None]
    arm = lead_of({row["arm"]: None for row in rows})
    own_means = [row["mean"] for row in rows if row["arm"] == arm and row["comparison"] == "rounds"] or [
        row["mean"] for row in rows
    ]
    low, high = _text(min(own_means), metric), _text(max(own_means), metric)
    if metric["unit"] == "share":
        low, high = percent(min(own_means)), percent(max(own_means))
    return f"{(arm or '').capitalize()} {metric['title']}: {low}" + (f" to {high}." if low != high else ".")


def _turned(one: Mapping[str, Any], first: str) -> Mapping[str, Any]:
    """The same difference with `first` as its first part."""
    if one["a"] == first:
        return one
    low, high = (None if one[end] is None else -one[end] for end in ("high", "low"))
    return {**one, "a": one["b"], "b": one["a"], "mean": -one["mean"], "low": low, "high": high}


# ----------------------------------------------------------------------------------------------------------- pictures


def _panels(suite: Mapping[str, Any]) -> list[tuple[str, Callable[[Mapping[str, Any]], bool]]]:
    """A title and a test of settings for each task of the suite; one without a title where there is one task."""
    names = _apart(suite)
    seen: dict[str, dict[str, Any]] = {}
    for row in suite["table"]:
        seen.setdefault(_said(row["settings"], names), {name: row["settings"].get(name) for name in names})
    return [
        (title, lambda settings, wanted=wanted: all(settings.get(k) == v for k, v in wanted.items()))  # type: ignore[misc]
        for title, wanted in seen.items()
    ]


def suite_panels(suite: Mapping[str, Any]) -> tuple[list[tuple[str, list[Point]]], Mapping[str, Any]] | None:
    """Quality against bytes: the points of each task of the suite, and the metric. None without a value."""
    metric = main_metric(suite)
    if metric is None:
        return None
    within = [name for name in _varying(suite) if name not in _apart(suite)]
    panels = []
    for title, belongs in _panels(suite):
        own = []
        for row in suite["table"]:
            if row["metric"] != metric["name"] or row["comparison"] != "rounds" or row["mean"] is None:
                continue
            if belongs(row["settings"]):
                sent = (row["costs"].get("bytes_up") or 0.0) + (row["costs"].get("bytes_down") or 0.0)
                own.append(Point(_said(row["settings"], within), row["arm"], sent, row["mean"], row["std"]))
        panels.append((title, own))
    return panels, metric


def _figures(suite: Mapping[str, Any], metric: Mapping[str, Any]) -> list[Figure]:
    figures = []
    shares = metric["unit"] == "share"
    varying = _varying(suite)
    better = f"{metric['better'].capitalize()} is better."
    for comparison, words in _COMPARISONS.items():
        rows: dict[str, list[Mark]] = {}
        for row in suite["table"]:
            if row["metric"] == metric["name"] and row["comparison"] == comparison and row["mean"] is not None:
                label = _said(row["settings"], varying) or suite["name"]
                std = f" ± {_plus_minus(row['std'], metric)}" if row["std"] is not None else ""
                about = f"{label}, {row['arm']}: {_text(row['mean'], metric)}{std}, n = {row['n']}"
                rows.setdefault(label, []).append(Mark(row["arm"], row["mean"], row["std"], about))
        if rows:
            svg = pictures_many.marks_picture(f"marks-{comparison}", list(rows.items()), metric["title"], shares)
            finding = f"{metric['title'].capitalize()} after {words}"
            about = f"Mean and one standard deviation over seeds. {better}"
            about += f" The first 40 of {len(rows)} are shown." if len(rows) > 40 else ""
            figures.append(Figure(f"marks-{comparison}", tied(finding), about, svg))
    figures += _contrast_figures(suite, metric)
    found = suite_panels(suite)
    for place, (title, own) in enumerate(found[0][:_MOST_PANELS] if found else []):
        svg = pictures_many.quality_bytes_picture(f"bytes-{place}", own, metric["title"], shares)
        if svg:
            finding = (
                bytes_finding(own, "score" if shares else metric["title"])
                if shares or metric["better"] == "lower"
                else ""
            )
            head = f"{title}: {finding}" if title and finding else finding or title
            about = f"All bytes that all clients sent and received, against {metric['title']}. {better}"
            figures.append(Figure(f"bytes-{place}", tied(head or "Quality against bytes"), about, svg))
    return figures


def _contrast_figures(suite: Mapping[str, Any], metric: Mapping[str, Any]) -> list[Figure]:
    """Differences of arms, and differences of settings, of the main metric."""
    figures = []
    varying = _varying(suite)
    shares = metric["unit"] == "share"
    kinds = dict.fromkeys("arm" if one["by"] == "arm" else "setting" for one in suite["differences"])
    for kind in kinds:
        contrasts = []
        for one in suite["differences"]:
            if one["metric"] != metric["name"] or (one["by"] == "arm") != (kind == "arm"):
                continue
            label = _said(one["settings"], varying)
            if one.get("arm"):
                label = f"{label}, {one['arm']}" if label else one["arm"]
            interval = f" ({_interval_text(one, metric)})" if one["low"] is not None else ""
            pair = _pair(one)
            about = f"{pair}{', ' if label else ''}{label}, {_COMPARISONS[one['comparison']]}: "
            about += f"{_difference_text(one['mean'], metric)}{interval}, {_mark(one)}"
            contrasts.append(
                Contrast(
                    pair, label, one["comparison"], one["mean"], one["low"], one["high"], one["resolved"],
                    (one["mean"] > 0) == (metric["better"] == "higher"), about,
                )
            )  # fmt: skip
        what = f"difference in {metric['title']}" + (", points" if shares else "")
        svg = pictures_many.contrasts_picture(f"contrasts-{kind}", contrasts, what, shares)
        if svg:
            resolved = sum(one.resolved for one in contrasts)
            what_of = "arms" if kind == "arm" else "settings"
            finding = f"{resolved} of {len(contrasts)} differences between {what_of} are resolved"
            about = f"Mean over seeds and {100 * suite['differences'][0]['level']:.0f} % interval. "
            about += f"{metric['better'].capitalize()} {metric['title']} is better."
            figures.append(Figure(f"contrasts-{kind}", finding, about, svg))
    return figures
