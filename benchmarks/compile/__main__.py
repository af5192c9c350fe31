"""Gradients of a cohort with and without compiled decoder blocks: `python -m benchmarks.compile`.

One process, one thread: the model as it is, then its blocks compiled for any length, on new lengths at every step. CPU
seconds, those of the compiler's processes with them. One line of JSON for each width goes to results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path
from typing import Any

from fedloom.ops.host import tune_host

THREADS = 1
tune_host(THREADS)

import torch  # noqa: E402
from benchmarks.profile.model import VOCABULARY, make_model  # noqa: E402

from fedloom.adapters import lora  # noqa: E402

LENGTHS = (200, 231, 187, 212, 243)
OUT = Path(__file__).parent / "results.json"


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def gradients(adapter: Any, clients: int, length: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tree = {name: (leaf.expand(clients, *leaf.shape) + 0.01).requires_grad_() for name, leaf in adapter.init(0).items()}
    ids = torch.randint(VOCABULARY, (clients, 1, length), generator=draw)
    labels = ids.clone()
    labels[:, :, : length // 2] = -100
    loss_C = adapter.loss(tree, {"input_ids": ids, "labels": labels, "lengths": torch.full((clients, 1), length)})
    return list(torch.autograd.grad(loss_C.sum(), list(tree.values())))


def seconds_per_step(adapter: Any, clients: int) -> float:
    before = cpu_seconds()
    for length in LENGTHS:
        gradients(adapter, clients, length)
    return (cpu_seconds() - before) / len(LENGTHS)


def measured(clients: int) -> dict[str, Any]:
    model = make_model()
    adapter = lora(model, rank=8, alpha=16.0, targets=["q_proj", "v_proj"])
    gradients(adapter, clients, LENGTHS[0])
    eager, wanted = seconds_per_step(adapter, clients), gradients(adapter, clients, 219)
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True)
    before = cpu_seconds()
    gradients(adapter, clients, 212)
    first = cpu_seconds() - before
    gradients(adapter, clients, 231)
    compiled, found = seconds_per_step(adapter, clients), gradients(adapter, clients, 219)
    torch._dynamo.reset()
    saved = eager - compiled
    return {
        "clients": clients,
        "eager_seconds": eager,
        "compiled_seconds": compiled,
        "speed_up": eager / compiled,
        "first_step_seconds": first,
        "break_even_steps": (first - compiled) / saved if saved > 0 else None,
        "gradients_apart": max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    runs = []
    for clients in given.clients:
        runs.append(measured(clients))
        print(json.dumps(runs[-1]), flush=True)
        given.out.write_text(json.dumps({"torch": torch.__version__, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
