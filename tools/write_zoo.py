"""Write docs/zoo.md from the results of the suites zoo and bytes.

    python tools/write_zoo.py [--zoo benchmarks/zoo] [--bytes benchmarks/bytes] [--to docs/zoo.md]

Every figure comes from suite.json; what a suite has not run is not in the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedloom.study.progress import byte_text
from fedloom.study.suite_result import Row, SuiteResult, read_suite

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = ("base", "local", "global")  # arms that are run once, beside fedavg


def cells(suite: SuiteResult, arm: str, metric: str) -> dict[tuple[str, ...], Row]:
    """Settings, as texts in the order of the suite's axes -> the row."""
    return {
        tuple(str(value) for value in row["settings"].values()): row
        for row in suite["table"]
        if row["arm"] == arm and row["metric"] == metric and row["comparison"] == "rounds"
    }


def shown(row: Row | None, percent: bool) -> str:
    if row is None or row["mean"] is None:
        return "–"
    factor, digits = (100.0, 1) if percent else (1.0, 3)
    spread = f" ± {factor * row['std']:.{digits}f}" if row["std"] is not None else ""
    return f"{factor * row['mean']:.{digits}f}{spread}"


def lines_of(title: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    made = ["| " + " | ".join(title) + " |", "|---" * len(title) + "|"]
    return [*made, *("| " + " | ".join(row) + " |" for row in rows), ""]


def facts(suite: SuiteResult) -> str:
    done = sum(cell["status"] == "done" for cell in suite["cells"])
    seeds = ", ".join(map(str, suite["seeds"]))
    return f"{done} of {len(suite['cells'])} runs, seeds {seeds}, fedloom {suite['fedloom_version']}."


def costs(row: Row) -> list[str]:
    of: Mapping[str, float] = row["costs"]
    up, down = of.get("bytes_up_per_client_round", 0.0), of.get("bytes_down_per_client_round", 0.0)
    return [byte_text(up) if up else "–", byte_text(down) if down else "–", f"{of.get('train_seconds', 0.0):.1f}"]


def zoo_lines(suite: SuiteResult) -> list[str]:
    """One table for each task and split: every method, best first, then the reference arms."""
    score, loss = cells(suite, "federated", "score"), cells(suite, "federated", "loss")
    made = ["## Every method and adapter kind", "", facts(suite), ""]
    for place in dict.fromkeys(key[:-1] for key in loss):
        made += [f"### {', '.join(place)}", ""]
        keys = [key for key in loss if key[:-1] == place]
        keys.sort(key=lambda key: (-(score[key]["mean"] or 0.0) if key in score else 0.0, loss[key]["mean"] or 0.0))
        rows = [
            [key[-1], shown(score.get(key), True), shown(loss[key], False), *costs(loss[key]), str(loss[key]["n"])]
            for key in keys
        ]
        for arm in REFERENCES:
            found, lost = cells(suite, arm, "score"), cells(suite, arm, "loss")
            rows += [
                [f"*{arm}*", shown(found.get(key), True), shown(row, False), *costs(row), str(row["n"])]
                for key, row in lost.items()
                if key[:-1] == place
            ]
        made += lines_of(["method", "score, %", "loss", "up", "down", "training, s", "n"], rows)
    return made


def bytes_lines(suite: SuiteResult) -> list[str]:
    score, loss = cells(suite, "federated", "score"), cells(suite, "federated", "loss")
    keys = sorted(loss, key=lambda key: -loss[key]["costs"].get("bytes_up_per_client_round", 0.0))
    rows = [[key[-1], shown(score.get(key), True), shown(loss[key], False), *costs(loss[key])] for key in keys]
    made = ["## Quality against bytes", "", facts(suite), ""]
    return made + lines_of(["compression", "score, %", "loss", "up", "down", "training, s"], rows)


def document(zoo: SuiteResult | None, few_bytes: SuiteResult | None) -> str:
    made = [
        "# The zoo, measured",
        "",
        "Made by `python tools/write_zoo.py` from `suite.json` of the suites `zoo` and `bytes`, which",
        "`python tools/run_warm.py recipes/suites/zoo.yaml --into benchmarks/zoo` runs. Mean ± standard deviation over",
        "seeds; score and loss on all clients' test sets together; up and down are bytes per client and round as they",
        "go over the wire; seconds are those of a machine that ran two runs at a time. The runs are short: differences",
        "of a few points between methods are not resolved, and `table.md` of each suite says which are.",
        "",
    ]
    made += zoo_lines(zoo) if zoo is not None else []
    made += bytes_lines(few_bytes) if few_bytes is not None else []
    return "\n".join(made).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--zoo", type=Path, default=ROOT / "benchmarks" / "zoo")
    parser.add_argument("--bytes", type=Path, default=ROOT / "benchmarks" / "bytes")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "zoo.md")
    told = parser.parse_args()
    found = [read_suite(folder) if (folder / "suite.json").is_file() else None for folder in (told.zoo, told.bytes)]
    told.to.write_text(document(*found), encoding="utf-8")
    print(told.to)


if __name__ == "__main__":
    main()
