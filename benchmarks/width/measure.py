"""One model and batch size at every width, in one process: prints a line of JSON.

python -m benchmarks.width.measure MODEL BATCH STEPS REPEATS
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.throughput import work as shared

from fedloom.data.holdings import PARTS, ClientTable, Held, Names
from fedloom.models.load import load_base
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched
from fedloom.study.build import algorithm_of, population_of, width_of
from fedloom.study.costs import peak_memory_bytes, reset_peak_memory
from fedloom.study.passes import ArmWork, arm_work
from fedloom.study.probe import Probe, faster_width
from fedloom.study.recipe import Recipe
from fedloom.study.session import Session, open_session

CLIENTS = 32
WIDTHS = (1, 2, 4, 8, 16, 32)


def recipe_of(model: str, batch: int, steps: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": model,
            "data": {"path": "builtin:skills"},
            "split": {"kind": "iid", "clients": CLIENTS},
            "adapter": {"lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]},
            "rounds": 1,
            "local_steps": steps,
            "client": {"per_device_train_batch_size": batch, "learning_rate": 1e-3},
            "arms": ["federated"],
            "runtime": {"threads": 1},
        }
    )


def session_of(model: str, batch: int, steps: int, scratch: Path) -> Session:
    """What a run opens; the 10 M model has its clients' rows from the throughput benchmark, 32 each."""
    if model == "builtin":
        return open_session(recipe_of(model, batch, steps))
    made = shared.make_model(model)
    made.save_pretrained(scratch / "model")
    load_base("builtin").tokenizer.save_pretrained(scratch / "model")  # for its padding: rows are made of tokens
    session = open_session(recipe_of(str(scratch / "model"), batch, steps))
    work = shared.Work(CLIENTS, batch, steps, 1, rows=32 * CLIENTS, model=model)
    own = shared.federated_examples(work, shared.make_data(work))
    tokens = next(iter(own.values())).tokens
    owner = np.full(len(tokens), -1)
    for place, examples in enumerate(own.values()):
        owner[examples.numbers] = place
    nobody = np.full(len(tokens), -1)
    ids = Names(list(own))
    held = {part: Held.by_owner(ids, owner if part == "train" else nobody) for part in PARTS}
    return replace(session, federation=replace(session.federation, clients=ClientTable(tokens, held)))


def measured(model: str, batch: int, steps: int, repeats: int, scratch: Path) -> dict[str, Any]:
    session = session_of(model, batch, steps, scratch)
    recipe, adapter = session.recipe, session.adapter
    algorithm = algorithm_of(recipe)
    state = initial_state(algorithm, adapter, recipe.seed)
    population = population_of(session.federation, recipe, "federated")

    def trained(width: int, clients: int = CLIENTS) -> tuple[float, Mapping[str, float]]:
        cohort = [population.open(client, 0) for client in population.ids[:clients]]
        start = time.process_time()
        _, report = run_round(algorithm, adapter, batched(width), state, cohort)
        return time.process_time() - start, report.metrics

    trained(2, clients=2)  # what is done once
    found: list[dict[str, Any]] = [{"width": width, "cpu_seconds": []} for width in WIDTHS]
    for repetition in range(repeats):
        for one in found if repetition % 2 == 0 else reversed(found):
            if repetition == 0:  # the narrowest first, so a peak is that of the width
                reset_peak_memory()
            seconds, metrics = trained(one["width"])
            one["cpu_seconds"].append(seconds)
            if repetition == 0:
                one |= {"peak_bytes": peak_memory_bytes(), "padded_tokens": metrics["padded_tokens"]}

    def works(width: int) -> Mapping[str, ArmWork]:
        return {"federated": arm_work(recipe, session.federation, "federated", width)}

    fastest, took = faster_width(Probe(session, None), works, CLIENTS, "cpu")
    return {
        "model": model,
        "batch": batch,
        "steps": steps,
        "repeats": repeats,
        "dtype": str(session.base.dtype).removeprefix("torch."),
        "tokens": int(metrics["tokens"]),
        "widths": found,
        "auto": width_of(recipe, session.federation, session.base),
        "fastest": fastest,
        "fastest_tried": {width: cost.cpu for width, cost in took.items()},
    }


if __name__ == "__main__":
    model, batch, steps, repeats = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measured(model, int(batch), int(steps), int(repeats), Path(place))))
