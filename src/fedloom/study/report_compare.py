"""The page of several runs: what differs between them, what they reached, and what it took."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import UserError
from fedloom.study import pictures_many
from fedloom.study.compare import NOT_SETTINGS
from fedloom.study.draw import short
from fedloom.study.findings import lead_of, percent, tied
from fedloom.study.page import Column, Figure, Table, cell, count_cell, plain_text, render, text_cell
from fedloom.study.pictures_many import Mark, Point
from fedloom.study.report import measure_of, written_now
from fedloom.study.report_tables import (
    COSTS_ABOUT,
    SPREAD_ABOUT,
    Known,
    arm_cell,
    commands_of,
    costs_table,
    know,
    quality_about,
    quality_table,
    spread_table,
    status_of,
    tasks_table,
)
from fedloom.study.suite import settings_text
from fedloom.study.suite_result import is_suite, read_suite

__all__ = ["compare_page", "known_runs", "recipe_of", "run_points"]

_LEAD = [Column("run", text=True), Column("arm", text=True)]


def known_runs(folders: Sequence[Path]) -> dict[str, Known]:
    """The runs of these folders by the shortest names that tell them apart; a suite stands for those of its runs.

    Raises:
        UserError: one of them is no run and no suite, or a suite has no run yet.
    """
    named: dict[Path, tuple[Path, str]] = {}
    for folder in folders:
        if not is_suite(folder):
            named.setdefault(folder.resolve(), (folder, ""))
            continue
        suite = read_suite(folder)
        varying = [name for name, values in suite["settings"].items() if len(values) > 1]
        there = [one for one in suite["cells"] if (folder / one["run"] / "recipe.yaml").is_file()]
        if not there:
            raise UserError(f"none of the runs of {folder} is there yet", code="suite.empty")
        for one in there:
            settings = settings_text({name: one["settings"][name] for name in varying if name in one["settings"]})
            label = ", ".join([settings] * bool(settings) + [f"seed {one['seed']}"])
            named.setdefault((folder / one["run"]).resolve(), (folder / one["run"], label))
    paths = [path for path, _ in named.values()]
    labels = [label or name for (_, label), name in zip(named.values(), _names(paths), strict=True)]
    if len(set(labels)) < len(labels):  # two suites may have cells of the same name
        labels = _names(paths)
    return dict(zip(labels, map(know, paths), strict=True))


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many before it as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    return [short(os.sep.join(part[-length:]), 80) for part in parts]


def recipe_of(known: Known) -> dict[str, Any]:
    """A run's resolved recipe as flat keys: "client.learning_rate" and so on."""
    recipe: Any = known.result.get("recipe")
    if not recipe:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        try:
            recipe = YAML(typ="safe", pure=True).load(known.folder.recipe.read_text(encoding="utf-8"))
        except YAMLError as error:
            raise UserError(f"{known.folder.recipe} is damaged: {error}", code="file.damaged") from error

    flat: dict[str, Any] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(f"{place}.{key}" if place else str(key), item)
        else:
            flat[place] = value

    walk("", recipe if isinstance(recipe, Mapping) else {})
    return {key: value for key, value in flat.items() if key.split(".")[0] not in NOT_SETTINGS}


def _differing(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Key -> its value in each run, of the keys that are not the same in all."""
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    said = {key: [plain_text(recipe.get(key)) for recipe in recipes.values()] for key in keys}
    found = {key: values for key, values in said.items() if len(set(values)) > 1}
    # What only some runs have comes last: runs of other versions of fedloom lack keys.
    return dict(sorted(found.items(), key=lambda one: any(one[0] not in recipe for recipe in recipes.values())))


def compare_page(folders: Sequence[Path]) -> str:
    """The page of these runs.

    Raises:
        UserError: one of them is no run, or its files are damaged.
    """
    runs = known_runs(folders)
    measure = measure_of(one for run in runs.values() for one in run.arms.values())
    differing = _differing({name: recipe_of(run) for name, run in runs.items()})
    rows = [(name, arm, run, run.arms[arm]) for name, run in runs.items() for arm in run.arms]

    def lead(name: str, arm: str) -> list[Any]:
        return [text_cell(name), arm_cell(arm)]

    quality = [(lead(name, arm), one) for name, arm, _, one in rows]
    equal = [
        (lead(name, arm), {**one["result"], "round": one.get("round"), "samples": one.get("samples")})
        for name, run in runs.items()
        for arm, one in ((run.result.get("equal_samples") or {}).get("arms") or {}).items()
        if one.get("result")
    ]
    rounds = (Column("round"), lambda one: cell(one["round"], lambda x: f"{x:,.0f}"))
    samples = (Column("samples", "that a model has seen"), lambda one: count_cell(one["samples"]))
    tasks = [(lead(name, arm), table) for name, run in runs.items() for arm, table in run.tasks.items()]
    costs = [(lead(name, arm), run.costs[arm]) for name, run in runs.items() for arm in run.costs]
    parts: dict[str, tuple[str, list[Table | None], str]] = {
        "settings": ("Settings that differ", [_settings_table(runs, differing)], ""),
        "arms": (
            "Runs and arms",
            [quality_table("Runs and arms", _LEAD, quality) if quality else None],
            quality_about(measure),
        ),
        "samples": (
            "After the same number of samples",
            [quality_table("After the same number of samples", _LEAD, equal, (rounds, samples)) if equal else None],
            "Within each run: its arms where each of its models has seen the same number of samples.",
        ),
        "tasks": ("Benchmark tasks", [tasks_table(tasks, _LEAD)], ""),
        "spread": (
            "Spread over the clients",
            [spread_table(kind, _LEAD, quality) for kind in ("score", "loss")],
            SPREAD_ABOUT,
        ),
        "costs": ("Costs", [costs_table("Costs", _LEAD, costs)], COSTS_ABOUT),
        "runs": ("Runs", [_runs_table(runs)], ""),
    }
    found = {
        id: (title, [one for one in tables if one is not None], about) for id, (title, tables, about) in parts.items()
    }
    return render(
        "many.html.j2",
        {
            "name": f"{len(runs)} runs",
            "status": None,
            "finding": tied(_headline(runs, measure)),
            "written": written_now(),
            "warnings": _warnings(runs),
            "tiles": [],
            "figures": _figures(runs, measure),
            "sections": [*((id, one[0]) for id, one in found.items() if one[1]), ("reproduce", "How to reproduce")],
            "parts": [(id, *one) for id, one in found.items()],
            "same": "The runs do not differ in their settings." if not differing else "",
            "notes": [],
            "commands": [commands_of(run.folder.path, run.result)[-1] for run in runs.values()],
            "recipes": [
                (f"Resolved recipe of {name}", run.folder.recipe.read_text(encoding="utf-8"))
                for name, run in list(runs.items())[:12]
            ],
            "versions": _versions(runs),
            "machine": [],
            "version": next((run.result["fedloom_version"] for run in runs.values() if run.result), None),
        },
    )  # fmt: skip


def _settings_table(runs: Mapping[str, Known], differing: Mapping[str, Sequence[str]]) -> Table | None:
    """What differs: a row per run, or of a few runs that differ in much a row per setting."""
    if not differing:
        return None
    if len(runs) <= 6 and len(differing) > len(runs):
        heads = [Column("setting", text=True), *(Column(name, text=True) for name in runs)]
        return Table(
            "Settings that differ",
            heads,
            [[text_cell(key), *(text_cell(value, 80) for value in values)] for key, values in differing.items()],
        )
    columns = [Column("run", text=True), *(Column(key, text=not _numbers(differing[key])) for key in differing)]
    rows = [
        [text_cell(name), *(_setting(differing[key][place]) for key in differing)] for place, name in enumerate(runs)
    ]
    return Table("Settings that differ", columns, rows)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _numbers(values: Sequence[str]) -> bool:
    return all(_number(value) is not None or value == "–" for value in values)


def _setting(value: str) -> Any:
    number = _number(value)
    return text_cell(value, 80)._replace(value=number if number is not None else "" if value == "–" else None)


def _runs_table(runs: Mapping[str, Known]) -> Table:
    columns = [
        Column("run", text=True), Column("folder", text=True), Column("state", text=True), Column("model", text=True),
        Column("data", text=True), Column("seed"),
    ]  # fmt: skip
    rows = []
    for name, run in runs.items():
        recipe = recipe_of(run)
        seed = recipe.get("seed")
        rows.append(
            [
                text_cell(name),
                text_cell(str(run.folder.path), 120),
                text_cell(status_of(run)["text"]),
                text_cell(str(run.model.get("name") or recipe.get("model") or "–")),
                text_cell(str(run.data.get("source") or recipe.get("data.path") or "–"), 80),
                cell(float(seed) if isinstance(seed, int) else None, lambda x: f"{x:.0f}"),
            ]
        )
    return Table("Runs", columns, rows)


def _versions(runs: Mapping[str, Known]) -> list[tuple[str, str]]:
    """Package -> its version, or its versions where the runs differ."""
    found: dict[str, dict[str, None]] = {}
    for run in runs.values():
        for package, version in (run.result.get("versions") or run.facts.get("versions") or {}).items():
            found.setdefault(package, {})[str(version)] = None
    return [(package, " / ".join(versions)) for package, versions in found.items()]


def _warnings(runs: Mapping[str, Known]) -> list[str]:
    """What speaks against comparing these runs."""
    lines = []
    digests = {run.facts.get("data_digest") for run in runs.values()} - {None}
    seeds = {recipe_of(run).get("seed") for run in runs.values()}
    if len(digests) > 1:
        lines.append(
            "The runs do not share their data (the source, the split, the seed or the tokens differ), so neither do "
            "they share their test rows."
        )
    open_ = [name for name, run in runs.items() if not run.result]
    if open_:
        lines.append(
            f"Not finished: {', '.join(short(name, 40) for name in open_[:6])}{' and more' * (len(open_) > 6)}."
        )
    if len(seeds) == 1 and len(runs) > 1:
        lines.append(
            "Each run is one seed: what another seed would change is not known. A suite runs several, for intervals."
        )
    return lines


def _headline(runs: Mapping[str, Known], measure: str) -> str:
    arm = lead_of({arm: None for run in runs.values() for arm in run.arms})
    if arm is None:
        return f"{len(runs)} runs, and no arm of them is done yet."
    known = {name: run.arms[arm][measure] for name, run in runs.items() if arm in run.arms}
    known = {name: value for name, value in known.items() if value is not None}
    if not known:
        return f"{len(runs)} runs side by side."
    best = (max if measure == "score" else min)(known, key=lambda name: known[name])
    worst = (min if measure == "score" else max)(known, key=lambda name: known[name])

    def text(value: float) -> str:
        return percent(value) if measure == "score" else f"a loss of {value:.3f}"

    if len(known) == 1 or known[best] == known[worst]:
        return (
            f"{arm.capitalize()} reaches {text(known[best])} in {'every run' if len(known) > 1 else short(best, 40)}."
        )
    return (
        f"{arm.capitalize()} reaches {text(known[best])} in {short(best, 40)} and {text(known[worst])} in "
        f"{short(worst, 40)}."
    )


def run_points(runs: Mapping[str, Known], measure: str) -> list[Point]:
    """Each arm of each run, for the picture of quality against bytes."""
    return [
        Point(
            name if len(runs) > 1 else "",
            arm,
            (run.costs.get(arm, {}).get("bytes_up") or 0.0) + (run.costs.get(arm, {}).get("bytes_down") or 0.0),
            one[measure],
            None,
        )
        for name, run in runs.items()
        for arm, one in run.arms.items()
        if one[measure] is not None
    ]


def _figures(runs: Mapping[str, Known], measure: str) -> list[Figure]:
    shares = measure == "score"
    what = "score on the common test set" if shares else "loss on the common test set"
    figures = []

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if shares else f"{value:.3f}"

    rows = [
        (name, [Mark(arm, one[measure], None, f"{name}, {arm}: {text(one[measure])}") for arm, one in run.arms.items()
                if one[measure] is not None])
        for name, run in runs.items()
    ]  # fmt: skip
    if any(marks for _, marks in rows):
        svg = pictures_many.marks_picture("marks", rows, what, shares)
        about = "On the test sets of all clients together." + _first_of(len(rows), 40)
        figures.append(Figure("marks", f"{measure.capitalize()} by run and arm", about, svg))
    arm = lead_of({line["arm"]: None for run in runs.values() for line in run.lines if line["round"] > 0})
    for key, label, part in (
        ("score", "score on validation rows", True),
        ("val_loss", "validation loss (nats per answer token)", False),
    ):
        curves = {}
        for name, run in runs.items():
            own = [line for line in run.lines if line["arm"] == arm and line.get(key) is not None]
            if len(own) > 1:
                curves[name] = [(line["round"], line[key]) for line in own]
        if len(curves) > 1:
            name = "rounds-score" if part else "rounds-loss"
            finding = tied(_rounds_finding(curves, arm or "", part))
            about = "Each client's model on its own validation rows, which nobody trains on." + _first_of(
                len(curves), 8, "have a name and a colour"
            )
            figures.append(Figure(name, finding, about, pictures_many.rounds_picture(name, curves, label, part)))
    figures += _time_figures(runs)
    points = run_points(runs, measure)
    svg = pictures_many.quality_bytes_picture("bytes", points, what, shares)
    if svg:
        finding = tied(bytes_finding(points, measure))
        about = "The further up and to the left, the better." if shares else "The further down and left, the better."
        figures.append(Figure("bytes", finding, about, svg))
    return figures


def _time_figures(runs: Mapping[str, Known]) -> list[Figure]:
    """Validation over simulated time, where not all runs have the same clock: rounds of different lengths."""
    if not any(recipe_of(run).get("runtime.kind") == "buffered" for run in runs.values()):
        return []
    figures = []
    for key, label, part in (
        ("score", "score on validation rows", True),
        ("val_loss", "validation loss (nats per answer token)", False),
    ):
        curves = {
            name: [
                (line.get("simulated_seconds") or 0.0, line[key])
                for line in run.lines
                if line["arm"] == "federated" and line.get(key) is not None
            ]
            for name, run in runs.items()
        }
        curves = {name: points for name, points in curves.items() if len(points) > 1}
        if len(curves) > 1:
            name = "time-score" if part else "time-loss"
            finding = tied(f"Validation {'score' if part else 'loss'} over simulated time")
            about = "Each client works on its own machine, at its own speed; messages take no time."
            svg = pictures_many.rounds_picture(name, curves, label, part, "simulated seconds")
            figures.append(Figure(name, finding, about, svg))
    return figures


def _first_of(there: int, most: int, what: str = "are shown") -> str:
    return f" The first {most} of {there} {what}." if there > most else ""


def _rounds_finding(curves: Mapping[str, Sequence[tuple[int, float]]], arm: str, shares: bool) -> str:
    ends = {name: points[-1][1] for name, points in curves.items()}
    best = (max if shares else min)(ends, key=lambda name: ends[name])
    got = percent(ends[best]) if shares else f"{ends[best]:.2f}"
    name = "score" if shares else "loss"
    return f"{arm.capitalize()} validation {name} ends {'highest' if shares else 'lowest'} in {short(best, 40)} ({got})"


def bytes_finding(points: Sequence[Point], measure: str) -> str:
    """The best of what used the wire, and the cheapest that is nearly as good."""
    from fedloom.study.progress import byte_text

    shares = measure == "score"
    sent = [point for point in points if point.bytes > 0]
    best = (max if shares else min)(sent, key=lambda point: point.value)

    def text(point: Point) -> str:
        got = percent(point.value) if shares else f"a {measure} of {point.value:.3f}"
        return f"{short(point.series, 30) or point.arm} reaches {got} for {byte_text(point.bytes)}"

    near = [
        point
        for point in sent
        if point.bytes < 0.9 * best.bytes
        and (best.value - point.value <= 0.02 if shares else point.value - best.value <= 0.02 * abs(best.value))
    ]
    said = text(best)
    if near:
        cheapest = min(near, key=lambda point: point.bytes)
        said += f"; {text(cheapest)}"
    return said
