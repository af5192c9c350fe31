"""Peak memory of a client's step with and without backpropagation: each way in processes of its own, medians."""

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
MIB = 2**20
WAYS = {
    "inference": "a forward pass with LoRA on, no training",
    "fedmezo_lora": "FedMeZO on LoRA r 8",
    "fedkseed": "FedKSeed, all weights",
    "backprop_lora": "backpropagation, LoRA r 8, AdamW",
    "backprop_full_sgd": "backpropagation, all weights, SGD",
    "backprop_full_adamw": "backpropagation, all weights, AdamW",
}


def measure(way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.zeroth_memory.step", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(results: dict[str, Any]) -> str:
    runs = results["runs"]

    def middle(way: str, key: str) -> float:
        found: float = statistics.median(run[key] for run in runs if run["way"] == way)
        return found

    def spread(way: str) -> str:
        peaks = [run["peak"] / MIB for run in runs if run["way"] == way]
        return f"{min(peaks):,.0f} to {max(peaks):,.0f}"

    own = middle("inference", "peak")
    lines = [
        "# Memory without gradients: results",
        "",
        f"{results['date']}, {results['system']}, {results['packages']}; "
        f"{runs[0]['parameters'] / 1e6:.1f} M parameters in",
        f"float32 ({runs[0]['parameters'] * 4 / MIB:,.0f} MiB), 4 x 256 tokens a step, half of them with loss; "
        f"{results['repeats']} processes each, medians.",
        "",
        "| way | peak, MiB | from, to | of that of inference | before the step, MiB | CPU seconds a step |",
        "|---|---|---|---|---|---|",
    ]
    for way, said in WAYS.items():
        lines.append(
            f"| {said} | {middle(way, 'peak') / MIB:,.0f} | {spread(way)} | {middle(way, 'peak') / own:.2f} | "
            f"{middle(way, 'before') / MIB:,.0f} | {middle(way, 'cpu_seconds_per_step'):.1f} |"
        )
    replay = middle("fedkseed", "replay_nanoseconds")
    whole = replay * 1e-9 * runs[0]["parameters"]
    lines += [
        "",
        f"Replay: {replay:.1f} ns of one core for each seed and parameter ({whole:.2f} s a seed here, "
        f"{whole * 4096 / 60:.0f} min for all 4,096); its peak is {middle('fedkseed', 'replay_peak') / MIB:,.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="only write RESULTS.md anew, from results.json")
    asked = parser.parse_args()
    if not asked.page:
        runs: list[dict[str, Any]] = []
        for done in range(1, asked.repeats + 1):
            for way in WAYS:
                runs.append({**measure(way), "load": os.getloadavg()[0]})
                print(json.dumps(runs[-1]), flush=True)
            results = {
                "date": datetime.date.today().isoformat(),
                "system": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
                "packages": ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")),
                "repeats": done,
                "runs": runs,
            }
            (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text(page(json.loads((HERE / "results.json").read_text())))


if __name__ == "__main__":
    main()
