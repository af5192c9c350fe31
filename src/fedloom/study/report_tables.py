"""What is known of a run, and the tables about runs that one run's page and a page of several share."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.study.findings import own_values
from fedloom.study.folder import RunFolder, is_running
from fedloom.study.page import (
    Cell,
    Column,
    Table,
    bytes_cell,
    cell,
    count_cell,
    flops_cell,
    flops_text,
    loss_cell,
    perplexity_cell,
    points_cell,
    seconds_cell,
    share_cell,
    text_cell,
)
from fedloom.study.pictures import worst_tenth
from fedloom.study.progress import amount
from fedloom.study.result import ARMS

__all__ = [
    "COSTS_ABOUT",
    "SPREAD_ABOUT",
    "Known",
    "arm_cell",
    "bytes_in_all",
    "commands_of",
    "costs_table",
    "equal_samples_about",
    "know",
    "ordered",
    "outcomes_table",
    "quality_about",
    "quality_table",
    "spread_table",
    "status_of",
    "tasks_of",
    "tasks_table",
    "trained_arms",
]

ARM_MEANING = {
    "base": "the model as it came, without any training",
    "local": "each client alone, on its own data",
    "federated": "all clients together, data stays where it is",
    "global": "one place that holds everybody's data",
}
SPREAD_ABOUT = (
    "Over the clients, each on its own test set and each counted once, whatever its size. The worst tenth is the mean "
    "of the tenth of the clients that fare worst, at least one."
)
COSTS_ABOUT = (
    "Bytes are those of serialised payloads. Up and down are per client and round, and in all are of all clients and "
    "rounds together. Times are wall-clock, and the phases do not overlap. Computation is estimated."
)


class Known(NamedTuple):
    """What a run folder says: all of it when the run is done, and as much as there is before."""

    folder: RunFolder
    result: Mapping[str, Any]  # empty before the end
    facts: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    arms: Mapping[str, Mapping[str, Any]]  # results of the arms that are done
    costs: Mapping[str, Mapping[str, Any]]  # of the same, with "bytes_up" and "bytes_down" in all
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]  # arm -> benchmark task -> metric -> value
    outcomes: Mapping[str, Mapping[str, Any]]  # how each arm ended


def know(path: Path) -> Known:
    """Read a run folder.

    Raises:
        UserError: there is no run, or one of its files is damaged.
    """
    folder = RunFolder.look(path)
    result = folder.read_result() or {}
    facts = folder.read_facts()
    lines = folder.read_rounds()
    if result:
        arms, costs = result["arms"], result.get("costs_per_arm", {})
        tasks, outcomes = result.get("tasks") or {}, result.get("outcomes") or {}
    else:
        stages = folder.read_stages()
        arms = {arm: stage["result"] for arm, stage in stages.items() if "result" in stage}
        costs, tasks, outcomes = (
            {arm: stage[key] for arm, stage in stages.items() if stage.get(key)}
            for key in ("costs", "tasks", "outcome")
        )
    totals = {arm: {**bytes_in_all(lines, arm), **costs[arm]} for arm in ordered(costs)}
    data, model = (result.get(key) or facts.get(key) or {} for key in ("data", "model"))
    in_order = {arm: arms[arm] for arm in ordered(arms)}
    tasks = {arm: tasks[arm] for arm in ordered(tasks) if tasks[arm]}
    return Known(folder, result, facts, lines, in_order, totals, data, model, tasks, outcomes)


def ordered(arms: Mapping[str, Any]) -> list[str]:
    return [arm for arm in ARMS if arm in arms] + [arm for arm in arms if arm not in ARMS]


def trained_arms(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arms with a loss after some round. The base has none, only a measurement before round 1 as they all do."""
    known = [line for line in lines if line.get("train_loss") is not None or line.get("val_loss") is not None]
    return ordered({line["arm"]: None for line in known if line["round"] > 0})


def bytes_in_all(lines: Sequence[Mapping[str, Any]], arm: str) -> dict[str, float]:
    """What all clients of an arm sent and received, in all its rounds."""
    totals = {}
    for key in ("bytes_up", "bytes_down"):
        own = [line for line in lines if line["arm"] == arm]
        totals[key] = math.fsum((line.get(f"{key}_per_client") or 0.0) * (line.get("clients") or 0) for line in own)
    return totals


def status_of(known: Known) -> dict[str, str]:
    """How far the run is, as the word on its badge."""
    if known.result.get("status") == "done":
        return {"kind": "done", "text": "finished"}
    last = known.lines[-1] if known.lines else None
    where = f", {last['arm']} round {last['round']}/{last.get('rounds', '?')}" if last else ""
    kind = "running" if is_running(known.folder.path) else "stopped"
    return {"kind": kind, "text": f"{kind}{where}"}


def commands_of(run: Path, result: Mapping[str, Any]) -> list[str]:
    """Lines to paste that make the run again."""
    commands = [f"pip install fedloom=={result['fedloom_version']}"] if result.get("fedloom_version") else []
    recipe = shlex.quote(str(run / "recipe.yaml"))
    commands.append(f"fedloom run {recipe} output_dir={shlex.quote(str(run) + '-again')}")
    return commands


# ------------------------------------------------------------------------------------------------------------- tables


def arm_cell(arm: str, meaning: bool = False) -> Cell:
    return text_cell(arm)._replace(arm=arm, small=ARM_MEANING.get(arm, "") if meaning else "")


def _filled(
    name: str,
    lead: Sequence[Column],
    columns: Sequence[tuple[Column, Callable[[Any], Cell]]],
    rows: Sequence[tuple[Sequence[Cell], Any]],
    note: str = "",
) -> Table:
    """A table without the columns in which no row has anything."""
    cells = [[of(row) for _, of in columns] for _, row in rows]
    kept = [place for place in range(len(columns)) if any(line[place].value not in ("", None) for line in cells)]
    return Table(
        name,
        [*lead, *(columns[place][0] for place in kept)],
        [[*first, *(line[place] for place in kept)] for (first, _), line in zip(rows, cells, strict=True)],
        note,
    )


def _decile(one: Mapping[str, Any], measure: str) -> float | None:
    """The worst tenth's mean on their own tests, from a result of any age."""
    if one["own_test"].get(f"{measure}_decile") is not None:
        return float(one["own_test"][f"{measure}_decile"])
    known = [value for value in own_values(one, measure).values() if value is not None]
    return worst_tenth(known, lowest=measure == "score") if known else None


def _perplexity(one: Mapping[str, Any]) -> float | None:
    if one.get("perplexity") is not None:
        return float(one["perplexity"])
    if one.get("preference_accuracy") is not None:
        return None  # the loss is of pairs
    loss = one.get("loss")
    return math.exp(loss) if loss is not None and loss < 700 else None


def quality_about(measure: str) -> str:
    """How to read `quality_table`."""
    if measure == "score":
        text = (
            "Score and loss are on the test sets of all clients together; own test, worst tenth, worst client and std "
            "(in points) are over the clients, each on its own test set."
        )
    else:
        text = "Loss is on the test sets of all clients together; own loss is the mean of each client on its own."
    return (
        f"{text} Local has one model per client, and its figures are means over them. Loss: nats per answer "
        "token; of pairs of answers, the loss per pair."
    )


def quality_table(
    name: str,
    lead: Sequence[Column],
    rows: Sequence[tuple[Sequence[Cell], Mapping[str, Any]]],
    extra: Sequence[tuple[Column, Callable[[Any], Cell]]] = (),
) -> Table:
    """Scores and losses: a row per arm (of each run), `lead` says which."""
    own = "mean over the clients, each on its own test set"
    columns = [
        *extra,
        (
            Column("score", "on the test sets of all clients together"),
            lambda one: share_cell(one["score"])._replace(strong=True),
        ),
        (Column("own test", own), lambda one: share_cell(one["own_test"]["score"])),
        (Column("worst tenth", "mean of the clients that fare worst"), lambda one: share_cell(_decile(one, "score"))),
        (Column("worst client"), lambda one: share_cell(one["own_test"]["score_worst"])),
        (Column("std, points", "over the clients"), lambda one: points_cell(one["own_test"]["score_std"])),
        (
            Column("ranked right", "pairs whose chosen answer has the higher reward; a tie counts half"),
            lambda one: share_cell(one.get("preference_accuracy"))._replace(strong=True),
        ),
        (
            Column("reward margin", "beta log pi/ref, chosen less rejected"),
            lambda one: loss_cell(one.get("reward_margin")),
        ),
        (Column("reward, chosen"), lambda one: loss_cell(one.get("reward_chosen"))),
        (Column("reward, rejected"), lambda one: loss_cell(one.get("reward_rejected"))),
        (Column("loss", "nats per answer token or per pair, on all test sets"), lambda one: loss_cell(one["loss"])),
        (Column("perplexity", "e to the loss"), lambda one: perplexity_cell(_perplexity(one))),
        (Column("own loss", own), lambda one: loss_cell(one["own_test"]["loss"])),
    ]
    return _filled(name, lead, columns, rows)


def spread_table(
    measure: str, lead: Sequence[Column], rows: Sequence[tuple[Sequence[Cell], Mapping[str, Any]]]
) -> Table | None:
    """How far apart the clients are on their own tests, in score or loss; None where there are not two to compare."""
    shares = measure == "score"
    show = share_cell if shares else loss_cell
    spreads = []
    for first, one in rows:
        known = sorted(value for value in own_values(one, measure).values() if value is not None)
        if len(known) > 1:
            spreads.append((first, (known, one)))
    if not spreads:
        return None

    def mean(known: Sequence[float]) -> float:
        return math.fsum(known) / len(known)

    def std(known: Sequence[float]) -> float:
        return math.sqrt(math.fsum((value - mean(known)) ** 2 for value in known) / len(known))

    def at(share: float) -> Callable[[Any], Cell]:
        return lambda row: show(row[0][round(share * (len(row[0]) - 1))])

    columns: list[tuple[Column, Callable[[Any], Cell]]] = [
        (Column("clients"), lambda row: cell(len(row[0]), lambda x: f"{x:,.0f}")),
        (Column("mean"), lambda row: show(mean(row[0]))._replace(strong=True)),
        (Column("worst tenth"), lambda row: show(_decile(row[1], measure))),
        (Column("worst"), at(0.0 if shares else 1.0)),
        (Column("median"), lambda row: show((row[0][(len(row[0]) - 1) // 2] + row[0][len(row[0]) // 2]) / 2)),
        (Column("best"), at(1.0 if shares else 0.0)),
        (
            Column("std, points" if shares else "std"),
            lambda row: (points_cell if shares else loss_cell)(std(row[0])),
        ),
    ]
    return _filled("Score" if shares else "Loss, nats per answer token", lead, columns, spreads)


def _memory_cell(costs: Mapping[str, Any]) -> Cell:
    found = bytes_cell(costs.get("peak_memory_bytes"))
    if costs.get("peak_memory_of") == "process" and found.value != "":
        return found._replace(note=f"{found.note}, the highest since the process began")
    return found


def _flops_cell(costs: Mapping[str, Any]) -> Cell:
    found = flops_cell(costs.get("flops"))
    if costs.get("flops_padded") and found.value != "":
        return found._replace(note=f"{found.note}; with padding {flops_text(costs['flops_padded'])}")
    return found


def outcomes_table(outcomes: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """How arms ended, and which of their states was tested; None where that was not noted."""
    rows = []
    for arm in ordered(outcomes):
        one = outcomes[arm]
        value = one.get("best_value")
        rows.append(
            [
                arm_cell(arm),
                cell(one.get("rounds"), lambda x: f"{x:,.0f}"),
                cell(one.get("planned_rounds"), lambda x: f"{x:,.0f}"),
                Cell("yes" if one.get("stopped_early") else "no"),
                cell(one.get("round"), lambda x: f"{x:,.0f}")._replace(strong=True),
                cell(one.get("best_round"), lambda x: f"{x:,.0f}"),
                text_cell(str(one["best_by"])) if one.get("best_by") else Cell("–", ""),
                cell(value, lambda x: f"{x:.4g}"),
            ]
        )
    columns = [
        Column("arm", text=True), Column("rounds done"), Column("planned"), Column("stopped early", text=True),
        Column("tested", "the round whose state the figures are of"), Column("best round"),
        Column("best by", text=True), Column("its value"),
    ]  # fmt: skip
    return Table("How the arms ended", columns, rows) if rows else None


def costs_table(
    name: str, lead: Sequence[Column], rows: Sequence[tuple[Sequence[Cell], Mapping[str, Any]]]
) -> Table | None:
    """What each arm (of each run) cost; None where nothing is known."""
    columns: list[tuple[Column, Callable[[Any], Cell]]] = [
        (Column("up", "bytes a client sends in a round"), lambda c: bytes_cell(c.get("bytes_up_per_client_round"))),
        (
            Column("down", "bytes a client receives in a round"),
            lambda c: bytes_cell(c.get("bytes_down_per_client_round")),
        ),
        (Column("up in all"), lambda c: bytes_cell(c.get("bytes_up"))),
        (Column("down in all"), lambda c: bytes_cell(c.get("bytes_down"))),
        (Column("rounds"), lambda c: count_cell(c.get("rounds"))),
        (Column("samples", "trained on, of all clients together"), lambda c: count_cell(c.get("samples"))),
        (Column("per model", "samples that one model has seen"), lambda c: count_cell(c.get("samples_per_model"))),
        (Column("tokens", "trained on"), lambda c: count_cell(c.get("train_tokens"))),
        (Column("training"), lambda c: seconds_cell(c.get("train_seconds"))),
        (Column("communication"), lambda c: seconds_cell(c.get("communication_seconds"))),
        (Column("evaluation"), lambda c: seconds_cell(c.get("evaluate_seconds"))),
        (Column("checkpoints"), lambda c: seconds_cell(c.get("checkpoint_seconds"))),
        (Column("tokens/s", "while training"), lambda c: count_cell(c.get("tokens_per_second"))),
        (Column("peak memory", "of the arm, or of the process until the arm's end"), _memory_cell),
        (Column("computation", "floating-point operations, estimated"), _flops_cell),
        (
            Column("trained", "share of the parameters"),
            lambda c: cell(c.get("trainable_share") or None, lambda x: f"{100 * x:.3g} %"),
        ),
    ]
    table = _filled(name, lead, columns, rows)
    return table if len(table.columns) > len(lead) else None


def _metric_cell(value: Any, name: str) -> Cell:
    """A benchmark's figure: a share unless its size or its name speaks against it."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return Cell("–", "")
    counts = ("perplexity", "loss", "nats", "bits", "items", "count", "seconds", "tokens")
    if 0 <= value <= 1 and not any(part in name.lower() for part in counts):
        return share_cell(float(value))
    return cell(float(value), lambda x: amount(x) if x >= 10_000 else f"{x:,.4g}")


def tasks_of(tasks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (task, metric) pairs of {arm: {task: {metric: value}}}, in their order."""
    found = {(task, metric): None for table in tasks.values() for task, row in table.items() for metric in row}
    return list(found)


def tasks_table(
    tasks: Sequence[tuple[Sequence[Cell], Mapping[str, Any]]], lead: Sequence[Column], name: str = "Benchmark tasks"
) -> Table | None:
    """Benchmark tasks: a row per arm (of each run), a column per task and metric; None without any."""
    pairs = tasks_of({str(place): table for place, (_, table) in enumerate(tasks)})
    if not pairs:
        return None
    several = {task for task, _ in pairs if sum(task == other for other, _ in pairs) > 1}
    columns = [
        Column(f"{task}: {metric.replace('_', ' ')}" if task in several else task, metric.replace("_", " "))
        for task, metric in pairs
    ]
    rows = [
        [*first, *(_metric_cell((table.get(task) or {}).get(metric), metric) for task, metric in pairs)]
        for first, table in tasks
    ]
    note = "" if several else "Metric: " + ", ".join(dict.fromkeys(metric.replace("_", " ") for _, metric in pairs))
    return Table(name, [*lead, *columns], rows, note + "." if note else "")


def equal_samples_about(equal: Mapping[str, Any]) -> str:
    """What is compared when arms are compared after the same number of samples."""
    if equal.get("samples") is None:
        return ""
    samples = f"{equal['samples']:,}"
    return (
        f"Each arm after the first round by which its model had seen {samples} samples, as many as a local model sees "
        "in the run; or at its end, where it has seen fewer."
    )
