"""What `fedloom plan` foretells of memory and time, beside what `fedloom run` then takes, in processes of their own."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MB = 1e6
COMMON: dict[str, Any] = {
    "model": "builtin",
    "data": {"path": "builtin:arith"},
    "rounds": 2,
    "local_steps": 3,
    "adapter": {"kind": "lora", "lora_r": 16, "lora_target_modules": "all-linear"},
    "client": {"per_device_train_batch_size": 16, "learning_rate": 2e-3},
    "arms": ["base", "federated"],
    "evaluate": {"score": "none"},
    "runtime": {"threads": 1},
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoRA r 16, 3 clients, batch 16", {}),
    "wide": ("the same, batch 64, one round", {"rounds": 1, "client": {"per_device_train_batch_size": 64}}),
    "recompute": (
        "the same as wide, blocks run again",
        {
            "rounds": 1,
            "client": {"per_device_train_batch_size": 64},
            "runtime": {"gradient_checkpointing": True},
        },
    ),
    "one": (
        "LoRA, batch 1, one client in a pass",
        {
            "local_steps": 12,
            "client": {"per_device_train_batch_size": 1},
            "runtime": {"clients_per_batch": 1},
        },
    ),
    "skills": ("LoRA, 8 clients, width by rule", {"data": {"path": "builtin:skills"}}),
    "full": (
        "all weights, AdamW",
        {"adapter": {"kind": "full"}, "client": {"learning_rate": 1e-4, "per_device_train_batch_size": 8}},
    ),
    "prefix": (
        "prefix tuning, pieces of 4",
        {
            "adapter": {"kind": "prefix_tuning"},
            "client": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        },
    ),
    "scored": (
        "LoRA, answers scored, all arms",
        {"arms": ["base", "local", "federated", "global"], "evaluate": {"score": "auto", "limit": 8}},
    ),
    "processes": (
        "LoRA, 8 clients, two processes (memory of both)",
        {"data": {"path": "builtin:skills"}, "local_steps": 12},
    ),
    "packed": ("LoRA on a base in nf4", {"quantization": "nf4"}),
    "kept": (
        "the last 2 layers, states below them kept",
        {
            "adapter": {"kind": "last_layers", "trainable_layers": 2},
            "client": {"learning_rate": 1e-3},
            "local_steps": 24,
            "runtime": {"activation_cache_gb": 1.0},
        },
    ),
    "tasks": (
        "LoRA, a benchmark of 400 questions put to base and federated",
        {"evaluate": {"tasks": ["multiple_choice"], "task_paths": {"multiple_choice": "questions.jsonl"}}},
    ),
}
OPTIONS = {"processes": ["--nproc", "2"]}  # of plan and run
QUESTIONS = 400


def recipe_of(changes: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = dict(COMMON)
    for key, value in changes.items():
        whole = key == "adapter" or not isinstance(value, dict)
        told[key] = value if whole else {**told.get(key, {}), **value}
    return told


def high_waters(pid: int) -> dict[int, int]:
    """Of a process and those that it has started."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return {}
    own = next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:")), 0)
    found = {pid: own}
    for child in children:
        found |= high_waters(int(child))
    return found


def watched(command: list[str], cwd: Path) -> tuple[str, dict[str, float]]:
    """A command's standard output, and what it took; a run sets its own peak back, so it is looked at often.

    Peaks of several processes are summed, whenever each was.
    """
    start = time.monotonic()
    peaks: dict[int, int] = {}
    with (cwd / "out").open("w+") as out, (cwd / "err").open("w+") as err:
        process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=err)
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            for one, most in high_waters(process.pid).items():
                peaks[one] = max(peaks.get(one, 0), most)
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: {err.read()[-2000:]}")
        text = out.read()
    cpu = used.ru_utime + used.ru_stime
    return text, {"wall": time.monotonic() - start, "cpu": cpu, "peak": float(sum(peaks.values()))}


def measure(name: str) -> dict[str, Any]:
    about, changes = RECIPES[name]
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "r.yaml").write_text(json.dumps({**recipe_of(changes), "output_dir": "run"}))
        draw = random.Random(0)
        asked = [[draw.randrange(50), draw.randrange(50)] for _ in range(QUESTIONS)]
        told = [
            {"question": f"What is {a} + {b}?", "choices": [str(a + b + more) for more in (1, 0, 2)], "answer": 1}
            for a, b in asked
        ]
        (Path(place) / "questions.jsonl").write_text("\n".join(map(json.dumps, told)))
        fedloom, more = [sys.executable, "-m", "fedloom"], OPTIONS.get(name, [])
        text, plan_took = watched([*fedloom, "plan", "r.yaml", "--format", "json", *more], Path(place))
        planned = json.loads(text)
        _, took = watched([*fedloom, "run", "r.yaml", "--format", "json", *more], Path(place))
        result = json.loads((Path(place) / "run" / "result.json").read_text())
    found = planned["forecast"]
    return {
        "name": name,
        "about": about,
        "clients_per_batch": planned["clients_per_batch"],
        "forecast": {"peak": found["total_bytes"], "wall": found["seconds"], "cpu": found["cpu_seconds"]},
        "memory": found["memory"],
        "parts": found["parts"],
        "run": took,
        "plan": plan_took,
        "costs": {
            arm: {key: costs[key] for key in ("train_seconds", "evaluate_seconds", "checkpoint_seconds")}
            for arm, costs in result["costs_per_arm"].items()
        },
        "load": os.getloadavg()[0],
    }


def page(results: dict[str, Any]) -> str:
    runs = results["runs"]
    loads = [run["load"] for run in runs]

    def off(run: dict[str, Any], key: str) -> float:
        percent: float = 100 * (run["forecast"][key] / run["run"][key] - 1)
        return percent

    lines = [
        "# Forecasts of memory and time: results",
        "",
        f"{results['date']}, {results['system']}, {results['packages']}; one thread. The machine was shared: loads of "
        f"{min(loads):.0f} to {max(loads):.0f}. CPU seconds can be compared, wall seconds hardly.",
        "",
        "| recipe | C | memory, MB: foretold | taken | off | CPU s: foretold | taken | off | wall s: foretold | taken "
        "| plan itself, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        told, took = run["forecast"], run["run"]
        again = " (1)" if run.get("reports_counted_anew") else ""
        lines.append(
            f"| {run['about']}{again} | {run['clients_per_batch']} | {told['peak'] / MB:,.0f} | "
            f"{took['peak'] / MB:,.0f} | {off(run, 'peak'):+.1f} % | {told['cpu']:.1f} | {took['cpu']:.1f} | "
            f"{off(run, 'cpu'):+.1f} % | {told['wall']:.0f} | {took['wall']:.0f} | {run['plan']['cpu']:.1f} |"
        )
    if any(run.get("reports_counted_anew") for run in runs):
        lines += [
            "",
            "(1) The report's part of the foretold time was summed up anew after the run, from what the plan had "
            "measured (`reports_counted_anew`); the rest is as it was told.",
        ]
    for key, what in (("peak", "memory"), ("cpu", "CPU seconds")):
        each = [abs(off(run, key)) for run in runs]
        lines += [
            "",
            f"Off in {what}: median {statistics.median(each):.1f} %, at most {max(each):.1f} %; "
            f"within 15 % in {sum(one <= 15 for one in each)} of {len(each)}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RECIPES)}; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at once")
    parser.add_argument("--page", action="store_true", help="only write RESULTS.md anew, from results.json")
    asked = parser.parse_args()
    file = HERE / "results.json"
    if not asked.page:
        known = {run["name"]: run for run in json.loads(file.read_text())["runs"]} if file.exists() else {}
        with ThreadPoolExecutor(asked.jobs) as pool:
            for run in pool.map(measure, asked.names or RECIPES):
                known[run["name"]] = run
                print(json.dumps(run), flush=True)
                results = {
                    "date": datetime.date.today().isoformat(),
                    "system": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
                    "packages": ", ".join(f"{one} {metadata.version(one)}" for one in ("torch", "transformers")),
                    "runs": [known[name] for name in RECIPES if name in known],
                }
                file.write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
