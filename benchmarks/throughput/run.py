"""Run every side in a process of its own, one after the other, and write results.json and RESULTS.md.

A repetition runs (a), (b) and (c) back to back, and ratios are taken inside a repetition, so that a machine that others
use as well spoils them little; the median over repetitions is what counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.throughput.work import Work

HERE = Path(__file__).parent
SIDES = {
    "a": ("bare", []),
    "b": ("woven", []),
    "c": ("woven", ["--defaults"]),
}
LABELS = {
    "a": "(a) bare PyTorch + PEFT, float32",
    "b": "(b) fedloom, same settings, one client at a time",
    "c": "(c) fedloom's defaults",
}
# The same examples per client at batch 1 as at batch 4.
SETTINGS = (
    Work(clients=3, batch=4, steps=10, rounds=2),
    Work(clients=3, batch=1, steps=40, rounds=2),
    Work(clients=30, batch=4, steps=3, rounds=1),
    Work(clients=30, batch=1, steps=12, rounds=1),
)
QUICK = (Work(clients=3, batch=4, steps=4, rounds=1), Work(clients=10, batch=1, steps=6, rounds=1))
# The same pass in both, and enough steps with few clients that the longest rows and every shape come by.
MEMORY = (Work(clients=4, batch=4, steps=40, rounds=1), Work(clients=1000, batch=4, steps=1, rounds=1))
TARGETS = "(b) at most 1.05 x the CPU time of (a); (c) at least 2.5 x the tokens per CPU-second of (a), held-out loss "


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small settings, one repetition, nothing written")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave out the run with 1,000 clients")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and RESULTS.md")
    given = parser.parse_args()
    settings = QUICK if given.quick else SETTINGS
    repetitions = 1 if given.quick else given.repetitions
    results: dict[str, Any] = {"machine": machine(), "runs": [], "memory": [], "base_loss": None}
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as scratch:
        for repetition in range(repetitions):
            for setting in settings:
                work = Work(**{**asdict(setting), "seed": repetition})
                folder = prepared(work, Path(scratch))
                for side in rotated(list(SIDES), repetition):
                    results["runs"].append(one_run(side, work, folder, Path(scratch)) | {"repetition": repetition})
        if not (given.quick or given.no_memory):
            for work in MEMORY:
                results["memory"].append(one_run("c", work, prepared(work, Path(scratch)), Path(scratch)))
    text = report(results)
    print(text)
    if not given.quick:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (given.out / "RESULTS.md").write_text(text, encoding="utf-8")


def rotated(sides: list[str], by: int) -> list[str]:
    by %= len(sides)
    return sides[by:] + sides[:by]


def child(module: str, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.throughput.{module}", *arguments],
        cwd=HERE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")


def prepared(work: Work, scratch: Path) -> Path:
    folder = scratch / f"{work.clients}-{work.batch}-{work.seed}"
    child("work", str(folder), json.dumps(asdict(work)))
    return folder


def one_run(side: str, work: Work, folder: Path, scratch: Path) -> dict[str, Any]:
    module, more = SIDES[side]
    out = scratch / "out.json"
    load = os.getloadavg()[0]
    child(module, str(folder), str(out), *more)
    found: dict[str, Any] = {"side": side, **asdict(work), "load_before": load, **json.loads(out.read_text())}
    print(
        f"{LABELS[side]}: {work.clients} clients, batch {work.batch}: {rate(found):,.0f} tokens per CPU-second, "
        f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB, held-out loss {found['held_out_loss']:.4f}",
        file=sys.stderr,
        flush=True,
    )
    return found


def rate(run: dict[str, Any]) -> float:
    """Non-padding tokens per CPU-second of training."""
    return float(run["tokens"] / run["train_cpu_seconds"])


# ---- the report ------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    lines = ["# Throughput: the same federated work by a bare loop and by fedloom", ""]
    lines += [f"{key}: {value}  " for key, value in results["machine"].items()]
    lines += [
        "",
        f"Targets: {TARGETS}within 1 %; memory at 1,000 clients at most 1.2 x that at 4.",
        "",
        "One torch thread. Tokens are those of the text, padding left out. CPU seconds are user and system time of",
        "the training part; start-up (imports, model, one warm-up step) is beside them. Medians over repetitions;",
        "ratios are taken inside a repetition.",
        "",
    ]
    settings = sorted({(run["clients"], -run["batch"]) for run in results["runs"]})
    for clients, minus_batch in settings:
        lines += setting_table(results, clients, -minus_batch)
    if results["memory"]:
        lines += memory_table(results["memory"])
    return "\n".join(lines) + "\n"


def setting_table(results: dict[str, Any], clients: int, batch: int) -> list[str]:
    runs = [run for run in results["runs"] if (run["clients"], run["batch"]) == (clients, batch)]
    by_side: dict[str, dict[int, dict[str, Any]]] = {side: {} for side in SIDES}
    for run in runs:
        by_side[run["side"]][run["repetition"]] = run
    first = runs[0]
    lines = [
        f"## {clients} clients, batch {batch} ({first['rounds']} rounds of {first['steps']} steps)",
        "",
        "| | tokens per CPU-s | x (a) | CPU time, x (a) | tokens per s | start-up CPU s | peak MiB | loss | vs (a) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, reps in by_side.items():
        faster = median(rate(run) / rate(by_side["a"][number]) for number, run in reps.items())
        loss = median(run["held_out_loss"] / by_side["a"][number]["held_out_loss"] - 1 for number, run in reps.items())
        detail = reps[min(reps)]
        label = LABELS[side]
        if side == "c":
            label += f": {detail['dtype']}, {detail['clients_per_pass']} clients in a pass"
        lines.append(
            f"| {label} | {median(map(rate, reps.values())):,.0f} | {faster:.2f} | {1 / faster:.2f} "
            f"| {median(run['tokens'] / run['wall_seconds'] for run in reps.values()):,.0f} "
            f"| {median(run['start_cpu_seconds'] for run in reps.values()):.1f} "
            f"| {median(run['peak_memory_bytes'] / 2**20 for run in reps.values()):,.0f} "
            f"| {median(run['held_out_loss'] for run in reps.values()):.4f} | {loss:+.2%} |"
        )
    return [*lines, ""]


def memory_table(runs: list[dict[str, Any]]) -> list[str]:
    few = runs[0]["peak_memory_bytes"]
    lines = ["## Memory of (c) by the number of clients (batch 4)", "", "| clients | peak MiB | ratio |"]
    lines.append("|---|---|---|")
    lines += [
        f"| {run['clients']:,} | {run['peak_memory_bytes'] / 2**20:,.0f} | {run['peak_memory_bytes'] / few:.2f} |"
        for run in runs
    ]
    return [*lines, ""]


def median(values: Any) -> float:
    return float(statistics.median(values))


def machine() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "fedloom")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "load when started": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
    }


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    known = [name for name in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if f" {name}" in flags]
    return f"{model} ({', '.join(known)})"


if __name__ == "__main__":
    main()
