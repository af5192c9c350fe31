"""One measurement in a process of its own: prints a line of JSON.

python -m benchmarks.clients.measure population NUMBER COHORT
python -m benchmarks.clients.measure cohort NUMBER COHORT
python -m benchmarks.clients.measure personal NUMBER COHORT ROUNDS memory|disk
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.preparation.measure import memory
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.adapters import lora
from fedloom.aggregates import mean
from fedloom.clients import sgd_client, split_personal
from fedloom.data import split as splitting
from fedloom.data.clients import Clients
from fedloom.data.holdings import PARTS, ClientTable, Held
from fedloom.data.keys import Keys
from fedloom.data.tokens import Tokens
from fedloom.ops.host import tune_host
from fedloom.optimizers import adamw
from fedloom.personal import Store
from fedloom.rounds import Sampling, initial_state, run_round
from fedloom.runtimes import batched
from fedloom.servers import replace
from fedloom.types import Algorithm

ROWS, TOKENS, VOCABULARY = 2, 16, 512


def tokens_of(number: int) -> Tokens:
    """Two rows of 16 tokens for each client."""
    rows = ROWS * number
    ids = np.random.default_rng(0).integers(0, VOCABULARY, rows * TOKENS, dtype=np.int32)
    trained = np.tile(np.arange(TOKENS) >= TOKENS // 2, rows)
    offsets = np.arange(rows + 1, dtype=np.int64) * TOKENS
    targets = np.full(rows, TOKENS // 2, dtype=np.int32)
    digests = np.zeros((rows, 2), dtype=np.uint64)
    return Tokens(ids, trained, offsets, np.arange(rows, dtype=np.int32), targets, digests)


def table_of(number: int, tokens: Tokens) -> ClientTable:
    """A client for each value of a column, a thousand test rows over all: as `prepare` does it."""
    rows = ROWS * number
    keys = Keys((np.arange(rows) % number).astype(np.int32), [f"u{client:07d}" for client in range(number)])
    groups = splitting.by_key(keys, None, "values")
    num_test = splitting.part_counts(min(1000, number), groups.sizes, groups.ids, "test_set_size")
    part = splitting.divided(groups, np.arange(rows), np.zeros_like(num_test), num_test, 0)
    owner = groups.owner(rows)
    held = {name: Held.by_owner(groups.ids, np.where(part == place, owner, -1)) for place, name in enumerate(PARTS)}
    return ClientTable(tokens, held)


def population(number: int, cohort: int) -> dict[str, Any]:
    tokens = tokens_of(number)
    gc.collect()
    before, start = memory("VmRSS"), time.process_time()
    table = table_of(number, tokens)
    prepared = time.process_time()
    clients = Clients(table, 0, ROWS, 0, num_steps=1)
    ids = Sampling(cohort).cohort(clients.ids, 0, 0)
    sampled = time.process_time()
    opened = [clients.open(client, 0) for client in ids]
    done = time.process_time()
    gc.collect()
    return {
        "prepare_cpu_seconds": prepared - start,
        "sample_cpu_seconds": sampled - prepared,
        "open_cpu_seconds": (done - sampled) / len(opened),
        "bytes_per_client": (memory("VmRSS") - before) / number,
    }


def rounds(number: int, cohort: int, num_rounds: int, kind: str) -> dict[str, Any]:
    """Rounds of a model with 64 hidden; personal methods keep B at home, in memory or on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY
    )
    adapter = lora(LlamaForCausalLM(config), rank=8, alpha=16)
    update = sgd_client(adamw(1e-3))
    if kind != "none":
        update = split_personal(update, lambda name: "lora_A" in name)
    algorithm = Algorithm(update, mean(), replace())
    clients = Clients(table_of(number, tokens_of(number)), 0, ROWS, 0, num_steps=1)
    state = initial_state(algorithm, adapter, 0)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "personal.sqlite"
        if kind == "disk":
            state = dataclasses.replace(state, personal=Store(place).cut(0))
        run = batched(8)
        few = [clients.open(client, 0) for client in clients.ids[:16]]
        run_round(algorithm, adapter, run, dataclasses.replace(state, personal={}), few)  # warm
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the table's making left free would hide what rounds take
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most so far begins anew
        each: list[float] = []
        held: list[int] = []
        for round in range(num_rounds):
            start = time.process_time()
            ids = Sampling(cohort).cohort(clients.ids, 0, round)
            state, _ = run_round(algorithm, adapter, run, state, [clients.open(client, round) for client in ids])
            each.append((time.process_time() - start) / cohort)
            gc.collect()
            held.append(memory("VmRSS") - before)
        return {
            "cpu_seconds_per_client": sorted(each)[len(each) // 2],
            "peak_bytes": memory("VmHWM"),
            "more_bytes": memory("VmHWM") - before,
            "held_bytes": held,
            "file_bytes": sum(part.stat().st_size for part in Path(scratch).iterdir()),
            "clients_seen": len(state.personal),
        }


def main(what: str, clients: str, sampled: str, num_rounds: str = "2", kind: str = "none") -> None:
    tune_host(1)
    number, cohort = int(clients), int(sampled)
    found = population(number, cohort) if what == "population" else rounds(number, cohort, int(num_rounds), kind)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
