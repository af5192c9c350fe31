"""Which settings each kind, optimiser and compression has, and what they are when nothing is said: literal tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Arm = Literal["base", "local", "federated", "global"]
SplitKind = Literal["iid", "dirichlet", "shards", "quantity_skew", "by_category", "by_column", "files", "natural"]
ClientOptim = Literal["adamw", "adam", "sgd", "momentum", "yogi", "adagrad"]
ServerOptim = Literal["momentum", "nesterov", "adam", "yogi", "adagrad"]
RuntimeKind = Literal["batched", "sequential", "loopback", "buffered"]
ClientSpeeds = Literal["steps", "uniform", "lognormal"]
AdapterKind = Literal[
    "lora",
    "dora",
    "ia3",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "full",
    "last_layers",
    "bottleneck",
    "seed_space",
]
RankMix = Literal["same", "heavy_tail", "normal", "uniform"]
Compression = Literal["nonzero", "top_k", "random_k", "low_rank", "float16", "bfloat16", "quantize", "zstd"]
DownCompression = Literal["float16", "bfloat16", "quantize", "zstd"]
LossType = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"]
TrackerName = Literal["trackio", "tensorboard", "mlflow", "wandb"]

WITH_FACTORS = ("lora", "dora")  # kinds with factors A and B, for the methods that treat these one by one

# The settings each kind of adapter has, with what they are when nothing is said; None is settled by the model.
_LORA_DEFAULTS: Mapping[str, Any] = {
    "lora_r": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "lora_target_modules": "auto",
    "client_ranks": "same",
    "use_rslora": False,
    "rank_pattern": None,
    "alpha_pattern": None,
    "bias": "none",
}
ADAPTER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lora": _LORA_DEFAULTS,
    "dora": _LORA_DEFAULTS,
    "ia3": {"ia3_target_modules": "auto", "ia3_feedforward_modules": "auto"},
    "prompt_tuning": {"num_virtual_tokens": 20, "prompt_tuning_init_text": None},
    "p_tuning": {"num_virtual_tokens": 20, "encoder_reparameterization_type": "mlp", "encoder_hidden_size": None},
    "prefix_tuning": {"num_virtual_tokens": 20},
    "full": {},
    "last_layers": {"trainable_layers": 2, "trainable_extra": "none"},
    "bottleneck": {
        "bottleneck_size": None,
        "reduction_factor": 16.0,
        "non_linearity": "relu",
        "bottleneck_after": "attention_and_mlp",
    },
    "seed_space": {"num_seeds": 4096, "seed_sampling": "uniform", "direction_seed": None},
}

# Learning rates of kinds whose usual one is not that of small new parts (client.learning_rate's own default).
ADAPTER_LEARNING_RATES: Mapping[str, float] = {"full": 2e-5, "last_layers": 2e-5, "ia3": 3e-3}
# The settings each loss on pairs has (data.type: preference).
DPO_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.0},
    "sigmoid_norm": {"beta": 2.0, "label_smoothing": 0.0},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.1},
}

# The settings each runtime has besides those that all have; None is settled by the cohort.
RUNTIME_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "batched": {"clients_per_batch": "auto"},
    "buffered": {"clients_per_batch": "auto", "buffer_size": None, "staleness_exponent": 0.5},
}

# The settings each way of compressing has, in the order in which messages go through them.
COMPRESS_ORDER = (("nonzero", "top_k", "random_k", "low_rank"), ("float16", "bfloat16", "quantize"), ("zstd",))
COMPRESS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "top_k": {"share": 0.1},
    "random_k": {"share": 0.1},
    "low_rank": {"low_rank_r": 4},
    "quantize": {"bits": 8, "block_size": None},
}
LOSSY = tuple(kind for kinds in COMPRESS_ORDER[:2] for kind in kinds if kind != "nonzero")

# Local algorithms that need no gradient (two losses a step), with their own settings.
ZEROTH_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"mezo": {"zo_eps": 1e-3}, "zo": {"zo_eps": 5e-4}}
# What a recipe says of steps along gradients; its numbers mean nothing to steps along random directions.
GRADIENT_SETTINGS = (
    "client.kind", "client.optim", "client.learning_rate", "client.max_grad_norm", "client.momentum",
    "client.weight_decay", "client.adam_beta1", "client.adam_beta2", "client.adam_epsilon", "client.prox_mu",
)  # fmt: skip

# The settings each optimiser has, with what they are when nothing is said. A setting that is not in an optimiser's
# row has no effect on it and is refused.
CLIENT_OPTIM_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "adamw": {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    "adam": {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    "yogi": {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-3},
    "adagrad": {"adam_epsilon": 1e-10},
    "momentum": {"momentum": 0.9, "weight_decay": 0.0},
    "sgd": {"weight_decay": 0.0},
}

# Reddi et al., Adaptive Federated Optimization: beta1 0.9, beta2 0.99, tau 1e-3. Their step sizes are tuned per task;
# these are sized for LoRA factors, whose entries are about 1e-2.
SERVER_OPTIM_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "momentum": {"server_learning_rate": 1.0, "server_momentum": 0.9},
    "nesterov": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "adam": {"server_learning_rate": 1e-2, "server_beta1": 0.9, "server_beta2": 0.99, "server_tau": 1e-3},
    "yogi": {"server_learning_rate": 1e-2, "server_beta1": 0.9, "server_beta2": 0.99, "server_tau": 1e-3},
    "adagrad": {"server_learning_rate": 1e-2, "server_beta1": 0.0, "server_tau": 1e-3},
}

# Client optimisers whose steps are in proportion to gradients, so that moves over the learning rate stand for one.
LINEAR_OPTIMS = ("sgd", "momentum")
# The settings each rule of aggregation has, with what they are when nothing is said.
AGGREGATE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "fedexp": {"exp_epsilon": 1e-3},
    "het_lora": {"norm_weighted": True},
}
# Rules that take a sum of updates, whatever the update is of: they need no LoRA factors, and not both of them.
SUMS = ("mean", "fednova", "fedexp")

# What a checkpoint may be the best by, measured on the validation rows, and whether more is better. A benchmark task's
# metric (TASK/METRIC) may stand in their place; there more is better.
BEST_BY: Mapping[str, bool] = {
    "loss": False,
    "loss_plain_mean": False,
    "loss_decile": False,
    "score": True,
    "score_plain_mean": True,
    "score_decile": True,
    "preference_accuracy": True,
}

COLUMN_NAMES = (
    "instruction", "input", "output", "category", "messages", "prompt", "completion", "text", "chosen", "rejected",
)  # fmt: skip
DEFAULT_CLIENTS = 4  # of a split that cannot tell by itself (iid, dirichlet, shards, quantity_skew)
DEFAULT_SHARDS = 2
DEFAULT_VAL_SHARE = 0.05
DEFAULT_TEST_SHARE = 0.1
