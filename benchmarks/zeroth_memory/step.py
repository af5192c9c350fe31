"""One way of training in a process of its own: the peak of memory and the time of its steps, as one line of JSON.

The model is a Llama of 110 M parameters with random weights made on the spot; nothing lies on disk.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from fedloom.ops.host import tune_host

THREADS = 1
tune_host(THREADS)

import torch  # noqa: E402
import transformers  # noqa: E402

from fedloom.adapters import full, lora, seed_space  # noqa: E402
from fedloom.adapters.seed_space import COEFFICIENTS, SeedSpace  # noqa: E402
from fedloom.clients import mezo_client, sgd_client, zo_client  # noqa: E402
from fedloom.optimizers import adamw, sgd  # noqa: E402
from fedloom.study.costs import peak_memory_bytes, reset_peak_memory  # noqa: E402
from fedloom.types import Adapter, ClientUpdate, Site  # noqa: E402

ROWS, TOKENS, STEPS, REPLAYED = 4, 256, 2, 16


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def low_rank(base: Any) -> Adapter:
    return lora(base, rank=8, targets="all-linear")


WAYS: dict[str, tuple[Callable[[Any], Adapter], ClientUpdate | None]] = {
    "inference": (low_rank, None),
    "fedmezo_lora": (low_rank, mezo_client(sgd(1e-4))),
    "fedkseed": (lambda base: seed_space(base, num_seeds=4096, seed=1), zo_client(1e-6)),
    "backprop_lora": (low_rank, sgd_client(adamw(1e-4))),
    "backprop_full_sgd": (full, sgd_client(sgd(1e-4))),
    "backprop_full_adamw": (full, sgd_client(adamw(1e-5))),
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(32_000, (1, ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :, : TOKENS // 2] = -100
    return {"input_ids": ids, "labels": labels}


def main(way: str) -> dict[str, Any]:
    make, update = WAYS[way]
    base = model()
    adapter = make(base)
    params = {name: leaf[None] for name, leaf in adapter.init(0).items()}
    found: dict[str, Any] = {"way": way, "parameters": sum(p.numel() for p in base.parameters())}
    assert reset_peak_memory(), "this system keeps one peak for the life of a process"
    found["before"] = peak_memory_bytes()
    start = time.process_time()
    if update is None:
        for _ in range(STEPS):
            adapter.nll(params, batch())
    else:
        state = update.init(params, {}, [Site(1, 0, "c", ("c",), STEPS)])
        for _ in range(STEPS):
            state = update.step(adapter.loss, state, batch())
    found["cpu_seconds_per_step"] = (time.process_time() - start) / STEPS
    found["peak"] = peak_memory_bytes()
    if isinstance(adapter, SeedSpace):  # what a node pays that has missed so many seeds
        a_K = state.params[COEFFICIENTS][0].clone()
        adapter.go(a_K)
        a_K[:REPLAYED] += 1e-5
        start = time.process_time()
        assert adapter.go(a_K) == REPLAYED
        found["replay_nanoseconds"] = (time.process_time() - start) / REPLAYED / found["parameters"] * 1e9
        found["replay_peak"] = peak_memory_bytes()
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
