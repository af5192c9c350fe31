"""Runs or suites side by side: the settings that differ, figures and their differences, costs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.errors import UserError
from fedloom.study.folder import RunFolder
from fedloom.study.load import read_recipe
from fedloom.study.recipe import BLOCKS, resolved_json
from fedloom.study.result import ARMS
from fedloom.study.statistics import LEVEL, paired
from fedloom.study.suite import metric_problem, value_text
from fedloom.study.suite_result import COSTS, Comparison, Metric, Row, SuiteResult, is_suite, read_suite
from fedloom.study.suite_table import Finished, costs_of, metrics_of, value_of

__all__ = ["Compared", "Line", "compare"]

NOT_SETTINGS = ("name", "output_dir", "report_to", "project")


@dataclass(frozen=True)
class Line:
    """One figure of each, and how it differs from the first's."""

    settings: dict[str, Any]  # of a suite's row; of runs none
    arm: str
    comparison: Comparison
    metric: Metric
    values: list[float | None]  # of suites the means
    stds: list[float | None]
    differences: list[dict[str, Any] | None]  # mean, and of suites n, low, high, p, resolved; of the first None


@dataclass(frozen=True)
class Compared:
    """Two or more runs, or two or more suites."""

    kind: str  # "runs" or "suites"
    names: list[str]
    settings: dict[str, list[Any]]  # those that differ, dotted
    versions: dict[str, list[Any]]  # those that differ
    lines: list[Line]
    costs: list[dict[str, Any]]  # settings, arm, cost, values
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "compared": self.names,
            "settings": self.settings,
            "versions": self.versions,
            "metrics": [vars(line) for line in self.lines],
            "costs": self.costs,
            "notes": self.notes,
        }


def compare(places: Sequence[Path], metrics: Sequence[str] | None = None) -> Compared:
    """Put run folders, or suite folders, side by side; the first is what the others are measured against.

    Raises:
        UserError: fewer than two, runs and suites together, no such folder, or suites that share no rows.
    """
    if len(places) < 2:
        raise UserError(
            f"compare takes two or more folders, and there {'is one' if places else 'are none'}",
            "fedloom compare runs/a runs/b; what one run has is in `fedloom report RUN`",
            code="compare.few",
        )
    for name in metrics or ():
        if wrong := metric_problem(name):
            raise UserError(f"{name} is no metric, {wrong}", code="compare.metric")
    suites = [place for place in places if is_suite(place)]
    if suites and len(suites) < len(places):
        other = next(place for place in places if place not in suites)
        raise UserError(
            f"{suites[0]} is a suite and {other} is not: compare runs with runs, and suites with suites",
            f"the runs of a suite are in {suites[0] / 'runs'}",
            code="compare.mixed",
        )
    names = _names(places)
    return _suites(places, names) if suites else _runs(places, names, metrics)


def _names(places: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    parts = [place.resolve().parts for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


# ---- runs ------------------------------------------------------------------------------------------------------------


def _runs(places: Sequence[Path], names: list[str], wanted: Sequence[str] | None) -> Compared:
    results, recipes, notes = [], [], []
    for place, name in zip(places, names, strict=True):
        folder = RunFolder.look(place)
        result = folder.read_result()
        if result is None:  # what is done of it
            stages = folder.read_stages()
            result = {
                "arms": {arm: stage["result"] for arm, stage in stages.items()},
                "costs_per_arm": {arm: stage["costs"] for arm, stage in stages.items()},
                "versions": folder.read_facts().get("versions", {}),
            }
            notes.append(f"{name} is not finished: {', '.join(stages) or 'no arm'} of it is there")
        results.append(Finished({}, int(result.get("seed", 0)), result, folder.read_rounds()))
        recipes.append(result.get("recipe") or resolved_json(read_recipe(place).recipe))
    flat = [_flat(recipe) for recipe in recipes]
    settings = _differing(flat, [key for one in flat for key in one if key not in NOT_SETTINGS])
    versions = _differing(
        [{"fedloom": one.result.get("fedloom_version"), **(one.result.get("versions") or {})} for one in results],
        ["fedloom", "torch", "transformers", "python"],
    )
    lines = []
    for arm in _arms(results):
        for metric in metrics_of(results, wanted):
            for comparison in ("rounds", "samples"):
                values = [value_of(one.result, arm, metric["name"], comparison) for one in results]
                if any(value is not None for value in values):
                    first = values[0]
                    differences: list[dict[str, Any] | None] = [
                        {"mean": value - first} if place and value is not None and first is not None else None
                        for place, value in enumerate(values)
                    ]
                    lines.append(Line({}, arm, comparison, metric, values, [None] * len(values), differences))
    costs: list[dict[str, Any]] = []
    for arm in _arms(results):
        each = [costs_of(one, arm, "rounds") for one in results]
        costs += [
            {"settings": {}, "arm": arm, "cost": key, "values": [one.get(key) for one in each]}
            for key in COSTS
            if any(one.get(key) for one in each)
        ]
    if any((recipe.get("runtime") or {}).get("kind") == "buffered" for recipe in recipes) or any(
        key.startswith("runtime.client_speeds") for key in settings
    ):
        timed, said = time_to_what_all_reach([one.rounds for one in results])
        costs += timed
        notes += said
    notes.append("one run each, so no intervals: a suite with several seeds has them")
    if not settings:
        notes.insert(0, "the recipes are the same")
    if "seed" in settings and len(settings) == 1:
        notes.insert(0, "only the seed differs")
    return Compared("runs", names, settings, versions, lines, costs, notes)


def time_to_what_all_reach(runs: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], list[str]]:
    """When the federated arm of each run first validated as well as the least good of them ever does, on its clock."""
    costs, notes = [], []
    for cost, key, sign in (("simulated_seconds_to_loss", "val_loss", 1), ("simulated_seconds_to_score", "score", -1)):
        curves = [
            [(line.get("simulated_seconds") or 0.0, sign * line[key]) for line in lines
             if line["arm"] == "federated" and line.get(key) is not None]
            for lines in runs
        ]  # fmt: skip
        if sum(bool(curve) for curve in curves) < 2:
            continue
        level = max(min(value for _, value in curve) for curve in curves if curve)
        values = [next((at for at, value in curve if value <= level), None) for curve in curves]
        costs.append({"settings": {}, "arm": "federated", "cost": cost, "values": values})
        notes.append(f"federated: all reach a validation {key.removeprefix('val_')} of {sign * level:.3f}")
    return costs, notes


def _arms(results: Sequence[Finished]) -> list[str]:
    there = {arm for one in results for arm in one.result["arms"]}
    return [arm for arm in ARMS if arm in there] + sorted(there - set(ARMS))


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if key in BLOCKS and isinstance(value, Mapping):
            flat |= {f"{key}.{leaf}": item for leaf, item in value.items()}
        else:
            flat[key] = value
    return flat


def _differing(each: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all; None where one has no such key."""
    found = {key: [one.get(key) for one in each] for key in dict.fromkeys(keys)}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


# ---- suites ----------------------------------------------------------------------------------------------------------


def _suites(places: Sequence[Path], names: list[str]) -> Compared:
    suites = [read_suite(place) for place in places]
    axes = _shared_axes(suites, names)

    def place_of(row: Row) -> tuple[tuple[tuple[str, str], ...], str, Comparison, str]:
        settings = tuple((axis, value_text(row["settings"][axis])) for axis in axes)
        return settings, row["arm"], row["comparison"], row["metric"]

    tables = [{place_of(row): row for row in suite["table"]} for suite in suites]
    shared = [place for place in tables[0] if any(place in table for table in tables[1:])]
    if not shared:
        raise UserError(
            f"{names[0]} and the others share no row: settings, arms and metrics are all different",
            "compare suites of the same recipes",
            code="compare.nothing",
        )
    metrics = {metric["name"]: metric for suite in suites for metric in suite["metrics"]}
    lines = []
    costs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place in shared:
        _, arm, comparison, name = place
        rows = [table.get(place) for table in tables]
        first = tables[0][place]
        settings = {axis: first["settings"][axis] for axis in axes}
        differences = [_paired(row, first) if number and row is not None else None for number, row in enumerate(rows)]
        lines.append(
            Line(settings, arm, comparison, metrics[name], [row["mean"] if row else None for row in rows],
                 [row["std"] if row else None for row in rows], differences)
        )  # fmt: skip
        for key in COSTS:
            values = [row["costs"].get(key) if row else None for row in rows]
            if comparison == "rounds" and any(values):
                costs.setdefault(
                    (place[0], arm, key), {"settings": settings, "arm": arm, "cost": key, "values": values}
                )
    said = [_flat_suite(suite) for suite in suites]
    settings_said = _differing(said, [key for one in said for key in one])
    versions = _differing([suite["versions"] for suite in suites], ["fedloom", "torch", "transformers", "python"])
    notes = [f"differences are paired by seed, with the {100 * LEVEL:.0f} % interval of a paired t-test; "
             "* is resolved, ~ is not; not corrected for many comparisons"]  # fmt: skip
    notes += [f"{name} is not finished" for name, suite in zip(names, suites, strict=True) if suite["status"] != "done"]
    return Compared("suites", names, settings_said, versions, lines, list(costs.values()), notes)


def _shared_axes(suites: Sequence[SuiteResult], names: Sequence[str]) -> list[str]:
    """The settings by which rows are matched: an axis that only some have must have one value there."""
    axes = [axis for axis in suites[0]["settings"] if all(axis in suite["settings"] for suite in suites)]
    for suite, name in zip(suites, names, strict=True):
        for axis, values in suite["settings"].items():
            if axis not in axes and len(values) > 1:
                raise UserError(
                    f"{name} varies {axis} and another does not have it, so rows cannot be matched",
                    "compare suites whose grids have the same names",
                    code="compare.axes",
                )
    return axes


def _paired(row: Row, first: Row) -> dict[str, Any] | None:
    test = paired(row["values"], first["values"])
    return None if test is None else {**test._asdict(), "resolved": test.resolved}


def _flat_suite(suite: SuiteResult) -> dict[str, Any]:
    """What the suite's file sets in all cells, and what it varies."""
    document = suite["suite"]
    flat = {f"set.{key}": value for key, value in (document.get("set") or {}).items()}
    flat |= {f"grid.{key}": value for key, value in (document.get("grid") or {}).items()}
    return {**flat, "seeds": suite["seeds"], "base": suite["settings"].get("recipe")}
