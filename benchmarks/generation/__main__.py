"""Answers of several clients' models: transformers one row, one adapter, one cohort at a time, and ours."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WAYS = {
    "row": "`generate`, one row at a time",
    "adapter": "`generate`, one adapter at a time, its rows in a batch",
    "cohort": "`generate`, all adapters and rows in one batch",
    "ours_16": "fedloom, 16 rows in a pass",
    "ours_128": "fedloom, all rows in a pass",
}
MODELS = {"builtin": "the built-in base", "10m": "a random Llama"}
LEFT_OUT = [("10m", "row")]  # it takes long and tells nothing new


def measure(model: str, way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.generation.measure", model, way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(results: dict[str, Any]) -> str:
    runs = results["runs"]

    def of(model: str, way: str) -> list[dict[str, Any]]:
        return [run for run in runs if run["model"] == model and run["way"] == way]

    def middle(model: str, way: str, key: str) -> float:
        found: float = statistics.median(run[key] for run in of(model, way))
        return found

    load = sorted(run["load"] for run in runs)
    lines = [
        "# Writing answers: results",
        "",
        f"{results['date']}, {results['system']}, {results['packages']}; float32, one thread, 8 clients with LoRA r 8.",
        f"Each way in a process of its own, {results['repeats']} of each, medians; start-up is not counted.",
        f"The machine was shared (load {load[0]:.0f} to {load[-1]:.0f}), so read the ratios of CPU seconds.",
        "",
        "| model | way | CPU seconds | tokens written per CPU second | times one adapter at a time | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    said = []
    for model, name in MODELS.items():
        here = [way for way in WAYS if of(model, way)]
        if "adapter" not in here:
            continue
        one = of(model, here[0])[0]
        for way in here:
            cpu = middle(model, way, "cpu_seconds")
            lines.append(
                f"| {name}, {one['parameters'] / 1e6:.1f} M | {WAYS[way]} | {cpu:.1f} | {one['tokens'] / cpu:,.0f} | "
                f"{middle(model, 'adapter', 'cpu_seconds') / cpu:.2f} | "
                f"{middle(model, way, 'peak_bytes') / 1e6:,.0f} |"
            )
        known = [way for way in here if of(model, way)[0]["rows"]]
        rows = [of(model, way)[0]["rows"] for way in known]
        same = sum(len(set(answers)) == 1 for answers in zip(*rows, strict=True))
        said.append(
            f"- {name}: {len(rows[0])} prompts of {one['prompt_tokens']:,} tokens, the first 24 of each the same;\n"
            f"  greedy answers of 1 to {one['longest']} tokens, {one['tokens']:,} together.\n"
            f"  {same} of {len(rows[0])} answers are the same in {', '.join(known)}."
        )
    return "\n".join([*lines, "", *said]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--page",
        action="store_true",
        help="only write RESULTS.md anew, from results.json",
    )
    asked = parser.parse_args()
    if not asked.page:
        runs: list[dict[str, Any]] = []
        for done in range(1, asked.repeats + 1):
            for model in MODELS:
                for way in [way for way in WAYS if (model, way) not in LEFT_OUT]:
                    runs.append({**measure(model, way), "load": os.getloadavg()[0]})
                    print(json.dumps({**runs[-1], "rows": None}), flush=True)
            results = {
                "date": datetime.date.today().isoformat(),
                "system": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
                "packages": ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")),
                "repeats": done,
                "runs": runs,
            }
            (HERE / "results.json").write_text(json.dumps(results) + "\n")
    (HERE / "RESULTS.md").write_text(page(json.loads((HERE / "results.json").read_text())))


if __name__ == "__main__":
    main()
