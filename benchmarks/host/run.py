"""Every setting in processes of its own, in turn, and again: `python -m benchmarks.host`.

Ratios are to the first setting in the same repetition; the median of the repetitions counts.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.throughput.run import machine

HERE = Path(__file__).parent
MIB = 2**20
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
OURS = ASLEEP | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
UNBOUND = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
# name -> (environment beside OURS, arguments, whether as many busy processes as there are cores run beside)
MEMORY: dict[str, tuple[dict[str, str], list[str], bool]] = {
    "as fedloom sets it, 1 thread": ({}, [], False),
    "glibc as it comes": ({}, ["--glibc"], False),
    "oneDNN's own cache size": (UNBOUND, [], False),
    "large pages by glibc": ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, [], False),
    "large pages by torch": ({"THP_MEM_ALLOC_ENABLE": "1"}, [], False),
    "jemalloc": ({"LD_PRELOAD": "jemalloc"}, ["--glibc"], False),
    "tcmalloc": ({"LD_PRELOAD": "tcmalloc_minimal"}, ["--glibc"], False),
}
THREADS: dict[str, tuple[dict[str, str], list[str], bool]] = {
    "2 threads, asleep while they wait": ({}, ["--threads", "2"], False),
    "2 threads, libgomp's own spinning": ({"OMP_WAIT_POLICY": ""}, ["--threads", "2"], False),
    "2 threads, bound to cores": ({"OMP_PROC_BIND": "true"}, ["--threads", "2"], False),
    "1 thread, busy machine": ({}, [], True),
    "2 threads asleep, busy machine": ({}, ["--threads", "2"], True),
    "2 threads spinning, busy machine": ({"OMP_WAIT_POLICY": ""}, ["--threads", "2"], True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--preload", action="append", default=[], metavar="FILE", help="a jemalloc or tcmalloc library")
    parser.add_argument("--page", action="store_true", help="only write RESULTS.md anew, from results.json")
    given = parser.parse_args()
    if not given.page:
        results: dict[str, Any] = {"machine": machine(), "steps": given.steps, "runs": [], "absent": []}
        for repetition in range(given.repetitions):
            for name, (environment, arguments, busy) in (MEMORY | THREADS).items():
                if "LD_PRELOAD" in environment:
                    library = library_of(environment["LD_PRELOAD"], given.preload)
                    if library is None:
                        results["absent"] = sorted({*results["absent"], name})
                        continue
                    environment = {"LD_PRELOAD": library}
                found = measured(environment, [*arguments, "--steps", str(given.steps)], busy)
                results["runs"].append({"setting": name, "repetition": repetition, **found})
                print(json.dumps(results["runs"][-1]), flush=True)
                (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = page(json.loads((HERE / "results.json").read_text(encoding="utf-8")))
    (HERE / "RESULTS.md").write_text(text, encoding="utf-8")
    print(text)


def library_of(name: str, given: list[str]) -> str | None:
    return next((path for path in given if name in path), None) or ctypes.util.find_library(name)


def measured(environment: dict[str, str], arguments: list[str], busy: bool) -> dict[str, Any]:
    whole = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **OURS, **environment}
    whole.pop("OMP_NUM_THREADS", None)
    if not whole["OMP_WAIT_POLICY"]:
        del whole["OMP_WAIT_POLICY"]
    beside = (
        [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(os.cpu_count() or 1)] if busy else []
    )
    try:
        command = [sys.executable, "-m", "benchmarks.host.step", *arguments]
        done = subprocess.run(command, cwd=HERE.parent.parent, env=whole, capture_output=True, text=True, check=False)
    finally:
        for process in beside:
            process.kill()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(results: dict[str, Any]) -> str:
    runs = results["runs"]
    lines = ["# Threads and memory of the process: what each setting is worth", ""]
    lines += [f"{key}: {value}  " for key, value in results["machine"].items()]
    lines += [
        "",
        f"{results['steps']} training steps ({runs[0]['dtype']}, 4 clients in a pass), medians of "
        f"{1 + max(run['repetition'] for run in runs)}; ratios inside a repetition, to the first line.",
        "Above 1 is more time. The load is that of the whole machine while it ran.",
        "",
        "| setting | CPU s | CPU time, x | wall time, x | of it in the system, s | page faults | peak MiB | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(MEMORY))
    base = {run["repetition"]: run for run in runs if run["setting"] == first}
    for name in MEMORY | THREADS:
        own = [run for run in runs if run["setting"] == name]
        if not own:
            if name in results["absent"]:
                lines.append(f"| {name} | not installed | | | | | | |")
            continue

        def middle(key: str, own: list[dict[str, Any]] = own) -> float:
            found: float = statistics.median(run[key] for run in own)
            return found

        def ratio(key: str, own: list[dict[str, Any]] = own) -> float:
            found: float = statistics.median(run[key] / base[run["repetition"]][key] for run in own)
            return found

        lines.append(
            f"| {name} | {middle('cpu_seconds'):.1f} | {ratio('cpu_seconds'):.2f} | {ratio('wall_seconds'):.2f} "
            f"| {middle('system_seconds'):.2f} | {middle('page_faults'):,.0f} "
            f"| {middle('peak_memory_bytes') / MIB:,.0f} | {middle('load'):.1f} |"
        )
    return "\n".join(lines) + "\n"
