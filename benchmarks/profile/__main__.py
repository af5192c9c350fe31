"""Profile rounds of training on this machine and draw them: `python -m benchmarks.profile`.

The work is like that of benchmarks/throughput with fedloom's defaults: a random Llama of 10 M parameters, LoRA r 8 on q
and v, three clients side by side, batches of four rows of GSM8K's lengths. Ranges are put around the loss, the backward
pass and the rest of a step; below them are torch's operators, as torch's profiler nests them. What a box has beyond
its children is its own: for the ranges and for autograd's nodes that is Python and the operators' start.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedloom.ops.host import tune_host

THREADS = 1
tune_host(THREADS)

import torch  # noqa: E402
from benchmarks.profile.flame import Node, draw, table  # noqa: E402
from benchmarks.profile.model import VOCABULARY, make_model  # noqa: E402
from torch.profiler import record_function  # noqa: E402

from fedloom.adapters import lora  # noqa: E402
from fedloom.aggregates import mean  # noqa: E402
from fedloom.clients import sgd_client  # noqa: E402
from fedloom.optimizers import adamw  # noqa: E402
from fedloom.rounds import initial_state, run_round  # noqa: E402
from fedloom.runtimes import batched  # noqa: E402
from fedloom.servers import replace  # noqa: E402
from fedloom.types import Algorithm, Client  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
CLIENTS, ROWS, PREAMBLE = 3, 4, 58


def make_clients(steps: int) -> list[Client]:
    """Rows of a preamble that all share, a question and an answer, padded to the longest of their batch."""
    draw = torch.Generator().manual_seed(0)
    clients = []
    for number in range(CLIENTS):
        batches = []
        for _ in range(steps):
            questions = torch.randn(ROWS, generator=draw).mul(0.38).add(4.05).exp().long()
            answers = torch.randn(ROWS, generator=draw).mul(0.43).add(4.5).exp().long()
            lengths = PREAMBLE + questions + answers
            ids = torch.randint(VOCABULARY, (ROWS, int(lengths.max())), generator=draw)
            ids[:, :PREAMBLE] = torch.arange(PREAMBLE)
            place = torch.arange(ids.shape[1])[None]
            real = place < lengths[:, None]
            labels = ids.masked_fill(~real | (place < PREAMBLE + questions[:, None]), -100)
            batches.append({"input_ids": ids * real, "labels": labels, "lengths": lengths})
        clients.append(Client(f"c{number}", batches, 1.0))
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="of each client, in one round")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for flame.svg")
    given = parser.parse_args()
    root = profiled(given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "flame.svg").write_text(draw(root, "One round of training"), encoding="utf-8")
    print(table(root))


def profiled(steps: int) -> Node:
    """The operators of one round, after a round of one step that is not looked at."""
    adapter = lora(make_model(), rank=8, alpha=16.0, targets=["q_proj", "v_proj"])
    update = sgd_client(adamw(5e-3), max_grad_norm=1.0)

    def step(loss: Any, state: Any, batch: Any) -> Any:
        def watched(*given: Any) -> Any:
            with record_function("loss"):
                return loss(*given)

        with record_function("step"):
            return update.step(watched, state, batch)

    algorithm = Algorithm(update._replace(step=step), mean(), replace())
    runtime, state = batched(CLIENTS), initial_state(algorithm, adapter, 0)
    run_round(algorithm, adapter, runtime, state, make_clients(1))
    cohort = make_clients(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, record_function("round"):
        run_round(algorithm, adapter, runtime, state, cohort)
    root = Node("all")
    for event in seen.events():
        path = [event]
        while path[-1].cpu_parent is not None:
            path.append(path[-1].cpu_parent)
        if path[-1].name == "round":
            root.add([one.name for one in reversed(path)], event.cpu_time_total)
    return root.children["round"]


if __name__ == "__main__":
    main()
