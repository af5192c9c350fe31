"""One way of writing the same answers, in a process of its own; prints one line of JSON.

C clients, each with an adapter of its own and as many prompts: greedy answers of given lengths, so that the work is the
same for all ways and rows end at different times. What is counted is the writing, not the start of the process.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from typing import Any

import torch

from fedloom.adapters import lora
from fedloom.evaluate import decoding
from fedloom.evaluate.decoding import Opening
from fedloom.evaluate.generate import _binder
from fedloom.models.load import load_base, random_base
from fedloom.ops.host import keep_freed_memory
from fedloom.tree import stack

CLIENTS = 8
PROMPTS = {"builtin": 16, "10m": 8}  # of each client
BEGINNING = 24  # tokens that all prompts have before their own: what an instruction's layout puts there
LONGEST = 96  # tokens of an answer


def model_of(name: str) -> Any:
    if name == "builtin":
        return load_base("builtin").model
    sizes = {
        "hidden_size": 320,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
        "vocab_size": 4096,
    }
    return random_base(max_positions=1024, **sizes).model  # type: ignore[arg-type]


def work(vocabulary: int, prompts: int) -> list[list[Opening]]:
    """Prompts of about 30 to 120 tokens; answers of 1 to 96, about 28 on average."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(8, vocabulary, (BEGINNING,), generator=draw).tolist()
    asked = []
    for _ in range(CLIENTS):
        own = []
        for _ in range(prompts):
            more = int(torch.empty(()).log_normal_(3.3, 0.6, generator=draw).clamp(6, 96))
            room = int(torch.empty(()).log_normal_(3.0, 0.8, generator=draw).clamp(1, LONGEST))
            own.append(
                Opening(
                    [
                        *first,
                        *torch.randint(8, vocabulary, (more,), generator=draw).tolist(),
                    ],
                    room,
                )
            )
        asked.append(own)
    return asked


def by_transformers(model: Any, some: list[Opening]) -> list[list[int]]:
    """One batch, padded on the left, as long as its longest answer; each row stops where it should."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    longest = max(len(one.ids) for one in some)
    ids_NT = torch.zeros(len(some), longest, dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    for n, one in enumerate(some):
        ids_NT[n, longest - len(one.ids) :] = torch.tensor(one.ids)
        mask_NT[n, longest - len(one.ids) :] = 1
    rooms = torch.tensor([one.room for one in some])

    class Done(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            return rooms <= input_ids.shape[1] - longest

    model.generation_config = GenerationConfig()
    settings = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, use_cache=True, pad_token_id=0)
    criteria = StoppingCriteriaList([Done()])
    written = model.generate(
        input_ids=ids_NT,
        attention_mask=mask_NT,
        generation_config=settings,
        stopping_criteria=criteria,
    )[:, longest:].tolist()
    return [row[: one.room] for row, one in zip(written, some, strict=True)]


def write(way: str, bind: Any, asked: list[list[Opening]]) -> list[list[list[int]]]:
    if way == "row":
        found = []
        for c, own in enumerate(asked):
            with bind([c]) as model:
                found.append([by_transformers(model, [one])[0] for one in own])
        return found
    if way == "adapter":
        found = []
        for c, own in enumerate(asked):
            with bind([c]) as model:
                found.append(by_transformers(model, own))
        return found
    if way == "cohort":
        with bind(range(len(asked))) as model:
            rows = by_transformers(model, [one for own in asked for one in own])
        each = len(asked[0])
        return [rows[c * each : (c + 1) * each] for c in range(len(asked))]
    return decoding.write(
        bind,
        asked,
        slots=int(way.removeprefix("ours_")),
        stops=(),
        texts=lambda rows: [],
    )


def main() -> None:
    name, way = sys.argv[1:]
    torch.set_num_threads(1)
    keep_freed_memory()
    model = model_of(name)
    adapter = lora(model, rank=8)
    trees = []
    for seed in range(CLIENTS):
        draw = torch.Generator().manual_seed(seed)
        trees.append({k: v + 0.02 * torch.randn(v.shape, generator=draw) for k, v in adapter.init(seed).items()})
    asked = work(int(model.config.vocab_size), PROMPTS[name])
    bind = _binder(adapter, stack(trees))
    with torch.no_grad():
        write(
            way,
            bind,
            [[own[0]._replace(room=2)] for own in asked] if way != "cohort" else asked[:1],
        )  # warm
        cpu, wall = time.process_time(), time.perf_counter()
        found = write(way, bind, asked)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(
        json.dumps(
            {
                "model": name,
                "way": way,
                "parameters": sum(leaf.numel() for leaf in model.parameters()),
                "tokens": sum(one.room for own in asked for one in own),
                "longest": max(one.room for own in asked for one in own),
                "prompt_tokens": sum(len(one.ids) for own in asked for one in own),
                "cpu_seconds": cpu,
                "wall_seconds": wall,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "rows": [hashlib.sha256(str(ids).encode()).hexdigest()[:8] for own in found for ids in own],
            }
        )
    )


if __name__ == "__main__":
    main()
