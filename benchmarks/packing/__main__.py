"""`python -m benchmarks.packing`: a step on padded rows and on fewer and fewer positions, and a bare PEFT step.

All sides take the same batches, one after the other, in one process with one thread; ratios are of the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.throughput import work as shared
from benchmarks.throughput.note import cpu_seconds
from benchmarks.throughput.run import machine
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from fedloom.adapters import lora
from fedloom.models.rows import Rows
from fedloom.ops.host import tune_host
from fedloom.runtimes.cohort import collate

HERE = Path(__file__).parent
SETTINGS = ((1, 4), (3, 1), (3, 4), (1, 1))  # clients in a pass, rows of each
WAYS = {  # way, shared beginnings, narrow last block, clients apart where that pays
    "padded rows": ("padded", False, False, False),
    "packed": ("packed", False, False, False),
    "and the shared beginning once": ("packed", True, False, False),
    "and the last block narrow": ("packed", True, True, False),
    "and clients apart: the default": ("auto", True, True, True),
}
BARE = "bare transformers + PEFT, client by client"


def batches_of(data: shared.Data, clients: int, rows: int, draw: np.random.Generator) -> list[dict[str, torch.Tensor]]:
    return [shared.pad(data, draw.integers(0, len(data.prompts), rows)) for _ in range(clients)]


def cohort(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    with_lengths = [{**b, "lengths": b["attention_mask"].sum(1)} for b in batches]
    for batch in with_lengths:
        del batch["attention_mask"]
    return collate(with_lengths, list(range(len(batches))), torch.device("cpu"))


def sides() -> dict[str, Callable[[list[dict[str, torch.Tensor]]], None]]:
    """Each makes the losses and gradients of the clients' batches."""
    adapter = lora(shared.make_model("10M"), rank=shared.RANK, alpha=shared.ALPHA, targets=list(shared.TARGETS))
    start = adapter.init(0)
    apart = Rows.apart
    config = LoraConfig(
        r=shared.RANK, lora_alpha=int(shared.ALPHA), target_modules=list(shared.TARGETS), task_type="CAUSAL_LM"
    )
    bare = get_peft_model(shared.make_model("10M"), config)
    bare.config.use_cache = False

    def step(way: str) -> Callable[[list[dict[str, torch.Tensor]]], None]:
        def run(batches: list[dict[str, torch.Tensor]]) -> None:
            rows: Any = adapter.causal.rows
            rows.way, rows.shares, rows.narrows, separate = WAYS[way]
            rows.apart = apart.__get__(rows) if separate else lambda labels: False
            leaves = {
                name: leaf.expand(len(batches), *leaf.shape).clone().requires_grad_() for name, leaf in start.items()
            }
            torch.autograd.grad(adapter.loss(leaves, cohort(batches)).sum(), list(leaves.values()))

        return run

    def plain(batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            bare(**batch).loss.backward()
            bare.zero_grad()

    return {BARE: plain, **{way: step(way) for way in WAYS}}


def measured(clients: int, rows: int, steps: int) -> dict[str, Any]:
    data, draw = (
        shared.make_data(shared.Work(clients=1, batch=1, steps=1, rounds=1, rows=1000)),
        np.random.default_rng(0),
    )
    every = sides()
    found: dict[str, Any] = {name: {"cpu_seconds": [], "flops": 0.0} for name in every}
    tokens = padded = 0
    for number in range(steps + 1):  # the first is for what is done once
        batches = batches_of(data, clients, rows, draw)
        for name, step in every.items():
            began = cpu_seconds()
            step(batches)
            if number:
                found[name]["cpu_seconds"].append(cpu_seconds() - began)
            if number == 1:
                with FlopCounterMode(display=False) as counted:
                    step(batches)
                found[name]["flops"] = counted.get_total_flops() / sum(int(b["attention_mask"].sum()) for b in batches)
        if number:
            tokens += sum(int(b["attention_mask"].sum()) for b in batches)
            padded += clients * max(b["input_ids"].shape[1] for b in batches) * rows
    return {"clients": clients, "rows": rows, "tokens": tokens, "padded": padded, "sides": found}


def page(results: dict[str, Any]) -> str:
    lines = ["# A step on padded rows, and on fewer positions", ""]
    lines += [f"{key}: {value}  " for key, value in results["machine"].items()]
    lines += [
        "",
        "Loss and gradients in float32, one thread, the model and data of [throughput](../throughput/README.md). CPU",
        "seconds are sums over the same batches, ratios medians over them. Products are those of matrices, counted by",
        "torch in one batch, per text token; what attention does is not in them.",
    ]
    for one in results["settings"]:
        bare = one["sides"][BARE]
        lines += [
            "",
            f"## {one['clients']} client{'s' * (one['clients'] > 1)} in a pass, {one['rows']} rows each",
            "",
            f"{one['tokens']:,} text tokens; {one['padded']:,} positions with padding.",
            "",
            "| | ms a text token | speed, x bare | MFLOP a text token | products, bare / side |",
            "|---|---|---|---|---|",
        ]
        for name, side in one["sides"].items():
            pairs = zip(bare["cpu_seconds"], side["cpu_seconds"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            lines.append(
                f"| {name} | {1e3 * sum(side['cpu_seconds']) / one['tokens']:.2f} | {ratio:.2f} | "
                f"{side['flops'] / 1e6:.1f} | {bare['flops'] / side['flops']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="batches of each setting")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tune_host(1)
    results: dict[str, Any] = {"machine": machine(), "settings": []}
    for clients, rows in SETTINGS:
        results["settings"].append(measured(clients, rows, max(1, given.steps // rows if rows > 1 else given.steps)))
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (given.out / "RESULTS.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
