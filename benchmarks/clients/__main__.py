"""Scaling in clients: the population at a fixed cohort, the cohort, and personal state over rounds.

python -m benchmarks.clients [--repeats 3] [--small]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import child, middle, write

POPULATIONS = (1_000, 10_000, 100_000, 1_000_000)
COHORTS = (4, 100, 1_000, 10_000)
PERSONAL = (1_000_000, 500, 6)  # population, cohort, rounds


def tables(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    def of(what: str) -> list[Mapping[str, Any]]:
        return [run for run in runs if run["what"] == what]

    lines = [
        "One thread, each measurement in a process of its own, medians. Two rows of 16 tokens a client.",
        "",
        "## Who holds what, and a cohort of 1,000",
        "",
        "`prepare` is the split and the table of clients, reading and tokenising left out.",
        "",
        "| clients | prepare, CPU s | draw the cohort, CPU ms | open a client, CPU µs | bytes a client |",
        "|---|---|---|---|---|",
    ]
    for number in sorted({run["number"] for run in of("population")}):
        own = [middle(of("population"), key, number=number) for key in (
            "prepare_cpu_seconds", "sample_cpu_seconds", "open_cpu_seconds", "bytes_per_client")]  # fmt: skip
        lines.append(f"| {number:,} | {own[0]:.2f} | {own[1] * 1e3:.1f} | {own[2] * 1e6:.0f} | {own[3]:,.0f} |")
    lines += [
        "",
        "## Clients in a round",
        "",
        "LoRA r 8 on a Llama of 64 hidden and 2 layers, one step of 2 rows a client, 8 clients in a pass; of 100,000.",
        "",
        "| cohort | CPU ms a client | x 100 | MiB more than before the rounds | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for cohort in sorted({run["cohort"] for run in of("cohort")}):
        own = [
            middle(of("cohort"), key, cohort=cohort) for key in ("cpu_seconds_per_client", "more_bytes", "peak_bytes")
        ]
        base = middle(of("cohort"), "cpu_seconds_per_client", cohort=100)
        lines.append(
            f"| {cohort:,} | {own[0] * 1e3:.1f} | {own[0] / base:.2f} | {own[1] / 2**20:,.0f} | {own[2] / 2**20:,.0f} |"
        )
    number, cohort, rounds = PERSONAL
    lines += [
        "",
        f"## Personal state of {number:,} clients, {cohort:,} in a round",
        "",
        "The same with FedSA-LoRA, which keeps every client's B at home.",
        "",
        f"| where | MiB held after round 1 | after round {rounds} | MiB of file | clients seen | CPU ms a client |",
        "|---|---|---|---|---|---|",
    ]
    for run in of("personal"):
        lines.append(
            f"| {run['where']} | {run['held_bytes'][0] / 2**20:.1f} | {run['held_bytes'][-1] / 2**20:.1f} | "
            f"{run['file_bytes'] / 2**20:.1f} | {run['clients_seen']:,} | {run['cpu_seconds_per_client'] * 1e3:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="cohorts to 1,000, once")
    given = parser.parse_args()
    module, runs = "benchmarks.clients.measure", []
    for _ in range(1 if given.small else given.repeats):
        for number in POPULATIONS:
            found = child(module, "population", number, 1000)
            runs.append({"what": "population", "number": number, **found})
        for cohort in COHORTS[: 3 if given.small else 4]:
            runs.append({"what": "cohort", "cohort": cohort, **child(module, "cohort", 100_000, cohort, 2, "none")})
    for where in ("memory", "disk"):
        runs.append({"what": "personal", "where": where, **child(module, "personal", *PERSONAL, where)})
    write(Path(__file__).parent, "Scaling in clients", runs, tables)


if __name__ == "__main__":
    main()
