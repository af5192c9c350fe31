"""Scaling in clients: the population at a fixed cohort, the cohort, personal state over rounds, and whole runs.

python -m benchmarks.clients [population] [cohort] [personal] [whole] [--repeats 3] [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clients.generate import write as write_rows
from benchmarks.measured import child, middle, write

HERE = Path(__file__).parent
WHAT = ("population", "cohort", "personal", "whole")
POPULATIONS = (1_000, 10_000, 100_000, 1_000_000)
COHORTS = (4, 100, 1_000, 10_000)
PERSONAL = (1_000_000, 500, 6)  # population, cohort, rounds


Runs = Sequence[Mapping[str, Any]]


def tables(runs: Runs) -> list[str]:
    lines = [
        "One thread, each measurement in a process of its own; medians, and medians of ratios within a repetition."
    ]
    for what, table in (
        ("population", population_table),
        ("cohort", cohort_table),
        ("personal", personal_table),
        ("whole", whole_tables),
    ):
        own = [run for run in runs if run["what"] == what]
        lines += table(own) if own else []
    return lines


def population_table(runs: Runs) -> list[str]:
    lines = [
        "",
        "## Who holds what, and a cohort of 1,000",
        "",
        "Two rows of 16 tokens a client. `prepare`: the split and the table of clients, not reading and tokenising.",
        "",
        "| clients | prepare, CPU s | draw the cohort, CPU ms | open a client, CPU µs | bytes a client |",
        "|--:|--:|--:|--:|--:|",
    ]
    for number in sorted({run["number"] for run in runs}):
        prepare, draw, open, size = (
            middle(runs, key, number=number)
            for key in ("prepare_cpu_seconds", "sample_cpu_seconds", "open_cpu_seconds", "bytes_per_client")
        )
        lines.append(f"| {number:,} | {prepare:.2f} | {draw * 1e3:.1f} | {open * 1e6:.0f} | {size:,.0f} |")
    return lines


def cohort_table(runs: Runs) -> list[str]:
    lines = [
        "",
        "## Clients in a round",
        "",
        "LoRA r 8 on a Llama of 64 hidden and 2 layers, one step of 2 rows a client, 8 clients in a pass; of 100,000. "
        f"Medians of {len({run['repetition'] for run in runs})}.",
        "",
        "| cohort | CPU ms a client | x that of 100 | MiB more than before the rounds | peak MiB |",
        "|--:|--:|--:|--:|--:|",
    ]
    key = "cpu_seconds_per_client"
    bases = {run["repetition"]: run[key] for run in runs if run["cohort"] == 100}
    for cohort in sorted({run["cohort"] for run in runs}):
        each, more, peak = (middle(runs, name, cohort=cohort) for name in (key, "more_bytes", "peak_bytes"))
        ratio = statistics.median(run[key] / bases[run["repetition"]] for run in runs if run["cohort"] == cohort)
        lines.append(f"| {cohort:,} | {each * 1e3:.1f} | {ratio:.2f} | {more / 2**20:,.0f} | {peak / 2**20:,.0f} |")
    return lines


def personal_table(runs: Runs) -> list[str]:
    number, cohort, rounds = PERSONAL
    lines = [
        "",
        f"## Personal state of {number:,} clients, {cohort:,} in a round",
        "",
        "The same model with FedSA-LoRA, which keeps every client's B at home. Once each.",
        "",
        f"| where | MiB held after round 1 | after round {rounds} | MiB of file | clients seen | CPU ms a client |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        first, last, file = (size / 2**20 for size in (run["held_bytes"][0], run["held_bytes"][-1], run["file_bytes"]))
        lines.append(
            f"| {run['where']} | {first:.1f} | {last:.1f} | {file:.1f} | {run['clients_seen']:,} | "
            f"{run['cpu_seconds_per_client'] * 1e3:.1f} |"
        )
    return lines


WHOLE = (  # command, clients, method, cohort, rounds, whether the rows were prepared before
    ("run", 10_000, "fedavg", 1000, 3, False),
    ("run", 1_000_000, "fedavg", 1000, 3, False),
    ("preview", 1_000_000, "fedavg", 1000, 3, True),
    ("plan", 1_000_000, "fedavg", 1000, 3, True),
    ("run", 1_000_000, "fedavg", 4, 3, True),
    ("run", 1_000_000, "fedsa_lora", 1000, 3, True),
)


def whole_tables(runs: Runs) -> list[str]:
    lines = [
        "",
        "## The whole command",
        "",
        "`fedloom run` of a .jsonl file with a column `user` (`python -m benchmarks.clients.generate`, two short rows",
        "each), the built-in base, LoRA r 8, a step of 2 rows a client, 1,000 validation and 1,000 test rows over all,",
        "validation after each round. FedSA-LoRA with `personal_state: disk`. Once each, imports counted.",
        "",
        "| run | command | clients | method | cohort | rounds | rows | CPU s | peak MiB | own | CPU ms each |",
        "|---|---|--:|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for mark, run in zip(MARKS, runs, strict=False):
        each = run.get("train_cpu_seconds_per_client")
        trained = "" if each is None else f"{each * 1e3:.1f}"
        lines.append(
            f"| {mark} | {run['command']} | {run['clients']:,} | {run['method']} | {run['cohort']:,} | "
            f"{run['rounds']} | {'from the cache' if run['cached'] else 'new'} | {run['cpu_seconds']:.0f} | "
            f"{run['peak_bytes'] / 2**20:,.0f} | {run['own_peak_bytes'] / 2**20:,.0f} | {trained} |"
        )
    names = list(dict.fromkeys(name for run in runs for name in run["parts"]))
    lines += [
        "",
        "The peak is of the resident set; `own` leaves out pages of mapped files, which the system may take back.",
        "CPU seconds by part, and the most memory of its own seen in it (MiB; looked at 50 times a second):",
        "",
        f"| | {' | '.join(MARKS[: len(runs)])} |",
        f"|---|{'--:|' * len(runs)}",
    ]
    for name in names:
        own = [run["parts"].get(name) for run in runs]
        told = ("" if one is None else f"{one[0]:.1f} ({one[1] / 2**20:,.0f})" for one in own)
        said = "imports, and all else" if name == "start" else name
        lines.append(f"| {said} | {' | '.join(told)} |")
    return lines


MARKS = "ABCDEFGHIJ"


def whole() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="fedloom-clients-") as scratch:
        os.environ["FEDLOOM_CACHE"] = str(Path(scratch) / "cache")
        for command, clients, method, cohort, rounds, cached in WHOLE:
            file = Path(scratch) / f"{clients}.jsonl"
            if not file.exists():
                write_rows(file, clients)
            settings = {"command": command, "clients": clients, "method": method, "cohort": cohort, "rounds": rounds}
            found = child("benchmarks.clients.whole", command, file, method, cohort, rounds)
            yield {"what": "whole", **settings, "cached": cached, **found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(WHAT)}: the others stay as they were; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="cohorts to 1,000, once")
    given = parser.parse_args()
    asked = given.what or WHAT
    if unknown := set(asked) - set(WHAT):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(WHAT)}")
    module, before = "benchmarks.clients.measure", HERE / "results.json"
    runs = json.loads(before.read_text(encoding="utf-8"))["runs"] if before.exists() else []
    runs = [run for run in runs if run["what"] not in asked]
    for repetition in range(1 if given.small else given.repeats):
        for number in POPULATIONS if "population" in asked else ():
            found = child(module, "population", number, 1000)
            runs.append({"what": "population", "number": number, **found})
        for cohort in COHORTS[: 3 if given.small else 4] if "cohort" in asked else ():
            found = child(module, "cohort", 100_000, cohort, 2, "none")
            runs.append({"what": "cohort", "cohort": cohort, "repetition": repetition, **found})
    for where in ("memory", "disk") if "personal" in asked else ():
        runs.append({"what": "personal", "where": where, **child(module, "personal", *PERSONAL, where)})
    for run in whole() if "whole" in asked else ():
        runs.append(run)
        write(HERE, "Scaling in clients", runs, tables)
    write(HERE, "Scaling in clients", runs, tables)


if __name__ == "__main__":
    main()
