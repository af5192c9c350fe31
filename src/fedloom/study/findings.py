"""What a report says in words: the sentence above each picture, and the one above the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.study.draw import short
from fedloom.study.pictures import worst_tenth
from fedloom.study.progress import byte_text, duration

__all__ = [
    "clients_finding",
    "cost_finding",
    "headline",
    "lead_of",
    "lengths_finding",
    "order_finding",
    "own_values",
    "partition_finding",
    "percent",
    "points",
    "rounds_finding",
    "sizes_finding",
    "spread_finding",
    "tied",
    "value_rounds_finding",
    "wire_finding",
]


def tied(text: str) -> str:
    """Numbers stay on one line with their units."""
    return re.sub(r"(\d) (?=(%|B|kB|MB|GB|points?|s|min|h|nats)\b|%)", "\\1\u00a0", text)


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    """The difference of two scores in words: 73 points, 0.4 points, 1 point."""
    size = abs(100 * value)
    text = f"{size:.0f}" if size >= 0.95 else f"{size:.1f}"
    return f"{text} point" + ("" if text == "1" else "s")


def lead_of(arms: Mapping[str, Any]) -> str | None:
    """The arm that a page speaks of first."""
    return next((arm for arm in ("federated", "global", "local", "base", *arms) if arm in arms), None)


def _versus(value: float, other: float, name: str) -> str:
    if abs(value - other) < 0.0005:
        return f"level with {name}"
    return f"{points(value - other)} {'above' if value > other else 'below'} {name}"


def _score_finding(arms: Mapping[str, Any]) -> str:
    known = {arm: one["score"] for arm, one in arms.items() if one["score"] is not None}
    lead = lead_of(known)
    assert lead is not None
    against: list[str] = []
    for other in ("local", "base"):
        if other in known and other != lead and not against:
            against.append(other)
    if lead == "federated" and "global" in known:
        against.append("global")
    parts = " and ".join(_versus(known[lead], known[arm], arm) for arm in against)
    return f"{lead.capitalize()} reaches {percent(known[lead])}" + (f", {parts}" if parts else "")


def order_finding(arms: Mapping[str, Any], measure: str) -> str:
    """The arms from the best to the worst."""
    shares = measure == "score"
    known = sorted(((one[measure], arm) for arm, one in arms.items() if one[measure] is not None), reverse=shares)
    text = ", ".join(f"{arm} {percent(value) if shares else f'{value:.3f}'}" for value, arm in known)
    first = "Highest" if shares else "Lowest"
    return f"{first} is {text}" if len(known) > 1 else f"{measure.capitalize()} of {text}"


def _loss_finding(arms: Mapping[str, Any]) -> str:
    known = {arm: one["loss"] for arm, one in arms.items() if one["loss"] is not None}
    lead = lead_of(known)
    assert lead is not None
    parts = [f"{arm} {known[arm]:.3f}" for arm in known if arm != lead]
    return f"{lead.capitalize()} ends at a loss of {known[lead]:.3f}" + (f" ({', '.join(parts)})" if parts else "")


def rounds_finding(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """How the loss of the most interesting of `arms` goes."""
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


def value_rounds_finding(data: Mapping[str, Sequence[Sequence[float]]], name: str) -> str:
    """How a share goes in the most interesting of the arms, given as (round, value) of each."""
    arm = lead_of(data)
    assert arm is not None
    (first, start), (last, end) = data[arm][0], data[arm][-1]
    best_round, best = max(data[arm], key=lambda one: one[1])
    way = "rises" if end > start + 0.0005 else "falls" if end < start - 0.0005 else "stays"
    figures = f"at {percent(end)}" if way == "stays" else f"from {percent(start)} to {percent(end)}"
    turn = f"; highest in round {best_round:.0f} ({percent(best)})" if best > end + 0.005 else ""
    return f"{arm.capitalize()} {name} {way} {figures} between rounds {first:.0f} and {last:.0f}{turn}"


def own_values(one: Mapping[str, Any], measure: str) -> Mapping[str, float | None]:
    """Each client's score or loss on its own test set."""
    return one["own_test"].get(f"{measure}_per_client") or {}


def clients_finding(arms: Mapping[str, Any], clients: Sequence[str], measure: str) -> str:
    """For how many clients the federation is worth it, and for whom it is worth least."""
    shares = measure == "score"
    sign = 1 if shares else -1
    tables = {arm: own_values(one, measure) for arm, one in arms.items()}
    for better, other, phrase in (
        ("federated", "local", "than training alone"),
        ("federated", "base", "than the base"),
        ("local", "base", "than the base"),
    ):
        first, second = tables.get(better, {}), tables.get(other, {})
        gains: dict[str, float] = {}
        for client in clients:
            one, two = first.get(client), second.get(client)
            if one is not None and two is not None:
                gains[client] = sign * (one - two)
        if gains:
            won = sum(gain > 0 for gain in gains.values())
            who = "Every client does" if won == len(gains) else f"{won} of {len(gains)} clients do"
            if won == 0:
                who = "No client does"
            least = min(gains, key=lambda client: gains[client])
            size = points(gains[least]) if shares else f"{abs(gains[least]):.3f} nats"
            change = f"{'+' if gains[least] >= 0 else '−'}{size}"
            kind = "smallest gain" if gains[least] > 0 else "no change" if gains[least] == 0 else "largest loss"
            where = f"{kind} {change}" if gains[least] else kind
            tail = f"; {where} ({short(least)})" if len(gains) > 1 else f": {change}"
            with_ = {"federated": "with the federation ", "local": "after local training "}[better]
            return f"{who} better {with_}{phrase}{tail}"
    arm = lead_of({name: table for name, table in tables.items() if name != "base"}) or next(iter(tables))

    def text(value: float) -> str:
        return percent(value) if shares else f"a loss of {value:.3f}"

    known = [value for value in tables[arm].values() if value is not None]
    if not known:
        return f"{measure.capitalize()} of the clients"
    if len(known) == 1:
        return f"{arm.capitalize()} gives the client {text(known[0])}"
    if text(min(known)) == text(max(known)):
        return f"{arm.capitalize()} gives every client {text(known[0])}"
    low, high = text(min(known)), percent(max(known)) if shares else f"{max(known):.3f}"
    return f"{arm.capitalize()} gives the clients from {low} to {high}"


def spread_finding(lines: Sequence[Mapping[str, Any]], arms: Sequence[str], key: str) -> str:
    """How far the worst tenth of the clients is from all, where the most interesting arm was measured last."""
    shares = key == "score_per_client"
    for arm in dict.fromkeys(("federated", *arms)):
        tables = [(line["round"], line[key]) for line in lines if line["arm"] == arm and line.get(key)]
        if tables:
            last, table = tables[-1]
            known = [value for value in table.values() if value is not None]
            if not known:
                continue
            mean, worst = sum(known) / len(known), worst_tenth(known, lowest=shares)
            if shares:
                apart = "level with the mean" if mean - worst < 0.0005 else f"{points(mean - worst)} below the mean"
                return f"The worst tenth of the clients is {apart} in {arm} round {last}"
            apart = "level with the mean" if worst - mean < 0.0005 else f"{worst - mean:.2f} nats above the mean"
            return f"The worst tenth of the clients is {apart} in {arm} round {last}"
    return "Clients by round"


def cost_finding(arms: Mapping[str, Any], spent: Mapping[str, Mapping[str, float]], measure: str) -> str:
    """What the most interesting arm reached, and for what."""
    known = {arm: one[measure] for arm, one in arms.items() if one[measure] is not None and arm in spent}
    arm = lead_of(known)
    if arm is None:
        return "Quality and cost"
    got = percent(known[arm]) if measure == "score" else f"a loss of {known[arm]:.3f}"
    price = [duration(spent[arm]["seconds"]) + " of training"] if spent[arm]["seconds"] else []
    price += [byte_text(spent[arm]["bytes"]) + " sent and received"] if spent[arm]["bytes"] else []
    return f"{arm.capitalize()}: {got}" + (f" for {' and '.join(price)}" if price else ", at no cost")


def wire_finding(wire: Mapping[str, tuple[float, float]], whole: float | None) -> str:
    """What a client sends and receives, and how much less it is than all weights."""
    arm = "federated" if "federated" in wire else next(iter(wire))
    up, down = wire[arm]
    text = f"A client sends {byte_text(up)} and receives {byte_text(down)} a round"
    if whole and up and whole / up >= 1.5:
        times = f"{whole / up:.0f}" if whole / up >= 10 else f"{whole / up:.1f}"
        text += f", {times} times less than all weights"
    return text


def partition_finding(clients: Sequence[Mapping[str, Any]], heterogeneity: Mapping[str, Any]) -> str:
    """How unlike each other the clients are, by what they hold."""
    held = [sum(count > 0 for count in (client.get("categories") or {}).values()) for client in clients]
    held = [count for count in held if count]
    there = len({name for client in clients for name, count in (client.get("categories") or {}).items() if count})
    if not held:
        return "Who holds what"
    if min(held) < max(held):
        text = f"Clients hold {min(held)} to {max(held)} of {there} categories"
    else:
        text = f"Every client holds {held[0]} of {there} categories"
    return text + _apart(heterogeneity, "category")


def _apart(heterogeneity: Mapping[str, Any], name: str) -> str:
    """The mean divergence from the pool, and what an even deal would have."""
    found = heterogeneity.get(name) or {}
    if found.get("js_mean") is None:
        return ""
    even = f" (an even deal: {found['js_even']:.2f})" if found.get("js_even") is not None else ""
    return f"; their divergence from the pool is {found['js_mean']:.2f} of 1{even}"


def lengths_finding(clients: Sequence[Mapping[str, Any]], heterogeneity: Mapping[str, Any]) -> str:
    """How unlike each other the clients' rows are in length."""
    medians = sorted(int(one["lengths"]["p50"]) for one in clients if one.get("lengths"))
    if medians[0] == medians[-1]:
        return f"Rows have a median of {medians[0]:,} tokens in every client" + _apart(heterogeneity, "length")
    return f"Clients' median rows have {medians[0]:,} to {medians[-1]:,} tokens" + _apart(heterogeneity, "length")


def sizes_finding(clients: Sequence[Mapping[str, Any]]) -> str:
    """How unlike in size the clients are."""
    sizes = sorted(int(client["train"]) for client in clients)
    if sizes[0] == sizes[-1]:
        return f"Every client trains on {sizes[0]:,} rows"
    return f"Clients train on {sizes[0]:,} to {sizes[-1]:,} rows, half of them on {sizes[len(sizes) // 2]:,} or fewer"


def headline(arms: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], training: Sequence[str]) -> str:
    """What a run found, in a sentence; `training` are the arms that have trained."""
    if set(arms) <= {"base"} and training:  # what comes first in a run that goes on is no news
        return rounds_finding(lines, training) + "."
    if any(one["score"] is not None for one in arms.values()):
        return _score_finding(arms) + "."
    if any(one["loss"] is not None for one in arms.values()):
        return _loss_finding(arms) + "."
    if training:
        return rounds_finding(lines, training) + "."
    return "No round has ended yet."
