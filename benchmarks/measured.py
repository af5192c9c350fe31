"""What small benchmarks share: a measurement in a process of its own, and results with the machine they are from."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """One thread, nothing from a hub, and bytecode kept, which containers often forbid: it is most of a start-up."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | own


def child(module: str, *arguments: object) -> dict[str, Any]:
    """The last line that `python -m module arguments` prints, which is JSON; one thread."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(module, *arguments, json.dumps(found), file=sys.stderr, flush=True)
    return found


def write(folder: Path, title: str, runs: Sequence[Mapping[str, Any]], tables: Callable[[Any], list[str]]) -> None:
    """results.json and RESULTS.md."""
    from benchmarks.throughput.run import machine

    own = {key: value for key, value in machine().items() if not key.startswith("peers")}
    results: dict[str, Any] = {"machine": own, "runs": list(runs)}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    head = [f"# {title}", "", *(f"{key}: {value}  " for key, value in results["machine"].items()), ""]
    text = "\n".join([*head, *tables(results["runs"])]) + "\n"
    (folder / "RESULTS.md").write_text(text, encoding="utf-8")
    print(text)


def middle(runs: Sequence[Mapping[str, Any]], key: str, **where: Any) -> float:
    """The median of a figure over the runs with these settings."""
    found: float = statistics.median(
        run[key] for run in runs if all(run[name] == value for name, value in where.items())
    )
    return found
