"""report.html of a run: one file that opens from disk or mail, in light and dark, and asks for nothing else.

It is made from the run folder alone, so it can be made at any time: while the run goes on it shows what is known. The
pages of several runs and of suites are in `report_compare` and `report_suite`; `write_report` writes any of them.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import UserError
from fedloom.study import findings, pictures
from fedloom.study.draw import short
from fedloom.study.findings import percent, tied
from fedloom.study.page import (
    MOST_ROWS,
    Cell,
    Column,
    Figure,
    Table,
    cell,
    count_cell,
    flops_text,
    loss_cell,
    plain_text,
    render,
    share_cell,
    tables_of,
    text_cell,
    write_page,
)
from fedloom.study.progress import amount, byte_text, duration, round_text
from fedloom.study.report_tables import (
    COSTS_ABOUT,
    SPREAD_ABOUT,
    Known,
    arm_cell,
    commands_of,
    costs_table,
    equal_samples_about,
    know,
    ordered,
    outcomes_table,
    quality_about,
    quality_table,
    spread_table,
    status_of,
    tasks_of,
    tasks_table,
    trained_arms,
)
from fedloom.study.result import skipped_leaves
from fedloom.study.suite_result import is_suite, read_suite

__all__ = ["measure_of", "run_figures", "write_picture", "write_report", "written_now"]

_MOST_TASK_FIGURES = 4
_BY_ARM = [Column("arm", text=True)]


def write_report(runs: Path | Sequence[Path], dest: Path | None = None) -> Path:
    """Write the report of a run, of a suite, or of several of them side by side; finished or not.

    Args:
        runs: a run folder, a suite folder, or several of them (a suite among several stands for its runs).
        dest: a file, or a folder that gets report.html; report.html in the folder itself by default, and in the
            current folder for several.

    Returns:
        The file written. It appears whole: an older one stays until the new one is complete.

    Raises:
        UserError: there is no run, one of its files is damaged, `dest` is in no folder or is a file of another kind.
        RunError: the disk is full.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    if not folders:
        raise UserError("a report needs a run folder", "fedloom report runs/NAME", code="report.nothing")
    own = folders[0] if len(folders) == 1 else Path()
    target = own / "report.html" if dest is None else dest / "report.html" if dest.is_dir() else dest
    if len(folders) > 1:
        from fedloom.study.report_compare import compare_page

        page = compare_page(folders)
    elif is_suite(own):
        from fedloom.study.report_suite import suite_page

        page = suite_page(own)
    else:
        page = render("run.html.j2", _content(know(own)))
    write_page(page, target, ours=dest is None and len(folders) == 1)
    return target


def write_picture(runs: Path | Sequence[Path], path: Path) -> Path:
    """Write the picture of quality against bytes as a file of its own: an SVG, PNG or PDF, as its name ends.

    Args:
        runs: as for `write_report`.
        path: the file.

    Raises:
        UserError: no bytes were sent in these runs, there is no run, or the file cannot be written under this name.
        RunError: the disk is full.
    """
    from fedloom.study.draw import check_picture_file, picture_file
    from fedloom.study.pictures_many import quality_bytes
    from fedloom.study.report_compare import known_runs, run_points
    from fedloom.study.report_suite import suite_panels

    check_picture_file(path)
    folders = [runs] if isinstance(runs, Path) else list(runs)
    if len(folders) == 1 and is_suite(folders[0]):
        found = suite_panels(read_suite(folders[0]))
        drawn = quality_bytes(found[0], found[1]["title"], found[1]["unit"] == "share") if found else None
    else:
        known = known_runs(folders)
        measure = measure_of(one for run in known.values() for one in run.arms.values())
        drawn = quality_bytes(
            [("", run_points(known, measure))], f"{measure} on the common test set", measure == "score"
        )
    if drawn is None:
        names = ", ".join(map(str, folders[:4])) + (" and more" if len(folders) > 4 else "")
        raise UserError(
            f"{names}: no arm that is done has sent any bytes, so there is nothing to set quality against",
            "the arm `federated` sends some",
            code="report.picture",
        )
    _, height, draw = drawn
    picture_file(path, height, draw)
    return path


def measure_of(arms: Iterable[Mapping[str, Any]]) -> str:
    """What a page is about: the score where there is one, else the loss."""
    return "score" if any(one["score"] is not None for one in arms) else "loss"


# ---------------------------------------------------------------------------------------------------------- one run


def _content(known: Known) -> dict[str, Any]:
    result, arms, lines = known.result, known.arms, known.lines
    costs = result.get("costs", {})
    measure = measure_of(arms.values())
    clients = _clients(arms, measure)
    equal = result.get("equal_samples") or {}
    by_arm = [([arm_cell(arm, meaning=True)], one) for arm, one in arms.items()]
    parts = {
        "arms": (
            "Arms",
            [quality_table("Arms", _BY_ARM, by_arm)] if arms else [],
            "After the same number of rounds in every arm. " * bool(equal) + quality_about(measure),
        ),
        "ends": ("How the arms ended", _some(outcomes_table(known.outcomes)), ""),
        "samples": ("After the same number of samples", _equal_samples(equal), equal_samples_about(equal)),
        "tasks": (
            "Benchmark tasks",
            _some(tasks_table([([arm_cell(arm)], table) for arm, table in known.tasks.items()], _BY_ARM)),
            "",
        ),
        "spread": (
            "Spread over the clients",
            _some(*(spread_table(kind, _BY_ARM, [([arm_cell(arm)], arms[arm]) for arm in arms])
                    for kind in ("score", "loss"))),
            SPREAD_ABOUT,
        ),
        "costs": (
            "Costs",
            _some(costs_table("Costs", _BY_ARM, [([arm_cell(arm)], cost) for arm, cost in known.costs.items()])),
            COSTS_ABOUT,
        ),
        "clients": ("Clients", _client_tables(known, clients, measure), ""),
        "failed": ("Clients that failed", _failure_tables(lines), ""),
    }  # fmt: skip
    data_facts, data_tables = tables_of({key: value for key, value in known.data.items() if key != "heterogeneity"})
    facts = (
        ("The run", _cost_rows(costs)),
        ("Model", tables_of(known.model)[0]),
        ("Skipped", [(name, plain_text(why)) for name, why in skipped_leaves(result)]),
    )
    return {
        "name": _name(known),
        "status": status_of(known),
        "finding": tied(findings.headline(arms, lines, trained_arms(lines))),
        "written": written_now(),
        "warnings": [],
        "tiles": _tiles(known),
        "figures": run_figures(known),
        "sections": [
            *((id, title) for id, (title, tables, _) in parts.items() if tables),
            *([("data", "Data")] if known.data else []),
            ("reproduce", "How to reproduce"),
        ],
        "parts": [(id, *part) for id, part in parts.items()],
        "facts": [(title, rows) for title, rows in facts if rows],
        "data_facts": data_facts,
        "data_tables": [*_heterogeneity_tables(known.data), *data_tables],
        "recipe": known.folder.recipe.read_text(encoding="utf-8"),
        "versions": list((result.get("versions") or known.facts.get("versions") or {}).items()),
        "commands": commands_of(known.folder.path, result),
        "version": result.get("fedloom_version"),
        "seed": result.get("seed"),
        "last_rounds": [f"{line['arm']}: {round_text(line)}" for line in lines[-5:]] if not result else [],
    }


def written_now() -> str:
    return datetime.datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z")


def _name(known: Known) -> str:
    """The folder's name, and the recipe's where it says something else."""
    folder = known.folder.path.resolve().name
    said = (known.result.get("recipe") or {}).get("name")
    return short(f"{said} ({folder})" if said and str(said) != folder else folder, 160)


def _some(*tables: Table | None) -> list[Table]:
    return [table for table in tables if table is not None]


def _clients(arms: Mapping[str, Any], measure: str) -> list[str]:
    """All clients with a score (or loss) of their own, the one that does best in the most interesting arm first."""
    tables = {arm: findings.own_values(one, measure) for arm, one in arms.items()}
    seen = list(dict.fromkeys(client for table in tables.values() for client in table))
    lead = tables[findings.lead_of({arm: table for arm, table in tables.items() if table}) or "base"] if seen else {}
    sign = -1.0 if measure == "score" else 1.0
    return sorted(seen, key=lambda client: sign * value if (value := lead.get(client)) is not None else math.inf)


# --------------------------------------------------------------------------------------------------------- pictures


def run_figures(known: Known) -> list[Figure]:
    """The pictures of a run, of what there is so far."""
    arms, lines, data = known.arms, known.lines, known.data
    figures: list[Figure] = []

    def figure(name: str, finding: str, about: str, svg: str) -> None:
        if svg:
            figures.append(Figure(name, tied(finding), tied(about), svg))

    measure = measure_of(arms.values())
    scored = measure == "score"
    if scored:
        about = "Mean score on the test sets of all clients together, and each client on its own."
        figure("score", findings.order_finding(arms, "score"), about, pictures.score_picture(arms, "score"))
    elif any(one["loss"] is not None for one in arms.values()):
        about = "Mean loss on the test sets of all clients together; less is better."
        figure("score", findings.order_finding(arms, "loss"), about, pictures.score_picture(arms, "loss"))
    training = trained_arms(lines)
    if training:
        about = f"Mean per {pictures.loss_per(lines)}. Validation: each client's model on its own rows, not trained on."
        figure("loss", findings.rounds_finding(lines, training), about, pictures.loss_picture(lines, training))
    _round_figures(known, training, figure)
    clients = _clients(arms, measure)
    if clients and any(
        value is not None for one in arms.values() for value in findings.own_values(one, measure).values()
    ):
        picture = pictures.clients_picture(arms, clients, measure)
        figure("clients", findings.clients_finding(arms, clients, measure), "Each client on its own test set.", picture)
    if arms:
        spent = {
            arm: {
                "seconds": cost.get("train_seconds") or 0.0,
                "bytes": (cost.get("bytes_up") or 0.0) + (cost.get("bytes_down") or 0.0),
            }
            for arm, cost in known.costs.items()
        }
        about = "The further up and to the left, the better." if scored else "The further down and left, the better."
        about += " What global would move, the data itself, is not counted." if "global" in arms else ""
        finding = findings.cost_finding(arms, spent, measure)
        figure("cost", finding, about, pictures.cost_picture(arms, spent, measure))
    wire = _wire(known)
    if wire:
        total = (known.result.get("costs") or {}).get("total_parameters") or known.model.get("total_parameters")
        whole = 4.0 * total if total else None
        about = "As the payload goes over the wire." + (" All weights: 4 bytes each." if whole else "")
        figure("bytes", findings.wire_finding(wire, whole), about, pictures.bytes_picture(wire, whole))
    holders = data.get("clients") or []
    if len(holders) > 1 and len({name for one in holders for name in one.get("categories") or {}}) > 1:
        about = "The stronger the colour, the larger a part of the client's own rows." + pictures.partition_note(
            len(holders)
        )
        finding = findings.partition_finding(holders, data.get("heterogeneity") or {})
        figure("partition", finding, about, pictures.partition_picture(holders))
    elif len(holders) > 1:
        about = "Rows to train on; the data names no categories."
        figure("sizes", findings.sizes_finding(holders), about, pictures.sizes_picture(holders))
    if sum(bool(one.get("lengths")) for one in holders) > 1:
        about = "Tokens per row before any cut: the median, the middle half, and 10 to 90 % of each client's rows."
        finding = findings.lengths_finding(holders, data.get("heterogeneity") or {})
        figure("lengths", finding, about, pictures.lengths_picture(holders, data.get("max_length")))
    return figures


def _round_figures(known: Known, training: Sequence[str], figure: Any) -> None:
    """What was measured as the rounds went, besides the loss: scores, benchmark tasks, and each client."""
    lines = known.lines
    curves = {
        arm: [(line["round"], line["score"]) for line in lines if line["arm"] == arm and line.get("score") is not None]
        for arm in training
    }
    curves = {arm: points for arm, points in curves.items() if len(points) > 1}
    if curves:
        about = "Each client's model on its own validation rows, as in own test; the test sets are kept for the end."
        picture = pictures.share_rounds_picture("score-rounds", curves, "score on validation rows")
        figure("score-rounds", findings.value_rounds_finding(curves, "validation score"), about, picture)
    ranked = {
        arm: [(line["round"], line["preference_accuracy"]) for line in lines
              if line["arm"] == arm and line.get("preference_accuracy") is not None]
        for arm in training
    }  # fmt: skip
    ranked = {arm: points for arm, points in ranked.items() if len(points) > 1}
    if ranked:
        about = "Pairs of validation rows whose chosen answer has the higher reward; a tie counts half: 50 % is chance."
        picture = pictures.share_rounds_picture("ranked-rounds", ranked, "pairs ranked right")
        figure("ranked-rounds", findings.value_rounds_finding(ranked, "share of pairs ranked right"), about, picture)
    measured = {str(place): line["tasks"] for place, line in enumerate(lines) if line.get("tasks")}
    first = dict(reversed(tasks_of(measured)))  # each task's first metric
    for place, task in enumerate(list(reversed(first))[:_MOST_TASK_FIGURES]):
        curves = {}
        for line in lines:
            value = ((line.get("tasks") or {}).get(task) or {}).get(first[task])
            if value is not None and 0 <= value <= 1:
                curves.setdefault(line["arm"], []).append((line["round"], value))
        curves = {arm: curves[arm] for arm in ordered(curves) if len(curves[arm]) > 1}
        if curves:
            name = f"{short(task, 40)} {first[task].replace('_', ' ')}"
            picture = pictures.share_rounds_picture(f"task-{place}", curves, short(name, 40))
            figure(f"task-{place}", findings.value_rounds_finding(curves, name), "A benchmark task, by round.", picture)
    for key in ("score_per_client", "val_loss_per_client"):
        if any(line.get(key) and line["round"] > 0 for line in lines):
            about = "Every client on its own validation rows; dashed: the mean of the tenth that fares worst."
            picture = pictures.spread_picture(lines, training, key)
            figure("spread", findings.spread_finding(lines, training, key), about, picture)
            break


def _wire(known: Known) -> dict[str, tuple[float, float]]:
    """Arm -> bytes a client sends and receives in a round, of arms that use the wire."""
    wire: dict[str, tuple[float, float]] = {}
    for line in known.lines:  # of an arm that is under way: its last round
        wire[line["arm"]] = (line.get("bytes_up_per_client") or 0.0, line.get("bytes_down_per_client") or 0.0)
    for arm, cost in known.costs.items():
        wire[arm] = (cost.get("bytes_up_per_client_round") or 0.0, cost.get("bytes_down_per_client_round") or 0.0)
    return {arm: wire[arm] for arm in ordered(wire) if sum(wire[arm]) > 0}


# ----------------------------------------------------------------------------------------------------------- tables


def _tiles(known: Known) -> list[tuple[str, str, str]]:
    """Big figure, what it is, and one more word on it."""
    arms, costs, lines = known.arms, known.result.get("costs", {}), known.lines
    tiles: list[tuple[str, str, str]] = []
    lead = findings.lead_of(arms)
    if lead is not None:
        one = arms[lead]
        if one["score"] is not None:
            tiles.append((percent(one["score"]), f"{lead} score", "common test set"))
            worst = one["own_test"]["score_worst"]
            if worst is not None:
                tiles.append((percent(worst), "worst client", f"{lead}, own test set"))
        if one.get("preference_accuracy") is not None:
            tiles.append((percent(one["preference_accuracy"]), f"{lead}, pairs ranked right", "common test set"))
        if one["loss"] is not None:
            tiles.append((f"{one['loss']:.3f}", f"{lead} loss", f"nats per {pictures.loss_per([one])}"))
    wire = _wire(known)
    if wire:
        up, down = wire.get("federated", next(iter(wire.values())))
        tiles.append((byte_text(up), "up per client and round", f"{byte_text(down)} down"))
    seconds = costs.get("train_seconds") or math.fsum(line.get("seconds") or 0.0 for line in lines)
    tokens = costs.get("train_tokens") or sum(line.get("tokens") or 0 for line in lines)
    if seconds:
        tiles.append((duration(seconds), "training", f"{amount(tokens)} tokens, {amount(tokens / seconds)} per second"))
    if costs.get("trainable_parameters"):
        share = costs["trainable_parameters"] / max(costs["total_parameters"], 1)
        tiles.append(
            (
                amount(costs["trainable_parameters"]),
                "trained parameters",
                f"{100 * share:.2g} % of {amount(costs['total_parameters'])}",
            )
        )
    return [(tied(figure), what, tied(more)) for figure, what, more in tiles]


def _equal_samples(equal: Mapping[str, Any]) -> list[Table]:
    arms = equal.get("arms") or {}
    rows = [
        ([arm_cell(arm)], {**arms[arm]["result"], "round": arms[arm].get("round"), "samples": arms[arm].get("samples")})
        for arm in ordered(arms)
        if arms[arm].get("result")
    ]
    extra = [
        (Column("round"), lambda one: cell(one["round"], lambda x: f"{x:,.0f}")),
        (Column("samples", "that a model has seen"), lambda one: count_cell(one["samples"])),
    ]
    return [quality_table("After the same number of samples", _BY_ARM, rows, extra)] if rows else []


def _heterogeneity_tables(data: Mapping[str, Any]) -> list[Table]:
    known = {name: row for name, row in (data.get("heterogeneity") or {}).items() if isinstance(row, Mapping)}
    columns = {
        "js_mean": "Jensen–Shannon, mean",
        "js_max": "largest",
        "js_even": "of an even deal",
        "js_pairs": "between clients",
        "tv_mean": "total variation, mean",
        "tv_max": "largest ",
        "tv_even": "of an even deal ",
    }
    columns = {key: name for key, name in columns.items() if any(row.get(key) is not None for row in known.values())}
    rows = [
        [text_cell(f"rows by {name}"), *(cell(row.get(key), lambda x: f"{x:.3f}") for key in columns)]
        for name, row in known.items()
        if any(row.get(key) is not None for key in columns)
    ]
    note = "Between each client and the pool of all: 0 is alike, 1 is nothing in common."
    if any(row.get("js_even") is not None for row in known.values()):
        note += " Small clients are unlike the pool by luck alone: an even deal of the same sizes says by how much."
    heads = [Column("distribution", text=True), *map(Column, columns.values())]
    return [Table("heterogeneity", heads, rows, note)] if rows else []


def _client_tables(known: Known, clients: Sequence[str], measure: str) -> list[Table]:
    """A row per client: its size, and its score and loss by arm. Of very many, those that fare worst and best."""
    more = len(clients) - MOST_ROWS
    kept = clients if more <= 0 else [*clients[: MOST_ROWS // 2], *clients[len(clients) - MOST_ROWS // 2 :]]
    sizes = {str(one.get("id")): one.get("train") for one in known.data.get("clients") or []}
    columns = [Column("client", text=True)]
    per_arm: list[tuple[Mapping[str, float | None], bool]] = []
    if any(client in sizes for client in kept):
        columns.append(Column("rows", "to train on"))
    for kind in ("score", "loss"):
        for arm, one in known.arms.items():
            values = findings.own_values(one, kind)
            if any(values.get(client) is not None for client in kept):
                columns.append(
                    Column(arm if kind == measure else f"{arm}, {kind}", f"{kind} on its own test set", arm=arm)
                )
                per_arm.append((values, kind == "score"))
    if not per_arm:
        return []
    rows = []
    for client in kept:
        cells: list[Cell] = []
        shown = [values.get(client) for values, shares in per_arm if shares]
        best = max((value for value in shown if value is not None), default=None)
        for values, shares in per_arm:
            value = values.get(client)
            shown_as = share_cell(value) if shares else loss_cell(value)
            cells.append(shown_as._replace(strong=shares and value is not None and value == best and value > 0))
        size = [cell(sizes.get(client), lambda x: f"{x:,.0f}")] if columns[1].name == "rows" else []
        rows.append([text_cell(client), *size, *cells])
    note = f"{measure.capitalize()} of each client on its own test set."
    if more > 0:
        half = MOST_ROWS // 2
        note += f" The {half} that fare best and the {half} that fare worst; {more:,} more are in result.json."
    return [Table("Clients", columns, rows, note)]


_COSTS: tuple[tuple[str, str, Any], ...] = (
    ("bytes_up_per_client_round", "sent per client and round", lambda x: f"{byte_text(x)} ({x:,.0f} bytes)"),
    ("bytes_down_per_client_round", "received per client and round", lambda x: f"{byte_text(x)} ({x:,.0f} bytes)"),
    ("train_tokens", "tokens trained on", lambda x: f"{x:,.0f}"),
    ("train_seconds", "time spent training", duration),
    ("communication_seconds", "time making and reading messages", duration),
    ("evaluate_seconds", "time evaluating", duration),
    ("prepare_seconds", "time before the first arm", duration),
    ("tokens_per_second", "tokens per second", lambda x: f"{x:,.0f}"),
    ("flops", "computation of training", flops_text),
    ("peak_memory_bytes", "peak memory", byte_text),
    ("trainable_parameters", "trained parameters", lambda x: f"{x:,.0f}"),
    ("total_parameters", "parameters in all", lambda x: f"{x:,.0f}"),
)


def _cost_rows(costs: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, text(costs[key])) for key, name, text in _COSTS if costs.get(key) is not None]


def _failure_tables(lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Clients that failed in some round, the most frequent first, with the last reason."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for line in lines:
        for client, reason in (line.get("failed") or {}).items():
            count, _ = found.get((line["arm"], client), (0, ""))
            found[line["arm"], client] = (count + 1, str(reason))
    rows = [
        [text_cell(client), arm_cell(arm), cell(count, lambda x: f"{x:,.0f}"), text_cell(reason, 300)]
        for (arm, client), (count, reason) in sorted(found.items(), key=lambda one: -one[1][0])[:MOST_ROWS]
    ]
    columns = [
        Column("client", text=True),
        Column("arm", text=True),
        Column("rounds"),
        Column("last reason", text=True),
    ]
    return [Table("Clients that failed", columns, rows)] if rows else []
