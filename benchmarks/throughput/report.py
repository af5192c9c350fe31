"""RESULTS.md: a table for every setting, and whether the targets are met, worked out from the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.throughput.sides import SIDES

Run = dict[str, Any]
LOSS_WITHIN = 0.01
MEMORY_AT_MOST = 1.1
# model -> (side to beat, how many times)
SPEED = {"10M": (("a", 3.0), ("d", 4.0)), "100M": (("a", 2.5), ("d", 2.5)), "tiny": ()}


def report(results: dict[str, Any]) -> str:
    runs = [run for run in results["runs"] if "failed" not in run]
    lines = ["# Throughput: the same federated work by a bare loop, by fedloom and by other frameworks", ""]
    lines += [f"{key}: {value}  " for key, value in results["machine"].items()]
    if not has_bfloat16(results["machine"]["processor"]):
        lines += ["", "This processor has no bfloat16, so every side computes in float32, fedloom's defaults too."]
    repetitions = {run["repetition"] for run in runs}
    loads = [run["load_before"] for run in runs]
    lines += [
        "",
        f"{len(runs)} runs in up to {len(repetitions)} repetitions, medians; ratios are taken inside a repetition. "
        + (f"Load of the machine before a run: {min(loads):.1f} to {max(loads):.1f}." if loads else ""),
        "",
        "Whole: CPU seconds (user and system) of the side's whole process tree, imports and all. Training: the steps",
        "alone. Tokens are those of the text, padding left out. Memory is the most that the process tree held at once.",
        "",
    ]
    if note := results.get("note"):
        lines += [note, ""]
    lines += targets(runs)
    for setting in settings_of(runs):
        lines += setting_table([run for run in runs if run["setting"] == setting])
    failed = [run for run in results["runs"] if "failed" in run]
    lines += [f"({key}) is left out, it could not be installed: `{why}`" for key, why in results["left_out"].items()]
    lines += [f"({run['side']}) failed at {run['setting']}: `{run['failed'][-300:]}`" for run in failed]
    return "\n".join(lines).rstrip() + "\n"


def has_bfloat16(processor: str) -> bool:
    return "bf16" in processor


def settings_of(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run["setting"] for run in sorted(runs, key=order)))


def order(run: Run) -> tuple[int, int, int]:
    return len(run["model"]), run["clients"], -run["batch"]


def whole_rate(run: Run) -> float:
    """Tokens without padding per CPU-second of the whole process tree."""
    return float(run["tokens"] / run["cpu_seconds"])


def training_rate(run: Run) -> float:
    return float(run["tokens"] / run["train_cpu_seconds"])


def ratios(runs: list[Run], side: str, to: str, of: Callable[[Run], float]) -> list[float]:
    """side / to inside every repetition of one setting in which both have run."""
    by = {(run["side"], run["repetition"]): of(run) for run in runs}
    repetitions = sorted({repetition for _, repetition in by})
    return [by[side, number] / by[to, number] for number in repetitions if {(side, number), (to, number)} <= by.keys()]


def shown(values: list[float], form: str = ".2f") -> str:
    return format(statistics.median(values), form) if values else "–"


def setting_table(runs: list[Run]) -> list[str]:
    first = runs[0]
    rounds = f"{first['rounds']} round{'s' if first['rounds'] > 1 else ''} of {first['steps']} steps"
    lines = [
        f"## {first['model']} model, {first['clients']} clients, batch {first['batch']} ({rounds})",
        "",
        "| | whole: tokens per CPU-s | x (a) | x (d) | training: tokens per CPU-s | x (a) | CPU s, whole "
        "| of it outside training | peak MiB | x (a) | held-out loss | vs (a) | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in SIDES:
        own = [run for run in runs if run["side"] == key]
        if own:
            lines.append(row(key, own, runs))
    return [*lines, ""]


def row(key: str, own: list[Run], runs: list[Run]) -> str:
    def to(other: str, of: Callable[[Run], float]) -> str:
        return shown(ratios(runs, key, other, of))

    def middle(of: Callable[[Run], float], form: str) -> str:
        return shown([of(run) for run in own], form)

    loss = [value - 1 for value in ratios(runs, key, "a", lambda run: run["held_out_loss"])]
    cells = [
        f"({key}) {SIDES[key].label}{detail(own[-1])}",
        middle(whole_rate, ",.0f"),
        to("a", whole_rate),
        to("d", whole_rate),
        middle(training_rate, ",.0f"),
        to("a", training_rate),
        middle(lambda run: run["cpu_seconds"], ".1f"),
        middle(lambda run: run["cpu_seconds"] - run["train_cpu_seconds"], ".1f"),
        middle(lambda run: run["peak_memory_bytes"] / 2**20, ",.0f"),
        to("a", lambda run: run["peak_memory_bytes"]),
        middle(lambda run: run["held_out_loss"], ".4f"),
        shown(loss, "+.2%"),
        str(len(own)),
    ]
    return f"| {' | '.join(cells)} |"


def detail(run: Run) -> str:
    if run["side"] == "c":
        return f": {run['dtype']}, {run['clients_per_pass']} in a pass"
    return f": {run['clients_at_once']} clients at once" if "clients_at_once" in run else ""


def targets(runs: list[Run]) -> list[str]:
    lines = ["| target | setting | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {' | '.join(cells)} |" for cells in (*speed_targets(runs), *memory_targets(runs), *loss_targets(runs))
    ]
    return [*lines, ""] if len(lines) > 2 else []


def each_setting(runs: list[Run]) -> Iterator[tuple[str, list[Run]]]:
    for setting in settings_of(runs):
        own = [run for run in runs if run["setting"] == setting]
        first = own[0]
        yield f"{first['model']}, {first['clients']} clients, batch {first['batch']}", own


def verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def speed_targets(runs: list[Run]) -> Iterable[list[str]]:
    for name, own in each_setting(runs):
        for other, times in SPEED[own[0]["model"]]:
            if found := ratios(own, "c", other, whole_rate):
                ratio = statistics.median(found)
                goal = f"whole: (c) at least {times:g} x ({other})"
                yield [goal, name, f"{ratio:.2f} x", verdict(ratio >= times)]


def memory_targets(runs: list[Run]) -> Iterable[list[str]]:
    for name, own in each_setting(runs):
        for side in ("b", "c1"):
            if found := ratios(own, side, "a", lambda run: run["peak_memory_bytes"]):
                ratio = statistics.median(found)
                goal = f"peak memory, one client at a time: ({side}) at most {MEMORY_AT_MOST} x (a)"
                yield [goal, name, f"{ratio:.2f} x", verdict(ratio <= MEMORY_AT_MOST)]


def loss_targets(runs: list[Run]) -> Iterable[list[str]]:
    for name, own in each_setting(runs):
        gaps = {
            side: max(abs(value - 1) for value in found)
            for side in SIDES
            if side != "a" and (found := ratios(own, side, "a", lambda run: run["held_out_loss"]))
        }
        if gaps:
            worst = max(gaps, key=lambda side: gaps[side])
            goal = f"held-out loss of every side within {LOSS_WITHIN:.0%} of (a)"
            yield [goal, name, f"at most {gaps[worst]:.2%}, ({worst})", verdict(gaps[worst] <= LOSS_WITHIN)]
