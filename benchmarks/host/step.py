"""A few training steps under one setting of the process, in a process of its own; one line of JSON.

The step is that of a default run of benchmarks/throughput: its 10 M model, LoRA r 8 on q and v, AdamW, four clients in
a pass with a row each, a new length at every step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

import torch
from benchmarks.profile.model import VOCABULARY, make_model

from fedloom.adapters import lora
from fedloom.clients import sgd_client
from fedloom.ops.host import keep_freed_memory
from fedloom.optimizers import adamw
from fedloom.tree import stack
from fedloom.types import Site

CLIENTS = 4
LENGTHS = (212, 184, 263, 231, 197, 248, 221, 174, 239, 206, 255, 190)  # the first is the warm-up
PROMPT = 120


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--glibc", action="store_true", help="leave glibc as it is")
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.glibc:
        keep_freed_memory()
    model = make_model()
    adapter = lora(model, rank=8, alpha=16.0, targets=["q_proj", "v_proj"])
    update = sgd_client(adamw(5e-3))
    ids = tuple(f"c{number}" for number in range(CLIENTS))
    sites = [Site(0, 0, name, ids, given.steps + 1) for name in ids]
    state = update.init(stack([adapter.init(0)] * CLIENTS), {}, sites)
    draw = torch.Generator().manual_seed(0)
    tokens = 0
    for step in range(given.steps + 1):
        if step == 1:  # what is done once is no step
            before, began, tokens = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0
        length = LENGTHS[step % len(LENGTHS)]
        batch = {"input_ids": torch.randint(VOCABULARY, (CLIENTS, 1, length), generator=draw)}
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :, :PROMPT] = -100
        batch["lengths"] = torch.full((CLIENTS, 1), length)
        state = update.step(adapter.loss, state, batch)
        tokens += batch["input_ids"].numel()
    after, ended = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    print(
        json.dumps(
            {
                "tokens": tokens,
                "wall_seconds": ended - began,
                "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "system_seconds": after.ru_stime - before.ru_stime,
                "page_faults": after.ru_minflt - before.ru_minflt,
                "peak_memory_bytes": 1024 * after.ru_maxrss,
                "load": os.getloadavg()[0],
                "dtype": str(model.dtype).removeprefix("torch."),
            }
        )
    )


if __name__ == "__main__":
    main()
