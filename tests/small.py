"""Small models, batches and algorithms for tests; all seeded, made on the spot.

Shape suffixes: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from fedloom.adapters import Lora, lora
from fedloom.aggregates import mean
from fedloom.clients import alternate, local_only, mezo_client, sgd_client, split_personal
from fedloom.optimizers import adagrad, adam, adamw, decay, sgd, yogi
from fedloom.servers import replace
from fedloom.types import Algorithm, Client, ClientUpdate, Tree

VOCAB = 64


def llama(layers: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # so that a random model has opinions, and gradients are not tiny
    )
    torch.manual_seed(7)
    return transformers.LlamaForCausalLM(config).to(dtype)


def small_lora(rank: int = 4, **settings: Any) -> Lora:
    return lora(llama(), rank=rank, alpha=8.0, **settings)


def batch(seed: int, rows: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(VOCAB, (rows, tokens), generator=draw)
    labels_BT = ids_BT.clone()
    labels_BT[:, :3] = -100
    lengths_B = torch.full((rows,), tokens)
    if seed % 2:  # ragged
        labels_BT[0, 8:], ids_BT[0, 8:], lengths_B[0] = -100, 0, 8
    return {"input_ids": ids_BT, "labels": labels_BT, "lengths": lengths_B}


def clients(num: int = 5, ranks: Sequence[int] | None = None) -> list[Client]:
    """Clients with different numbers of steps, lengths, rows and weights."""
    return [
        Client(
            f"c{i}",
            tuple(batch(100 * i + j, rows=1 + (i + j) % 3, tokens=10 + i % 3) for j in range(1 + (i * 2) % 4)),
            weight=float(1 + i),
            rank=ranks[i] if ranks else None,
        )
        for i in range(num)
    ]


def gap(a: Tree, b: Tree) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# every client update of the package, with settings in which all that it has is at work; a line covers a new one
CLIENT_UPDATES: dict[str, Callable[[], ClientUpdate]] = {
    "sgd": lambda: sgd_client(sgd(0.5)),
    "momentum": lambda: sgd_client(sgd(0.1, momentum=0.9)),
    "adamw": lambda: sgd_client(adamw(1e-2, weight_decay=0.1)),
    "adam": lambda: sgd_client(adam(1e-2)),
    "yogi": lambda: sgd_client(yogi(1e-2)),
    "adagrad": lambda: sgd_client(adagrad(1e-2)),
    "clip": lambda: sgd_client(sgd(0.5), max_grad_norm=0.01),
    "accumulation": lambda: sgd_client(sgd(0.5), accumulation_steps=2),
    "schedule": lambda: sgd_client(sgd(0.5), schedule=decay("cosine", 4, warmup_rounds=1)),
    "fedprox": lambda: sgd_client(sgd(0.1, momentum=0.9), prox_mu=0.5),
    "only_b": lambda: sgd_client(sgd(0.1), trainable=lambda name: "lora_B" in name),
    "mezo": lambda: mezo_client(sgd(0.02, momentum=0.5), schedule=decay("cosine", 4)),
    "mezo_only_b": lambda: mezo_client(adam(1e-2), accumulation_steps=2, trainable=lambda name: "lora_B" in name),
    "local_only": lambda: local_only(sgd_client(adamw(1e-2))),
    "fedsa_lora": lambda: split_personal(sgd_client(adamw(1e-2)), lambda name: "lora_A" in name),
    "rolora": lambda: alternate(
        *(sgd_client(sgd(0.5), trainable=lambda name, factor=factor: factor in name) for factor in ("lora_B", "lora_A"))
    ),
}


def fedavg(update: ClientUpdate | None = None, **parts: Any) -> Algorithm:
    made = {"client": update or sgd_client(sgd(0.5)), "aggregate": mean(), "server": replace(), **parts}
    return Algorithm(**made)
