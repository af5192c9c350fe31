"""A run by one process with all cores against the same run by several with a share of them each, in turns.

Each is `fedloom run` as a user types it. Seconds are those of the rounds, as the run itself counts them (start-up,
evaluation and checkpoints left out); CPU seconds are of all of its processes, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.throughput.run import machine

HERE = Path(__file__).parent
RECIPE = ["builtin_skills", "arms=[federated]", "evaluate.score=none", "evaluate.eval_rounds=0", "dtype=float32"]


def measure(processes: int, rounds: int, batch: int) -> dict[str, Any]:
    place = Path(tempfile.mkdtemp(prefix="fedloom-processes-"))
    keys = [f"rounds={rounds}", f"client.per_device_train_batch_size={batch}", f"output_dir={place / 'run'}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        subprocess.run(
            [sys.executable, "-m", "fedloom", "run", *RECIPE, *keys, "--nproc", str(processes)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        result = json.loads((place / "run" / "result.json").read_text())
    finally:
        shutil.rmtree(place, ignore_errors=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    costs = result["costs_per_arm"]["federated"]
    return {
        "processes": processes,
        "seconds": costs["train_seconds"],
        "tokens": costs["train_tokens"],
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_memory_bytes": costs["peak_memory_bytes"],
        "loss": result["arms"]["federated"]["loss"],
        "load": os.getloadavg()[0],
    }


def page(results: dict[str, Any]) -> str:
    runs = results["runs"]

    def middle(processes: int, key: str) -> float:
        found: float = statistics.median(run[key] for run in runs if run["processes"] == processes)
        return found

    lines = [
        "# Several processes: results",
        "",
        f"{results['date']}, {results['processor']}, {results['cores']} cores, {results['system']}, "
        f"{results['packages']}; {results['work']}; {results['repeats']} runs "
        "each, in turns, medians.",
        f"Load of the machine at the ends of runs: {min(run['load'] for run in runs):.1f} to "
        f"{max(run['load'] for run in runs):.1f}"
        + (" (shared with other work, so that seconds say little)." if results["shared"] else "."),
        "",
        "| processes | seconds of rounds | of those of one | CPU seconds, start-up included | of those of one "
        "| largest process, MB | test loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for processes in sorted({run["processes"] for run in runs}):
        own = {key: middle(processes, key) for key in ("seconds", "cpu_seconds", "peak_memory_bytes", "loss")}
        lines.append(
            f"| {processes} | {own['seconds']:.1f} | {own['seconds'] / middle(1, 'seconds'):.2f} | "
            f"{own['cpu_seconds']:.1f} | {own['cpu_seconds'] / middle(1, 'cpu_seconds'):.2f} | "
            f"{own['peak_memory_bytes'] / 1e6:,.0f} | {own['loss']:.6f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for done in range(1, asked.repeats + 1):
        for processes in asked.processes:
            runs.append(measure(processes, asked.rounds, asked.batch))
            print(json.dumps(runs[-1]), flush=True)
        results = {
            **machine(),
            "work": f"{asked.rounds} rounds x 8 clients x 3 steps x {asked.batch} rows of {RECIPE[0]}, float32",
            "repeats": done,
            "shared": max(run["load"] for run in runs) > 1.5 * (os.cpu_count() or 1),
            "runs": runs,
        }
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "RESULTS.md").write_text(page(results))


if __name__ == "__main__":
    main()
