"""How long commands take to start: `fedloom --help`, `fedloom validate`, and the way to a run's first step.

python -m benchmarks.start [--repeats 10]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, middle, write

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import typer'": ["-c", "import typer"],
    "fedloom --help": ["-m", "fedloom", "--help"],
    "fedloom validate": ["-m", "fedloom", "validate", "recipes/builtin_arith.yaml"],
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'import transformers.models.llama.modeling_llama'": [
        "-c", "import transformers.models.llama.modeling_llama",
    ],
    "fedloom plan (model, data, adapter, one probe)": ["-m", "fedloom", "plan", "recipes/builtin_arith.yaml"],
}  # fmt: skip
SLOW = {name for name in COMMANDS if "torch" in name or "transformers" in name or "plan" in name}
MODULES = "import sys; from fedloom.cli import main; main(['--help']); sys.stderr.write(str(len(sys.modules)))"


def measure(words: Sequence[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": spent, "wall_seconds": wall}


def tables(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Processor seconds of the whole process, medians, and wall-clock time beside them, which counts what else the",
        "machine does.",
        "",
        "| command | CPU seconds | wall seconds | runs |",
        "|---|---|---|---|",
    ]
    for name in COMMANDS:
        own = [run for run in runs if run.get("command") == name]
        lines.append(
            f"| `{name}` | {middle(own, 'cpu_seconds'):.2f} | {middle(own, 'wall_seconds'):.2f} | {len(own)} |"
        )
    count = next(run["modules"] for run in runs if "modules" in run)
    return [*lines, "", f"`fedloom --help` loads {count} modules, those of Python's own start included."]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="of the light commands; a third as many of the others")
    repeats = parser.parse_args().repeats
    runs: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for name, words in COMMANDS.items():
            if name not in SLOW or repeat < max(1, repeats // 3):
                runs.append({"command": name, **measure(words)})
                print(runs[-1], file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-c", MODULES], cwd=ROOT, capture_output=True, text=True, check=True)
    runs.append({"modules": int(done.stderr)})
    write(Path(__file__).parent, "Start-up", runs, tables)


if __name__ == "__main__":
    main()
