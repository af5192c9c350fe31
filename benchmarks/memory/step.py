"""One measurement in a process of its own, as one line of JSON.

    python -m benchmarks.memory.step MODEL cache            steps with and without kept states, in turns
    python -m benchmarks.memory.step MODEL time             steps with and without gradient checkpointing, in turns
    python -m benchmarks.memory.step MODEL memory WAY       the memory of steps, WAY plain or recomputed

MODEL is builtin (1.9 M parameters, its own tasks) or 10M (random weights, rows of GSM8K's lengths).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from fedloom.ops.host import tune_host

tune_host(1)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from benchmarks.profile.model import make_model  # noqa: E402
from benchmarks.throughput import work as shared  # noqa: E402
from torch import Tensor  # noqa: E402

from fedloom.adapters import last_layers, lora, with_activation_cache, with_recompute  # noqa: E402
from fedloom.data.federation import prepare  # noqa: E402
from fedloom.models.load import load_base  # noqa: E402
from fedloom.runtimes.cohort import collate  # noqa: E402
from fedloom.study.build import population_of  # noqa: E402
from fedloom.study.costs import peak_memory_bytes, reset_peak_memory  # noqa: E402
from fedloom.study.recipe import Recipe  # noqa: E402
from fedloom.types import Adapter  # noqa: E402

BATCHES, EPOCHS = 6, 4
ROWS = {"builtin": 16, "10M": 8}  # of one client
KEPT_BYTES = 4 * 10**9  # everything fits


def model_of(name: str) -> Any:
    return load_base("builtin").model if name == "builtin" else make_model()


def batches_of(name: str) -> list[Mapping[str, Tensor]]:
    """One client's, each row once."""
    cpu = torch.device("cpu")
    if name == "builtin":
        recipe = Recipe.model_validate(
            {
                "model": "builtin",
                "data": {"path": "builtin:skills"},
                "local_steps": BATCHES,
                "client": {"per_device_train_batch_size": ROWS[name]},
            }
        )
        federation = prepare(recipe.data, recipe.split, load_base("builtin").tokenizer, recipe.seed)
        found = population_of(federation, recipe, "federated").batches(federation.ids[0], 0)
        return [collate([found[number]], [number], cpu) for number in range(BATCHES)]
    data = shared.make_data(shared.Work(1, ROWS[name], BATCHES, 1, rows=1000, held_out=1))
    rows = np.random.default_rng(0).permutation(1000)[: BATCHES * ROWS[name]].reshape(BATCHES, -1)
    told: list[Mapping[str, Tensor]] = []
    for number, some in enumerate(rows):
        batch = shared.pad(data, some)
        batch["lengths"] = batch.pop("attention_mask").sum(1)
        told.append(collate([batch], [number], cpu))
    return told


def stepper(adapter: Adapter) -> Callable[[Mapping[str, Tensor]], float]:
    """Loss and gradients of one client; the loss."""
    leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in adapter.init(0).items()}

    def step(batch: Mapping[str, Tensor]) -> float:
        loss_C = adapter.loss(leaves, batch)
        torch.autograd.grad(loss_C.sum(), list(leaves.values()))
        return float(loss_C.detach().sum())

    return step


def one_row(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key][:, :1] for key in ("input_ids", "labels")}


def in_turns(name: str, ways: Mapping[str, Adapter], epochs: int) -> dict[str, Any]:
    """CPU seconds of each way over the same batches, by epoch, and how far their losses are apart."""
    batches, steps = batches_of(name), {way: stepper(adapter) for way, adapter in ways.items()}
    for step in steps.values():
        step(one_row(batches[0]))  # what is done once
    seconds: dict[str, list[float]] = {way: [0.0] * epochs for way in ways}
    gap = 0.0
    for epoch in range(epochs):
        for batch in batches:
            losses = []
            for way, step in steps.items():
                began = time.process_time()
                losses.append(step(batch))
                seconds[way][epoch] += time.process_time() - began
            gap = max(gap, max(losses) - min(losses))
    tokens = sum(int(batch["lengths"].sum()) for batch in batches)
    dtype = str(next(iter(ways.values())).model.dtype)
    return {"seconds": seconds, "steps": epochs * len(batches), "loss_gap": gap, "tokens": tokens, "dtype": dtype}


def cache(name: str) -> dict[str, Any]:
    kept: Any = with_activation_cache(last_layers(model_of(name), layers=2), KEPT_BYTES)
    found = in_turns(name, {"plain": last_layers(model_of(name), layers=2), "kept": kept}, EPOCHS)
    frozen = kept.causal.rows.frozen
    return {**found, "layers": len(frozen.below) + 2, "kept_bytes": frozen.bytes, "rows": frozen.made}


def adapted(name: str, way: str) -> Adapter:
    adapter = lora(model_of(name), rank=8, targets="all-linear")
    return with_recompute(adapter) if way == "recomputed" else adapter


def memory(name: str, way: str) -> dict[str, Any]:
    batches, step = batches_of(name), stepper(adapted(name, way))
    step(one_row(batches[0]))
    assert reset_peak_memory(), "this system keeps one peak for the life of a process"
    before = peak_memory_bytes()
    for batch in batches:
        step(batch)
    return {"before": before, "peak": peak_memory_bytes()}


def main(name: str, what: str, way: str = "") -> dict[str, Any]:
    if what == "cache":
        found = cache(name)
    elif what == "time":
        found = in_turns(name, {way: adapted(name, way) for way in ("plain", "recomputed")}, EPOCHS)
    else:
        found = memory(name, way)
    return {"model": name, "what": what, "way": way, **found}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
