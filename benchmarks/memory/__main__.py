"""`python -m benchmarks.memory`: what the activation cache and gradient checkpointing cost and save."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import child, write

HERE = Path(__file__).parent
MODELS = {"builtin": "built-in, 1.9 M", "10M": "Llama, 10 M"}
MB = 1e6


def page(runs: Sequence[Any]) -> list[str]:
    def over(model: str, what: str, figure: Callable[[Any], float]) -> tuple[float, float, float]:
        """Median, least and most over the processes."""
        each = [figure(run) for run in runs if run["model"] == model and run["what"] == what]
        return statistics.median(each), min(each), max(each)

    def range_of(found: tuple[float, float, float]) -> str:
        return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"

    lines = [
        "Loss and gradients of one client, one thread; CPU seconds of the same batches in turns in one process.",
        "Medians over processes, in brackets the least and the most.",
        "",
        "## Kept states of frozen blocks (`runtime.activation_cache_gb`)",
        "",
        "The last two layers are trained, and everything fits.",
        "",
        "| model | processes | blocks run without, with | CPU s an epoch without | first epoch with: x the speed "
        "| later ones | all four | kept, MB | losses apart by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, said in MODELS.items():
        some = [run for run in runs if run["model"] == model and run["what"] == "cache"]
        if not some:
            continue
        layers, kept = some[0]["layers"], some[0]["kept_bytes"]
        seconds = over(model, "cache", lambda run: statistics.median(run["seconds"]["plain"]))[0]
        first = over(model, "cache", lambda run: run["seconds"]["plain"][0] / run["seconds"]["kept"][0])
        later = over(model, "cache", lambda run: sum(run["seconds"]["plain"][1:]) / sum(run["seconds"]["kept"][1:]))
        every = over(model, "cache", lambda run: sum(run["seconds"]["plain"]) / sum(run["seconds"]["kept"]))
        gap = max(run["loss_gap"] for run in some)
        lines.append(
            f"| {said}, {some[0]['dtype'].removeprefix('torch.')} | {len(some)} | {layers}, 2 | {seconds:.2f} | "
            f"{range_of(first)} | {range_of(later)} | {range_of(every)} | "
            f"{kept / MB:.1f} for {some[0]['tokens']:,} tokens | {gap:.1g} |"
        )
    lines += [
        "",
        "## Blocks that run again (`runtime.gradient_checkpointing`)",
        "",
        "LoRA r 8 on all linear layers. Memory is what steps add at most to the resident memory of a process that has",
        "made one small step.",
        "",
        "| model | processes | CPU s of a step without | with: x the time | added memory without, MB | with, MB "
        "| with / without |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, said in MODELS.items():
        some = [run for run in runs if run["model"] == model and run["what"] == "time"]
        if not some:
            continue
        seconds = over(model, "time", lambda run: sum(run["seconds"]["plain"]) / run["steps"])[0]
        slower = over(model, "time", lambda run: sum(run["seconds"]["recomputed"]) / sum(run["seconds"]["plain"]))
        added = {
            way: statistics.median(
                run["peak"] - run["before"]
                for run in runs
                if run["model"] == model and run["what"] == "memory" and run["way"] == way
            )
            for way in ("plain", "recomputed")
        }
        lines.append(
            f"| {said}, {some[0]['dtype'].removeprefix('torch.')} | {len(some)} | {seconds:.2f} | {range_of(slower)} | "
            f"{added['plain'] / MB:.0f} | {added['recomputed'] / MB:.0f} | "
            f"{added['recomputed'] / added['plain']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each measurement")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    asked = parser.parse_args()
    runs = []
    for _ in range(asked.repeats):
        for model in asked.models:
            for more in (("cache",), ("time",), ("memory", "plain"), ("memory", "recomputed")):
                runs.append(child("benchmarks.memory.step", model, *more))
    write(HERE, "What is kept, and what is made again: results", runs, page)


if __name__ == "__main__":
    main()
