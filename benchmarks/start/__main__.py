"""How long commands take to start: `fedloom --help`, and the way to a run's first step beside that of a bare script.

python -m benchmarks.start [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, environment, middle, write
from benchmarks.throughput.work import Work

LLAMA = "from transformers import LlamaForCausalLM"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import typer'": ["-c", "import typer"],
    "fedloom --help": ["-m", "fedloom", "--help"],
    "fedloom ls": ["-m", "fedloom", "ls"],
    "fedloom validate": ["-m", "fedloom", "validate", "recipes/builtin_arith.yaml"],
}
# One client, one step of four rows by a model of 10 M parameters; see benchmarks/throughput. WORK and OUT are folders.
SLOW = {
    "python -c 'import torch'": ["-c", "import torch"],
    f"python -c '{LLAMA}'": ["-c", LLAMA],
    f"python -c '{LLAMA}; import peft'": ["-c", f"{LLAMA}; import peft"],
    "bare script (transformers, PEFT), one step": ["-m", "benchmarks.throughput.bare", "WORK", "OUT"],
    "fedloom's parts, same settings, one step": ["-m", "benchmarks.throughput.woven", "WORK", "OUT"],
    "fedloom's parts, defaults, one step": ["-m", "benchmarks.throughput.woven", "WORK", "OUT", "--defaults"],
    "fedloom plan (model, data, adapter, probes)": ["-m", "fedloom", "plan", "recipes/builtin_arith.yaml"],
    "fedloom run --smoke (whole run, four arms, report)": [
        "-m", "fedloom", "run", "recipes/builtin_arith.yaml", "--smoke", "output_dir=OUT/run",
    ],
}  # fmt: skip
NO_BYTECODE = {
    "fedloom --help, no bytecode on disk": COMMANDS["fedloom --help"],
    f"python -c '{LLAMA}', no bytecode on disk": ["-c", LLAMA],
}
MODULES = "import sys; from fedloom.cli import main; main(['--help']); sys.stderr.write(str(len(sys.modules)))"


def measure(words: Sequence[str]) -> dict[str, float]:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": spent, "wall_seconds": wall}


def tables(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Processor seconds of the whole process, medians, and wall-clock time beside them, which counts what else the",
        "machine does. One thread. Bytecode is on disk but where a line says otherwise: there that of Python's",
        "own library is not, either.",
        "",
        "| command | CPU seconds | wall seconds | runs |",
        "|---|--:|--:|--:|",
    ]
    for name in {**COMMANDS, **SLOW, **NO_BYTECODE}:
        own = [run for run in runs if run.get("command") == name]
        lines.append(
            f"| `{name}` | {middle(own, 'cpu_seconds'):.2f} | {middle(own, 'wall_seconds'):.2f} | {len(own)} |"
        )
    count = next(run["modules"] for run in runs if "modules" in run)
    return [*lines, "", f"`fedloom --help` loads {count} modules, those of Python's own start included."]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="of the light commands; a fifth as many of the others")
    repeats = parser.parse_args().repeats
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as scratch:
        places = {"WORK": f"{scratch}/work", "OUT": scratch}
        work = json.dumps(asdict(Work(clients=1, batch=4, steps=1, rounds=1, rows=64, held_out=0)))
        subprocess.run(
            [sys.executable, "-m", "benchmarks.throughput.work", places["WORK"], work],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.DEVNULL,
            check=True,
        )

        def run(name: str, words: Sequence[str]) -> None:
            for mark, place in places.items():
                words = [word.replace(mark, place) for word in words]
            runs.append({"command": name, **measure(words)})
            print(runs[-1], file=sys.stderr, flush=True)

        for name, words in {**COMMANDS, **SLOW}.items():  # once unmeasured, so that bytecode and files are there
            run(name, words)
        runs.clear()
        for repeat in range(repeats):
            for name, words in COMMANDS.items():
                run(name, words)
            if repeat % 5 == 0:
                for name, words in SLOW.items():
                    run(name, words)
                for name, words in NO_BYTECODE.items():
                    run(name, ["-B", "-X", f"pycache_prefix={scratch}/nothing", *words])
    done = subprocess.run([sys.executable, "-c", MODULES], cwd=ROOT, capture_output=True, text=True, check=True)
    runs.append({"modules": int(done.stderr)})
    write(Path(__file__).parent, "Start-up", runs, tables)


if __name__ == "__main__":
    main()
