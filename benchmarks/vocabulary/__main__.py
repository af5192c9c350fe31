"""Memory and time of loss and gradient by the size of the vocabulary: logits whole, in chunks, and Hugging Face's loss.

python -m benchmarks.vocabulary [--repeats 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import child, middle, write

SIZES = (32_000, 128_000)
WAYS = {
    "hf": "Hugging Face's causal loss",
    "whole": "logits whole (`nll_plain`)",
    "chunked": "in chunks (`nll_chunked`)",
}


def tables(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "1,024 labelled positions, hidden size 256, float32, one thread; each way in processes of its own, medians of "
        f"{len(runs) // len(SIZES) // len(WAYS)}.",
        "Memory is what the process needs beyond the model and the hidden states.",
        "",
        "| vocabulary | way | MiB more | x in chunks | CPU seconds | x in chunks | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        few = {key: middle(runs, key, vocabulary=size, way="chunked") for key in ("more_bytes", "cpu_seconds")}
        for way, said in WAYS.items():
            own = {key: middle(runs, key, vocabulary=size, way=way) for key in (*few, "loss")}
            lines.append(
                f"| {size:,} | {said} | {own['more_bytes'] / 2**20:,.0f} | {own['more_bytes'] / few['more_bytes']:.1f} "
                f"| {own['cpu_seconds']:.2f} | {own['cpu_seconds'] / few['cpu_seconds']:.2f} | {own['loss']:.5f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocabulary", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    runs = [
        {"vocabulary": size, "way": way, **child("benchmarks.vocabulary.measure", size, way)}
        for _ in range(repeats)
        for size in SIZES
        for way in WAYS
    ]
    write(Path(__file__).parent, "Vocabulary: loss and gradient", runs, tables)


if __name__ == "__main__":
    main()
