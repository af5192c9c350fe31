"""The methods by name: what a `method:` of a recipe stands for, as literal tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["METHODS", "METHOD_LINES", "Method"]

Method = Literal[
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "diloco",
    "scaffold",
    "fednova",
    "fedexp",
    "qfedavg",
    "fedbuff",
    "ffa_lora",
    "rolora",
    "fedsa_lora",
    "flora",
    "flex_lora",
    "fedex_lora",
    "het_lora",
    "fedmezo",
    "fedkseed",
    "fedkseed_pro",
]

# What a method's name stands for. An explicit key of a slot replaces what stands here; an explicit `kind` that
# differs from the method's takes over its whole block.
METHODS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fedavg": {"client": {"kind": "sgd"}, "aggregate": {"kind": "mean"}, "server": {"kind": "replace"}},
    "fedprox": {
        "client": {"kind": "sgd", "prox_mu": 0.01},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
    },
    "fedavgm": {
        "client": {"kind": "sgd"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "optimize", "server_optim": "momentum"},
    },
    "fedadam": {
        "client": {"kind": "sgd"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "optimize", "server_optim": "adam"},
    },
    "fedyogi": {
        "client": {"kind": "sgd"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "optimize", "server_optim": "yogi"},
    },
    "fedadagrad": {
        "client": {"kind": "sgd"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "optimize", "server_optim": "adagrad"},
    },
    "diloco": {
        "client": {"kind": "sgd", "optim": "adamw", "optimizer_state": "kept"},
        "aggregate": {"kind": "mean", "weighting": "uniform"},
        "server": {"kind": "optimize", "server_optim": "nesterov"},
    },
    "scaffold": {
        "client": {"kind": "scaffold"},
        "aggregate": {"kind": "mean", "weighting": "uniform"},
        "server": {"kind": "replace"},
    },
    "fednova": {"client": {"kind": "sgd"}, "aggregate": {"kind": "fednova"}, "server": {"kind": "replace"}},
    "fedexp": {
        "client": {"kind": "sgd"},
        "aggregate": {"kind": "fedexp", "weighting": "uniform"},
        "server": {"kind": "replace"},
    },
    "qfedavg": {
        "client": {"kind": "sgd", "optim": "sgd"},
        "aggregate": {"kind": "mean", "weighting": "loss"},
        "server": {"kind": "replace"},
    },
    "fedbuff": {
        "client": {"kind": "sgd"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
        "runtime": {"kind": "buffered"},
    },
    "ffa_lora": {
        "client": {"kind": "sgd", "trainable": "lora_B"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
    },
    "rolora": {
        "client": {"kind": "sgd", "trainable": "alternate"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
    },
    "fedsa_lora": {
        "client": {"kind": "sgd", "shared": "lora_A"},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
    },
    **{
        name: {"client": {"kind": "sgd"}, "aggregate": {"kind": name}, "server": {"kind": "replace"}}
        for name in ("flora", "flex_lora", "fedex_lora", "het_lora")
    },
    "fedmezo": {
        "client": {"kind": "mezo", "optim": "sgd", "learning_rate": 1e-4},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
    },
    "fedkseed": {
        "adapter": {"kind": "seed_space"},
        "client": {"kind": "zo", "optim": "sgd", "learning_rate": 1e-6},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
        "compress": {"up": ["nonzero", "zstd"], "down": ["zstd"]},  # lossless
    },
    "fedkseed_pro": {
        "adapter": {"kind": "seed_space", "num_seeds": 1024, "seed_sampling": "magnitude"},
        "client": {"kind": "zo", "optim": "sgd", "learning_rate": 1e-6},
        "aggregate": {"kind": "mean"},
        "server": {"kind": "replace"},
        "compress": {"up": ["nonzero", "zstd"], "down": ["zstd"]},  # lossless
    },
}

METHOD_LINES: Mapping[str, str] = {
    "fedavg": "mean of the clients' adapters, weighed by their rows (McMahan et al. 2017)",
    "fedprox": "fedavg with a pull towards the round's start, for skewed clients (Li et al. 2020)",
    "fedavgm": "fedavg with momentum at the server (Hsu et al. 2019)",
    "fedadam": "Adam at the server (Reddi et al. 2021)",
    "fedyogi": "Yogi at the server (Reddi et al. 2021)",
    "fedadagrad": "Adagrad at the server (Reddi et al. 2021)",
    "diloco": "Nesterov momentum at the server, AdamW that remembers at the clients (Douillard et al. 2023)",
    "scaffold": "control variates against the drift of skewed clients, twice the bytes (Karimireddy et al. 2020)",
    "fednova": "updates are divided by the local work behind them, for ragged steps (Wang et al. 2020)",
    "fedexp": "the server steps further where clients' changes disagree, no rate to tune (Jhunjhunwala et al. 2023)",
    "qfedavg": "clients with a higher loss weigh more, for fairness (Li et al. 2020, q-FFL)",
    "fedbuff": "asynchronous: nobody waits for the slowest, late uploads count less (Nguyen et al. 2022)",
    "ffa_lora": "A stays at its first values, B is averaged: exact, half the bytes (Sun et al. 2024)",
    "rolora": "B and A in turn, round by round: exact, half the bytes (Chen et al. 2024)",
    "fedsa_lora": "A is averaged, B stays with its client (Guo et al. 2025)",
    "flora": "the clients' products are stacked and merged into the base: exact, any ranks (Wang et al. 2024)",
    "flex_lora": "the mean of the products, cut to the rank by an SVD; clients of any rank (Bai et al. 2024)",
    "fedex_lora": "fedavg, and what averaging factors misses goes into the base: exact (Singhal et al. 2025)",
    "het_lora": "clients of different ranks, zero padded, weighed by what they learnt (Cho et al. 2024)",
    "fedmezo": "no gradients: two forward passes a step, memory of inference, any adapter (Ling et al. 2024)",
    "fedkseed": "no gradients, all weights tuned: what travels is a number for each of 4,096 seeds (Qin et al. 2024)",
    "fedkseed_pro": "fedkseed with 1,024 seeds, drawn more often where the loss is steep (Qin et al. 2024)",
}
