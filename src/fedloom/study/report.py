"""report.html of a run: one file that opens from disk or mail, in light and dark, and asks for nothing else.

It is made from the run folder alone, so it can be made at any time: while the run goes on it shows what is known.
Whatever comes from data or recipes is escaped, and the page forbids itself scripts and requests.
"""

from __future__ import annotations

import datetime
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import UserError
from fedloom.study import pictures
from fedloom.study.folder import RunFolder, is_running, write_atomic
from fedloom.study.progress import amount, byte_text, duration, round_text
from fedloom.study.result import ARMS, skipped_leaves

__all__ = ["write_report"]

_MAX_ROWS = 200  # of a table; the rest is in result.json
_ARM_MEANING = {
    "base": "the model as it came, without any training",
    "local": "each client alone, on its own data",
    "federated": "all clients together, data stays where it is",
    "global": "one place that holds everybody's data",
}


def write_report(run: Path, dest: Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run: the run folder.
        dest: a file, or a folder that gets report.html; `run`/report.html by default.

    Returns:
        The file written. It appears whole: an older one stays until the new one is complete.

    Raises:
        UserError: there is no run, one of its files is damaged, or `dest` is in no folder.
        RunError: the disk is full.
    """
    folder = RunFolder.look(run)
    target = folder.report if dest is None else dest / "report.html" if dest.is_dir() else dest
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}", code="report.dest")
    page = _page(folder)
    write_atomic(target, page)
    return target


def _page(folder: RunFolder) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    return template.render(_content(folder))


# ----------------------------------------------------------------------------------------------------- what is known


def _content(folder: RunFolder) -> dict[str, Any]:
    from markupsafe import Markup

    result = folder.read_result() or {}
    facts = folder.read_facts()
    lines = folder.read_rounds()
    arms, costs_per_arm = _arms(folder, result)
    costs = result.get("costs", {})
    scored = any(one["score"] is not None for one in arms.values())
    clients = _clients(arms)

    figures: list[dict[str, Any]] = []

    def figure(finding: str, about: str, svg: str) -> None:
        figures.append({"finding": _tied(finding), "about": about, "svg": Markup(svg)})

    if scored:
        figure(
            _order_finding(arms, "score"),
            "Mean score on the test sets of all clients together, and each client on its own.",
            pictures.score_picture(arms, "score"),
        )
    elif any(one["loss"] is not None for one in arms.values()):
        figure(
            _order_finding(arms, "loss"),
            "Mean loss on the test sets of all clients together; less is better.",
            pictures.score_picture(arms, "loss"),
        )
    training = _trained(lines)
    if training:
        figure(
            _rounds_finding(lines, training),
            "Mean over answer tokens; validation is on rows that no client trains on.",
            pictures.loss_picture(lines, training),
        )
    if scored and any(one["own_test"]["score_per_client"] for one in arms.values()):
        figure(
            _clients_finding(arms, clients),
            "Each client on its own test set.",
            pictures.clients_picture(arms, clients),
        )
    wire = _wire(costs_per_arm, lines)
    if wire:
        total = costs.get("total_parameters") or facts.get("model", {}).get("total_parameters")
        whole = 4.0 * total if total else None
        about = "As the payload goes over the wire." + (" All weights: 4 bytes each." if whole else "")
        figure(_wire_finding(wire, whole), about, pictures.bytes_picture(wire, whole))

    model = result.get("model") or facts.get("model") or {}
    data = result.get("data") or facts.get("data") or {}
    return {
        "name": folder.path.resolve().name,
        "status": _status(folder, result, lines),
        "finding": _tied(_headline(arms, lines, scored)),
        "written": datetime.datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        "tiles": _tiles(arms, costs, lines, wire),
        "figures": figures,
        "arms": _arm_rows(arms, costs_per_arm),
        "scored": scored,
        "clients": _client_rows(arms, clients),
        "clients_left_out": max(0, len(clients) - _MAX_ROWS),
        "arm_names": list(arms),
        "costs": _cost_rows(costs),
        "failures": _failures(lines),
        "skipped": [(name, _text(why)) for name, why in skipped_leaves(result)],
        "data": _blocks(data),
        "model": _blocks(model),
        "recipe": folder.recipe.read_text(encoding="utf-8"),
        "versions": list((result.get("versions") or facts.get("versions") or {}).items()),
        "commands": _commands(folder.path, result),
        "version": result.get("fedloom_version"),
        "seed": result.get("seed"),
        "last_rounds": [f"{line['arm']}: {round_text(line)}" for line in lines[-5:]] if not result else [],
    }


def _ordered(arms: Mapping[str, Any]) -> list[str]:
    return [arm for arm in ARMS if arm in arms] + [arm for arm in arms if arm not in ARMS]


def _trained(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arms with a loss after some round. The base has none, only a measurement before round 1 as they all do."""
    known = [line for line in lines if line.get("train_loss") is not None or line.get("val_loss") is not None]
    return _ordered({line["arm"]: None for line in known if line["round"] > 0})


def _arms(folder: RunFolder, result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and costs of the arms that are done; of a run that goes on, from its stages."""
    if result:
        return {arm: result["arms"][arm] for arm in _ordered(result["arms"])}, dict(result.get("costs_per_arm", {}))
    stages = folder.read_stages()
    arms = {arm: stages[arm]["result"] for arm in _ordered(stages) if "result" in stages[arm]}
    return arms, {arm: stage["costs"] for arm, stage in stages.items() if "costs" in stage}


def _clients(arms: Mapping[str, Any]) -> list[str]:
    """All clients with a score of their own, the one that does best in the most interesting arm first."""
    tables = {arm: one["own_test"]["score_per_client"] for arm, one in arms.items()}
    seen = list(dict.fromkeys(client for table in tables.values() for client in table))
    leads = [tables[arm] for arm in ("federated", "global", "local", "base") if tables.get(arm)]
    lead = leads[0] if leads else {}
    return sorted(seen, key=lambda client: -(lead.get(client) or 0.0))


def _status(folder: RunFolder, result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if result.get("status") == "done":
        return {"kind": "done", "text": "finished"}
    where = f", {lines[-1]['arm']} round {lines[-1]['round']}/{lines[-1].get('rounds', '?')}" if lines else ""
    if is_running(folder.path):
        return {"kind": "running", "text": f"running{where}"}
    return {"kind": "stopped", "text": f"stopped{where}"}


def _wire(costs: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Arm -> bytes a client sends and receives in a round, of arms that use the wire."""
    wire: dict[str, tuple[float, float]] = {}
    for line in lines:  # of an arm that is under way: its last round
        wire[line["arm"]] = (line.get("bytes_up_per_client") or 0.0, line.get("bytes_down_per_client") or 0.0)
    for arm, cost in costs.items():
        wire[arm] = (cost.get("bytes_up_per_client_round") or 0.0, cost.get("bytes_down_per_client_round") or 0.0)
    return {arm: wire[arm] for arm in _ordered(wire) if sum(wire[arm]) > 0}


# ---------------------------------------------------------------------------------------------------------- findings


def _tied(text: str) -> str:
    """Numbers stay on one line with their units."""
    return re.sub(r"(\d) (?=(%|B|kB|MB|GB|points?|s|min|h)\b|%)", "\\1\u00a0", text)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _points(value: float) -> str:
    """The difference of two scores in words: 73 points, 0.4 points, 1 point."""
    size = abs(100 * value)
    text = f"{size:.0f}" if size >= 0.95 else f"{size:.1f}"
    return f"{text} point" + ("" if text == "1" else "s")


def _versus(value: float, other: float, name: str, more: str = "above", less: str = "below") -> str:
    if abs(value - other) < 0.0005:
        return f"level with {name}"
    return f"{_points(value - other)} {more if value > other else less} {name}"


def _score_finding(arms: Mapping[str, Any]) -> str:
    known = {arm: one["score"] for arm, one in arms.items() if one["score"] is not None}
    lead = next(arm for arm in ("federated", "global", "local", "base", *known) if arm in known)
    against: list[str] = []
    for other in ("local", "base"):
        if other in known and other != lead and not against:
            against.append(other)
    if lead == "federated" and "global" in known:
        against.append("global")
    parts = " and ".join(_versus(known[lead], known[arm], arm) for arm in against)
    return f"{lead.capitalize()} reaches {_percent(known[lead])}" + (f", {parts}" if parts else "")


def _order_finding(arms: Mapping[str, Any], measure: str) -> str:
    """The arms from the best to the worst."""
    shares = measure == "score"
    known = sorted(((one[measure], arm) for arm, one in arms.items() if one[measure] is not None), reverse=shares)
    text = ", ".join(f"{arm} {_percent(value) if shares else f'{value:.3f}'}" for value, arm in known)
    first = "Highest" if shares else "Lowest"
    return f"{first} is {text}" if len(known) > 1 else f"{measure.capitalize()} of {text}"


def _loss_finding(arms: Mapping[str, Any]) -> str:
    known = {arm: one["loss"] for arm, one in arms.items() if one["loss"] is not None}
    lead = next(arm for arm in ("federated", "global", "local", "base", *known) if arm in known)
    parts = [f"{arm} {known[arm]:.3f}" for arm in known if arm != lead]
    return f"{lead.capitalize()} ends at a loss of {known[lead]:.3f}" + (f" ({', '.join(parts)})" if parts else "")


def _rounds_finding(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    arm = "federated" if "federated" in arms else arms[0]
    for key, name in (("val_loss", "validation"), ("train_loss", "training")):
        known = [(line["round"], line[key]) for line in lines if line["arm"] == arm and line.get(key) is not None]
        if len(known) >= 2:
            (first, start), (last, end) = known[0], known[-1]
            way = "falls" if end < start - 5e-4 else "rises" if end > start + 5e-4 else "stays"
            best_round, best = min(known, key=lambda one: one[1])
            turn = f"; lowest in round {best_round} ({best:.2f})" if end > best + 0.05 * abs(best) else ""
            figures = f"at {end:.2f}" if way == "stays" else f"from {start:.2f} to {end:.2f}"
            return f"{arm.capitalize()} {name} loss {way} {figures} between rounds {first} and {last}{turn}"
        if known:
            return f"{arm.capitalize()} {name} loss is {known[0][1]:.2f} in round {known[0][0]}"
    return "Loss by round"


def _clients_finding(arms: Mapping[str, Any], clients: Sequence[str]) -> str:
    tables = {arm: one["own_test"]["score_per_client"] for arm, one in arms.items()}
    for better, other, phrase in (
        ("federated", "local", "than training alone"),
        ("federated", "base", "than the base"),
        ("local", "base", "than the base"),
    ):
        first, second = tables.get(better, {}), tables.get(other, {})
        gains = {
            client: first[client] - second[client]
            for client in clients
            if first.get(client) is not None and second.get(client) is not None
        }
        if gains:
            won = sum(gain > 0 for gain in gains.values())
            who = "Every client does" if won == len(gains) else f"{won} of {len(gains)} clients do"
            if won == 0:
                who = "No client does"
            least = min(gains, key=lambda client: gains[client])
            change = f"{'+' if gains[least] >= 0 else '−'}{_points(gains[least])}"
            kind = "smallest gain" if gains[least] > 0 else "no change" if gains[least] == 0 else "largest loss"
            where = f"{kind} {change}" if gains[least] else kind
            tail = f"; {where} ({pictures.short(least)})" if len(gains) > 1 else f": {change}"
            with_ = {"federated": "with the federation ", "local": "after local training "}[better]
            return f"{who} better {with_}{phrase}{tail}"
    arm = next(arm for arm in ("federated", "global", "local", *tables) if arm in tables)
    known = [value for value in tables[arm].values() if value is not None]
    if not known:
        return "Scores of the clients"
    if len(known) == 1:
        return f"{arm.capitalize()} gives the client {_percent(known[0])}"
    if _percent(min(known)) == _percent(max(known)):
        return f"{arm.capitalize()} gives every client {_percent(known[0])}"
    return f"{arm.capitalize()} gives the clients from {_percent(min(known))} to {_percent(max(known))}"


def _wire_finding(wire: Mapping[str, tuple[float, float]], whole: float | None) -> str:
    arm = "federated" if "federated" in wire else next(iter(wire))
    up, down = wire[arm]
    text = f"A client sends {byte_text(up)} and receives {byte_text(down)} a round"
    if whole and up and whole / up >= 1.5:
        text += (
            f", {whole / up:.0f} times less than all weights"
            if whole / up >= 10
            else f", {whole / up:.1f} times less than all weights"
        )
    return text


def _headline(arms: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], scored: bool) -> str:
    if set(arms) <= {"base"} and _trained(lines):  # what comes first in a run that goes on is no news
        return _rounds_finding(lines, _trained(lines)) + "."
    if scored:
        return _score_finding(arms) + "."
    if any(one["loss"] is not None for one in arms.values()):
        return _loss_finding(arms) + "."
    if _trained(lines):
        return _rounds_finding(lines, _trained(lines)) + "."
    return "No round has ended yet."


# ------------------------------------------------------------------------------------------------------------ tables


def _tiles(
    arms: Mapping[str, Any],
    costs: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    wire: Mapping[str, tuple[float, float]],
) -> list[tuple[str, str, str]]:
    """Big figure, what it is, and one more word on it."""
    tiles: list[tuple[str, str, str]] = []
    lead = next((arm for arm in ("federated", "global", "local", "base") if arm in arms), None)
    if lead is not None:
        one = arms[lead]
        if one["score"] is not None:
            tiles.append((_percent(one["score"]), f"{lead} score", "common test set"))
            worst = one["own_test"]["score_worst"]
            if worst is not None:
                tiles.append((_percent(worst), "worst client", f"{lead}, own test set"))
        if one["loss"] is not None:
            tiles.append((f"{one['loss']:.3f}", f"{lead} loss", "nats per answer token"))
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
    return tiles


def _number(value: float | None, text: Any) -> str:
    return "–" if value is None else text(value)


def _share(value: float | None) -> str:
    return _number(value, lambda x: f"{100 * x:.1f} %")


def _arm_rows(arms: Mapping[str, Any], costs: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for arm, one in arms.items():
        own, cost = one["own_test"], costs.get(arm, {})
        rows.append(
            {
                "arm": arm,
                "meaning": _ARM_MEANING.get(arm, ""),
                "score": _share(one["score"]),
                "own": _share(own["score"]),
                "worst": _share(own["score_worst"]),
                "std": _number(own["score_std"], lambda x: f"{100 * x:.1f}"),
                "loss": _number(one["loss"], lambda x: f"{x:.3f}"),
                "own_loss": _number(own["loss"], lambda x: f"{x:.3f}"),
                "up": byte_text(cost["bytes_up_per_client_round"]) if cost.get("bytes_up_per_client_round") else "–",
                "down": byte_text(cost["bytes_down_per_client_round"])
                if cost.get("bytes_down_per_client_round")
                else "–",
                "seconds": duration(cost["train_seconds"]) if cost.get("train_seconds") else "–",
                "speed": amount(cost["tokens_per_second"]) if cost.get("tokens_per_second") else "–",
            }
        )
    return rows


def _client_rows(arms: Mapping[str, Any], clients: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for client in clients[:_MAX_ROWS]:
        values = [one["own_test"]["score_per_client"].get(client) for one in arms.values()]
        best = max((value for value in values if value is not None), default=None)
        cells = [{"text": _share(value), "best": value is not None and value == best and best > 0} for value in values]
        rows.append({"client": pictures.short(client, 60), "cells": cells})
    return rows


_COSTS = (
    ("bytes_up_per_client_round", "sent per client and round", lambda x: f"{byte_text(x)} ({x:,.0f} bytes)"),
    ("bytes_down_per_client_round", "received per client and round", lambda x: f"{byte_text(x)} ({x:,.0f} bytes)"),
    ("train_tokens", "tokens trained on", lambda x: f"{x:,.0f}"),
    ("train_seconds", "time spent training", duration),
    ("tokens_per_second", "tokens per second", lambda x: f"{x:,.0f}"),
    ("peak_memory_bytes", "peak memory", byte_text),
    ("trainable_parameters", "trained parameters", lambda x: f"{x:,.0f}"),
    ("total_parameters", "parameters in all", lambda x: f"{x:,.0f}"),
)


def _cost_rows(costs: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, text(costs[key])) for key, name, text in _COSTS if costs.get(key) is not None]


def _failures(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int, str]]:
    """(arm, client, how often, the last reason) of clients that failed in some round, the most frequent first."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for line in lines:
        for client, reason in (line.get("failed") or {}).items():
            count, _ = found.get((line["arm"], client), (0, ""))
            found[line["arm"], client] = (count + 1, str(reason))
    rows = [(arm, pictures.short(client, 60), count, reason) for (arm, client), (count, reason) in found.items()]
    return sorted(rows, key=lambda row: -row[2])[:_MAX_ROWS]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ("\n" if any(isinstance(item, str) and " " in item for item in value) else ", ").join(
            _text(item) for item in value
        ) or "none"
    return str(value)


def _blocks(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Any JSON object as tables: one of its plain values, and one for each table inside it."""
    plain: list[tuple[str, str]] = []
    tables: list[dict[str, Any]] = []
    for key, item in value.items():
        name = str(key).replace("_", " ")
        rows = list(item.items()) if isinstance(item, Mapping) else []
        if isinstance(item, list) and item and all(isinstance(row, Mapping) for row in item):
            rows = [(str(row.get("id", number)), row) for number, row in enumerate(item, start=1)]
        if rows and all(isinstance(row, Mapping) for _, row in rows):
            seen = dict.fromkeys(column for _, row in rows for column in row if column != "id")
            columns = [column for column in seen if any(row.get(column) not in (None, {}, [], "") for _, row in rows)]
            tables.append(
                {
                    "name": name,
                    "columns": [str(column).replace("_", " ") for column in columns],
                    "rows": [
                        (pictures.short(str(id), 60), [_text(row.get(column)) for column in columns])
                        for id, row in rows[:_MAX_ROWS]
                    ],
                    "left_out": max(0, len(rows) - _MAX_ROWS),
                }
            )
        else:
            plain.append((name, _text(item)))
    return ([{"name": "", "columns": [], "rows": plain, "left_out": 0}] if plain else []) + tables


def _commands(run: Path, result: Mapping[str, Any]) -> list[str]:
    commands = [f"pip install fedloom=={result['fedloom_version']}"] if result.get("fedloom_version") else []
    recipe = shlex.quote(str(run / "recipe.yaml"))
    commands.append(f"fedloom run {recipe} output_dir={shlex.quote(str(run) + '-again')}")
    return commands
