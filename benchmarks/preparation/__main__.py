"""Prepare synthetic files of several sizes, each in a process of its own, and write what that took."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.preparation.generate import size_of, write

HERE = Path(__file__).parent
MIB = 2**20


def measure(file: Path, cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "FEDLOOM_CACHE": str(cache)}
    environment.pop("TOKENIZERS_PARALLELISM", None)  # as a user has it
    command = [sys.executable, "-m", "benchmarks.preparation.measure", str(file), "by_category", "8"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["100MB", "300MB", "1GB"])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and RESULTS.md")
    parser.add_argument("--page", action="store_true", help="only write RESULTS.md anew, from results.json")
    asked = parser.parse_args()
    if asked.page:
        (asked.out / "RESULTS.md").write_text(page(json.loads((asked.out / "results.json").read_text())))
        return
    runs = []
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(prefix="fedloom-preparation-") as folder:
            file = Path(folder) / "rows.jsonl"
            write(file, size_of(size))
            load = os.getloadavg()[0]
            first = measure(file, Path(folder) / "cache")
            again = measure(file, Path(folder) / "cache")
            assert first["digest"] == again["digest"]
            kept = sum(one.stat().st_size for one in (Path(folder) / "cache").rglob("*") if one.is_file())
        runs.append({"size": size, "load": load, "first": first, "again": again, "cache_bytes": kept})
        print(json.dumps(runs[-1]), flush=True)
    results = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": {name: metadata.version(name) for name in ("fedloom", "tokenizers", "transformers", "numpy")},
        "runs": runs,
    }
    (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (asked.out / "RESULTS.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    columns = ("file", "rows", "tokens", "before, MiB", "most, MiB", "grown by, MiB", "seconds", "of it reading",
               "CPU s", "tokens per CPU-s", "load")  # fmt: skip
    lines = [
        "# Memory and time of preparing data, by size of file",
        "",
        f"{results['date']}, {results['cores']} cores, {results['system']}; {packages}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for run in results["runs"]:
        one = run["first"]
        grown = one["peak_bytes"] - one["before_bytes"]
        cells = [
            run["size"],
            f"{one['rows']:,}",
            f"{one['tokens']:,}",
            *(f"{value / MIB:,.0f}" for value in (one["before_bytes"], one["peak_bytes"], grown)),
            *(f"{value:,.0f}" for value in (one["seconds"], one["parts"]["sources_of"], one["cpu_seconds"])),
            f"{one['tokens'] / one['cpu_seconds']:,.0f}",
            f"{run['load']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The second time, from the cache:",
        "",
        "| file | cache on disk, MB | grown by, MiB | bytes a row | seconds | CPU s | times as quick (CPU) |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        one = run["again"]
        grown = one["peak_bytes"] - one["before_bytes"]
        lines.append(
            f"| {run['size']} | {run['cache_bytes'] / 1e6:,.0f} | {grown / MIB:,.0f} | {grown / one['rows']:,.0f} | "
            f"{one['seconds']:,.1f} | {one['cpu_seconds']:,.1f} | "
            f"{run['first']['cpu_seconds'] / one['cpu_seconds']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
