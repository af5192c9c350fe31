"""From the results of a suite's cells to its table, its differences and their texts. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedloom.study.progress import amount, byte_text, duration
from fedloom.study.result import ARMS
from fedloom.study.statistics import LEVEL, holm, paired, summary
from fedloom.study.suite import value_text
from fedloom.study.suite_result import COSTS, METRICS, Comparison, Difference, Metric, Row, SuiteResult

__all__ = [
    "Finished",
    "arms_of",
    "cost_text",
    "csv_text",
    "difference_text",
    "differences_of",
    "grouped",
    "markdown",
    "mean_text",
    "metrics_of",
    "notes_of",
    "rows_of",
    "value_of",
    "varied",
    "verdict",
]

COMPARISONS: Mapping[Comparison, str] = {"rounds": "at equal rounds", "samples": "at equal samples"}

# Which arms are compared: what the federation gains over the base and over training alone, and what it lacks to pooled
# data. Without a federated arm, the others among themselves.
PAIRS = (("federated", "base"), ("federated", "local"), ("global", "federated"), ("local", "base"))
PAIRS_WITHOUT = (("local", "base"), ("global", "base"), ("global", "local"))


class Finished(NamedTuple):
    """A cell that is done."""

    settings: Mapping[str, Any]
    seed: int
    result: Mapping[str, Any]  # result.json
    rounds: Sequence[Mapping[str, Any]]  # rounds.jsonl


def arms_of(finished: Iterable[Finished]) -> list[str]:
    """The arms that any cell has, in the order of tables."""
    there = {arm for cell in finished for arm in cell.result["arms"]}
    return [arm for arm in ARMS if arm in there] + sorted(there - set(ARMS))


# ---- values ----------------------------------------------------------------------------------------------------------


def value_of(result: Mapping[str, Any], arm: str, metric: str, comparison: Comparison = "rounds") -> float | None:
    """One figure of one run; None where it was not measured.

    At equal samples, an arm that the run did not measure there is taken from its end if its end is that point: the
    base, which sees none, and the local models, which set the number.
    """
    head, _, rest = metric.partition(".")
    if head == "tasks":
        task, _, name = rest.partition(".")
        value = (result.get("tasks") or {}).get(arm, {}).get(task, {}).get(name) if comparison == "rounds" else None
    else:
        outcome = _outcome(result, arm, comparison)
        if head == "own_test":
            outcome, head = outcome.get("own_test") or {}, rest
        value = outcome.get(head)
    return float(value) if isinstance(value, int | float) else None


def _outcome(result: Mapping[str, Any], arm: str, comparison: Comparison) -> Mapping[str, Any]:
    at_end: Mapping[str, Any] = result["arms"].get(arm) or {}
    if comparison == "rounds":
        return at_end
    equal = result.get("equal_samples") or {}
    if arm in equal.get("arms", {}):
        outcome: Mapping[str, Any] = equal["arms"][arm]["result"]
        return outcome
    return at_end if equal and arm in ("base", "local") else {}


def metrics_of(finished: Sequence[Finished], wanted: Sequence[str] | None = None) -> list[Metric]:
    """What is tabulated: what was asked for, or score and loss (together and each client on its own) and all of tasks.

    A metric that no cell has is left out, unless it was asked for.
    """
    names = list(wanted or ())
    if not names:
        tasks = {
            f"tasks.{task}.{metric}": None
            for cell in finished
            for found in (cell.result.get("tasks") or {}).values()
            for task, values in found.items()
            for metric in values
        }
        scored = any(
            value_of(cell.result, arm, "score") is not None for cell in finished for arm in cell.result["arms"]
        )
        usual = ["score", "loss", "own_test.score", "own_test.score_worst"]
        usual = usual if scored else ["loss", "perplexity", "own_test.loss"]
        usual += ["preference_accuracy", "reward_margin", "own_test.preference_accuracy"]
        names = [
            name
            for name in (*usual, *tasks)
            if any(value_of(cell.result, arm, name) is not None for cell in finished for arm in cell.result["arms"])
        ]
    return [_metric(name, finished) for name in names]


def _metric(name: str, finished: Sequence[Finished]) -> Metric:
    head, _, rest = name.partition(".")
    if head != "tasks":
        title, unit, better = METRICS[rest if head == "own_test" else name]
        return {"name": name, "title": f"own test: {title}" if head == "own_test" else title, "unit": unit,
                "better": better}  # fmt: skip
    task, _, metric = rest.partition(".")
    title = f"{task} {metric}".replace("_", " ")
    less = any(word in metric for word in ("perplexity", "loss", "seconds", "error", "bits_per"))
    values = [value for cell in finished for arm in cell.result["arms"]
              if (value := value_of(cell.result, arm, name)) is not None]  # fmt: skip
    share = not less and all(0 <= value <= 1 for value in values)
    return {
        "name": name,
        "title": title,
        "unit": "share" if share else "number",
        "better": "lower" if less else "higher",
    }


def costs_of(cell: Finished, arm: str, comparison: Comparison) -> dict[str, float]:
    """What an arm cost in one run, by the names of COSTS."""
    if comparison == "samples":
        at = (cell.result.get("equal_samples") or {}).get("arms", {}).get(arm)
        return {"samples_per_model": float(at["samples"]), "rounds": float(at["round"])} if at else {}
    costs = cell.result.get("costs_per_arm", {}).get(arm, {})
    whole = cell.result.get("costs", {})
    found = {key: costs[key] for key in COSTS if costs.get(key) is not None}
    lines = [line for line in cell.rounds if line["arm"] == arm and line.get("clients") is not None]
    for way in ("up", "down"):
        key = f"bytes_{way}_per_client"
        if lines and all(line.get(key) is not None for line in lines):
            found[f"bytes_{way}"] = sum(line[key] * line["clients"] for line in lines)
    if whole.get("peak_memory_bytes") is not None:
        found.setdefault("peak_memory_bytes", whole["peak_memory_bytes"])
    if whole.get("total_parameters"):
        share = whole["trainable_parameters"] / whole["total_parameters"] if arm != "base" else 0.0
        found.setdefault("trainable_share", share)
    return {key: float(value) for key, value in found.items()}


def rows_of(finished: Sequence[Finished], metrics: Sequence[Metric]) -> list[Row]:
    """A row per settings, arm, comparison and metric, over the seeds that have the figure."""
    groups: dict[tuple[str, ...], list[Finished]] = {}
    for cell in finished:
        groups.setdefault(tuple(value_text(value) for value in cell.settings.values()), []).append(cell)
    rows: list[Row] = []
    for cells in groups.values():
        cells = sorted(cells, key=lambda cell: cell.seed)
        for arm in arms_of(cells):
            for comparison in COMPARISONS:
                each = [costs_of(cell, arm, comparison) for cell in cells if arm in cell.result["arms"]]
                costs = {}
                for key in COSTS:
                    known = [one[key] for one in each if key in one]
                    if known and len(known) == len(each):
                        costs[key] = summary(known).mean or 0.0
                for metric in metrics:
                    values = {
                        str(cell.seed): value
                        for cell in cells
                        if (value := value_of(cell.result, arm, metric["name"], comparison)) is not None
                    }
                    if values:
                        n, mean, std = summary(list(values.values()))
                        rows.append({"settings": dict(cells[0].settings), "arm": arm, "comparison": comparison,
                                     "metric": metric["name"], "n": n, "mean": mean, "std": std, "values": values,
                                     "costs": costs})  # fmt: skip
    return rows


# ---- differences -----------------------------------------------------------------------------------------------------


def differences_of(
    rows: Sequence[Row], axes: Mapping[str, Sequence[Any]], same_tests: Sequence[str]
) -> list[Difference]:
    """Paired differences between arms, and between the first value of each axis in `same_tests` and its others.

    Holm's correction is over all differences of one metric in one comparison between arms, and likewise for each axis.
    """
    found: list[Difference] = []
    by_place = {(_texts(row["settings"]), row["arm"], row["comparison"], row["metric"]): row for row in rows}
    arms = dict.fromkeys(row["arm"] for row in rows)
    pairs = PAIRS if "federated" in arms else PAIRS_WITHOUT
    order = dict.fromkeys((_texts(row["settings"]), row["comparison"], row["metric"]) for row in rows)
    for settings, comparison, metric in order:
        for a, b in pairs:
            first = by_place.get((settings, a, comparison, metric))
            second = by_place.get((settings, b, comparison, metric))
            if first is not None and second is not None:
                found += _difference(first, second, "arm", a, b, dict(first["settings"]))
    for axis in same_tests:
        reference, *others = [value_text(value) for value in axes.get(axis, [""])]
        for row in rows:
            if row["arm"] == "base" or value_text(row["settings"][axis]) not in others:
                continue
            beside = tuple((name, reference if name == axis else text) for name, text in _texts(row["settings"]))
            second = by_place.get((beside, row["arm"], row["comparison"], row["metric"]))
            if second is not None:
                rest = {name: value for name, value in row["settings"].items() if name != axis}
                found += _difference(row, second, axis, value_text(row["settings"][axis]), reference, rest)
    families: dict[tuple[str, str, str], list[Difference]] = {}
    for one in found:
        families.setdefault((one["metric"], one["comparison"], one["by"]), []).append(one)
    for family in families.values():
        for one, adjusted in zip(family, holm([one["p"] for one in family]), strict=True):
            one["p_holm"] = adjusted
            one["resolved_holm"] = adjusted is not None and adjusted <= 1 - LEVEL
    return found


def _texts(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, value_text(value)) for name, value in settings.items())


def _difference(first: Row, second: Row, by: str, a: str, b: str, settings: dict[str, Any]) -> list[Difference]:
    test = paired(first["values"], second["values"])
    if test is None:
        return []
    made: Difference = {
        "settings": settings,
        "by": by,
        "a": a,
        "b": b,
        "comparison": first["comparison"],
        "metric": first["metric"],
        "n": test.n,
        "mean": test.mean,
        "low": test.low,
        "high": test.high,
        "level": LEVEL,
        "p": test.p,
        "p_holm": None,
        "resolved": test.resolved,
        "resolved_holm": False,
    }
    if by != "arm":
        made["arm"] = first["arm"]
    return [made]


def notes_of(finished: Sequence[Finished], seeds: Sequence[int], differences: Sequence[Difference]) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        "mean ± standard deviation over seeds (of a sample, divided by n - 1); a seed draws the training rows of "
        "built-in tasks (their test rows are always the same), the split of other data, the adapter's start and the "
        "order of rows"
    ]
    if any(one["n"] > 1 for one in differences):
        notes.append(
            f"differences are paired by seed; in brackets the {100 * LEVEL:.0f} % interval of a paired t-test; "
            "** holds after Holm's correction over all differences of that metric, * holds alone, "
            "~ is not resolved: the interval contains 0, or the difference is the same in every seed and there are "
            "fewer than 6 (a sign test)"
        )
    if len(seeds) < 3:
        notes.append(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: too few for an interval that says much")
    if any("equal_samples" in cell.result for cell in finished):
        notes.append(
            "at equal rounds every arm has made the same rounds and steps, and the federated and the global model have "
            "seen the rows of a whole cohort in each; at equal samples they are taken from the first round in which "
            "they have seen as many rows as one local model sees in the whole run"
        )
    stopped = [cell for cell in finished
               if any(one.get("stopped_early") for one in (cell.result.get("outcomes") or {}).values())]  # fmt: skip
    if stopped:
        notes.append(f"early stopping ended an arm before its last round in {len(stopped)} of {len(finished)} runs")
    return notes


# ---- texts -----------------------------------------------------------------------------------------------------------


def mean_text(metric: Metric, mean: float | None, std: float | None) -> str:
    """A mean with its deviation: `85.3 ± 1.2 %`."""
    if mean is None:
        return "–"
    if metric["unit"] == "share":
        return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "") + " %"
    digits = 3 if abs(mean) < 1000 else 0
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def difference_text(metric: Metric, one: Difference) -> str:
    """A difference with its interval and its mark: `+12.3 [8.1, 16.5] **`; shares are in points."""
    factor, digits = (100, 1) if metric["unit"] == "share" else (1, 3 if abs(one["mean"]) < 1000 else 0)
    text = f"{factor * one['mean']:+.{digits}f}"
    if one["low"] is not None and one["high"] is not None:
        text += f" [{factor * one['low']:.{digits}f}, {factor * one['high']:.{digits}f}]"
    return f"{text} {verdict(one)}".rstrip()


def verdict(one: Difference) -> str:
    """The mark of a difference; none for one seed."""
    if one["low"] is None:
        return ""
    return "**" if one["resolved_holm"] and one["resolved"] else "*" if one["resolved"] else "~"


def cost_text(key: str, value: float) -> str:
    """A cost in its unit."""
    unit = COSTS[key][1]
    if unit == "bytes":
        return byte_text(value)
    if unit == "seconds":
        return duration(value)
    if unit == "share":
        return f"{100 * value:.2g} %"
    if unit == "FLOP":
        return f"{value:.1e}"
    return amount(value)


def varied(suite: SuiteResult) -> list[str]:
    """The settings that have more than one value, in order."""
    return [name for name, values in suite["settings"].items() if len(values) > 1]


class Group(NamedTuple):
    """A line of the table: all metrics of one arm with one choice of settings."""

    settings: Mapping[str, Any]
    arm: str
    comparison: Comparison
    metrics: Mapping[str, Row]
    costs: Mapping[str, float]

    @property
    def n(self) -> str:
        """How many seeds, a range where metrics differ."""
        counts = sorted({row["n"] for row in self.metrics.values()})
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


def grouped(suite: SuiteResult, comparison: Comparison | None = None) -> list[Group]:
    """The table's lines, in order; of one comparison, or of all."""
    groups: dict[tuple[Any, ...], Group] = {}
    for row in suite["table"]:
        if comparison in (None, row["comparison"]):
            key = (_texts(row["settings"]), row["arm"], row["comparison"])
            group = groups.setdefault(key, Group(row["settings"], row["arm"], row["comparison"], {}, row["costs"]))
            groups[key] = group._replace(metrics={**group.metrics, row["metric"]: row})
    return list(groups.values())


TABLE_COSTS = (
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "bytes_up",
    "train_seconds",
    "communication_seconds",
    "evaluate_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "flops",
    "trainable_share",
)


def markdown(suite: SuiteResult) -> str:
    """table.md."""
    names, metrics = varied(suite), suite["metrics"]
    done = sum(cell["status"] == "done" for cell in suite["cells"])
    seeds = ", ".join(map(str, suite["seeds"]))
    state = f"seeds {seeds}; fedloom {suite['fedloom_version']}, {suite['status']}"
    used = sum({cell["id"]: cell.get("cpu_seconds", 0.0) for cell in suite["cells"]}.values())
    state += f"; {duration(used)} of processor time" if used else ""
    lines = [f"# {suite['name']}", "", f"{done} of {len(suite['cells'])} runs, {state}.", ""]
    for comparison, title in COMPARISONS.items():
        groups = grouped(suite, comparison)
        if not groups:
            continue
        known = [metric for metric in metrics if any(metric["name"] in group.metrics for group in groups)]
        lines += [f"## Scores {title}", ""]
        lines += _table(
            [*names, "arm", *(metric["title"] for metric in known), "n"],
            [
                [*(value_text(group.settings[name]) for name in names), group.arm,
                 *(_cell_text(metric, group.metrics.get(metric["name"])) for metric in known), group.n]
                for group in groups
            ],
        )  # fmt: skip
    for comparison, title in COMPARISONS.items():
        lines += _difference_lines(suite, comparison, title)
    groups = [group for group in grouped(suite, "rounds") if group.costs]
    costs = [key for key in TABLE_COSTS if any(group.costs.get(key) for group in groups)]
    if costs:
        lines += ["## Costs", ""]
        lines += _table(
            [*names, "arm", *(COSTS[key][0] for key in costs)],
            [
                [*(value_text(group.settings[name]) for name in names), group.arm,
                 *(cost_text(key, group.costs[key]) if group.costs.get(key) else "–" for key in costs)]
                for group in groups
            ],
        )  # fmt: skip
    failed = [cell for cell in suite["cells"] if cell["status"] == "failed"]
    if failed:
        lines += ["## Failed", ""]
        lines += _table(
            ["settings", "seed", "reason"],
            [
                [", ".join(map(value_text, cell["settings"].values())), str(cell["seed"]), cell.get("reason", "")]
                for cell in failed
            ],
        )
    lines += [f"- {note}" for note in suite["notes"]]
    return "\n".join(lines) + "\n"


def _cell_text(metric: Metric, row: Row | None) -> str:
    return "–" if row is None else mean_text(metric, row["mean"], row["std"])


def _difference_lines(suite: SuiteResult, comparison: Comparison, title: str) -> list[str]:
    metrics = {metric["name"]: metric for metric in suite["metrics"]}
    lines: list[str] = []
    names = varied(suite)
    for by in dict.fromkeys(one["by"] for one in suite["differences"]):
        wanted = [one for one in suite["differences"] if one["by"] == by and one["comparison"] == comparison]
        if not wanted:
            continue
        groups: dict[tuple[Any, ...], dict[str, Difference]] = {}
        for one in wanted:
            key = (_texts(one["settings"]), one.get("arm", ""), one["a"], one["b"])
            groups.setdefault(key, {})[one["metric"]] = one
        shown = [name for name in names if name != by]
        known = [name for name in metrics if any(name in group for group in groups.values())]
        lines += [f"## Differences between {'arms' if by == 'arm' else f'values of {by}'} {title}", ""]
        rows = []
        for (settings, arm, a, b), group in groups.items():
            texts = dict(settings)
            cells = (difference_text(metrics[name], group[name]) if name in group else "–" for name in known)
            rows.append([*(texts[name] for name in shown), *([arm] if by != "arm" else []), f"{a} − {b}", *cells])
        lines += _table(
            [*shown, *(["arm"] if by != "arm" else []), "difference", *(metrics[name]["title"] for name in known)], rows
        )
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows), ""]


def csv_text(suite: SuiteResult) -> str:
    """table.csv: a line per settings, arm and comparison; numbers as they are, in the units of suite.json."""
    settings = list(suite["settings"])
    metrics = [metric["name"] for metric in suite["metrics"]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    figures = [f"{name}_{what}" for name in metrics for what in ("mean", "std", "n")]
    writer.writerow([*settings, "arm", "comparison", *figures, *COSTS])
    for group in grouped(suite):
        found: list[Any] = []
        for name in metrics:
            row = group.metrics.get(name)
            found += ["", "", 0] if row is None else [row["mean"], "" if row["std"] is None else row["std"], row["n"]]
        costs = [group.costs.get(key, "") for key in COSTS]
        writer.writerow([*(value_text(group.settings[name]) for name in settings), group.arm, group.comparison, *found,
                         *costs])  # fmt: skip
    return out.getvalue()
