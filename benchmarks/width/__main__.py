"""Scaling in cohort width: a round of 32 clients with 1, 2, 4, ... 32 of them in a pass.

python -m benchmarks.width [builtin] [10M] [--batches 1 4] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import child, write

HERE = Path(__file__).parent
MODELS = {"builtin": "the built-in base", "10M": "a Llama of 10 M parameters"}
BATCHES = (1, 4)
STEPS = 1  # of each client


def tables(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "LoRA r 8 on q and v; a round of the same 32 clients at each width, one thread. Tokens are those of text.",
        "CPU seconds are the least of the repetitions, x C = 1 the median over them of the ratio within a repetition.",
        "Memory is the process's peak while a round is trained, widths in ascending order.",
    ]
    for run in runs:
        rows = f"{run['batch']} row{'s' * (run['batch'] > 1)}"
        lines += [
            "",
            f"## {MODELS[run['model']]}, {rows} a client and step",
            "",
            f"{run['dtype']}; {run['steps']} step a client, {run['tokens']:,} tokens a round; {run['repeats']} "
            f"repetitions. `auto` takes {run['auto']} of 32 clients in a pass, `fastest` {run['fastest']}.",
            "",
            "| C | tokens per CPU-second | x C = 1 | padding | peak MiB | x C = 1 | |",
            "|--:|--:|--:|--:|--:|--:|---|",
        ]
        alone = run["widths"][0]
        for one in run["widths"]:
            speed = run["tokens"] / min(one["cpu_seconds"])
            pairs = zip(alone["cpu_seconds"], one["cpu_seconds"], strict=True)
            ratio = statistics.median(first / second for first, second in pairs)
            chosen = ", ".join(f"`{name}`" for name in ("auto", "fastest") if run[name] == one["width"])
            lines.append(
                f"| {one['width']} | {speed:,.0f} | {ratio:.2f} | {1 - run['tokens'] / one['padded_tokens']:.0%} | "
                f"{one['peak_bytes'] / 2**20:,.0f} | {one['peak_bytes'] / alone['peak_bytes']:.2f} | {chosen} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.width", description=__doc__)
    parser.add_argument(
        "models", nargs="*", help=f"of {', '.join(MODELS)}: the others stay as they were; all by default"
    )
    parser.add_argument(
        "--batches", type=int, nargs="*", choices=BATCHES, default=BATCHES, help="rows a client and step"
    )
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    asked = given.models or list(MODELS)
    if unknown := set(asked) - set(MODELS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(MODELS)}")
    before = HERE / "results.json"
    runs = json.loads(before.read_text(encoding="utf-8"))["runs"] if before.exists() else []
    for model in asked:
        for batch in given.batches:
            found = child("benchmarks.width.measure", model, batch, STEPS, given.repeats)
            runs = [run for run in runs if (run["model"], run["batch"]) != (model, batch)] + [found]
            runs.sort(key=lambda run: (list(MODELS).index(run["model"]), run["batch"]))
            write(HERE, "Scaling in cohort width", runs, tables)


if __name__ == "__main__":
    main()
