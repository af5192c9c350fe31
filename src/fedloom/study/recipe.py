"""The recipe: what a run is asked to do, as validated values. Imports neither torch nor transformers.

The models below are the only list of keys: the command line, the JSON schema and docs/recipe.md are made from them.
A value that depends on others (the momentum of an optimiser that has one) is `None` until `fill` settles it, so a
resolved recipe says everything it uses and nothing it does not; a setting that would have no effect is an error.

Reading a recipe file, with every objection at once, is `fedloom.study.load`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from fedloom.data.catalog import CATALOG, LOCAL, NamedSet
from fedloom.errors import suggest
from fedloom.evaluate.tasks import TASKS
from fedloom.evaluate.tasks.sets import SETS, names_tasks

__all__ = [
    "ADAPTER_DEFAULTS",
    "BEST_BY",
    "BLOCKS",
    "CLIENT_OPTIM_DEFAULTS",
    "METHODS",
    "METHOD_LINES",
    "SERVER_OPTIM_DEFAULTS",
    "AdapterRecipe",
    "AggregateRecipe",
    "CheckpointRecipe",
    "ClientRecipe",
    "CompressRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "Objection",
    "Recipe",
    "RuntimeRecipe",
    "ServerRecipe",
    "SplitRecipe",
    "fill",
    "json_schema",
    "load_recipe",
    "objections",
    "resolved_json",
    "resolved_yaml",
    "yaml_value",
]

Arm = Literal["base", "local", "federated", "global"]
SplitKind = Literal["iid", "dirichlet", "shards", "quantity_skew", "by_category", "by_column", "files", "natural"]
ClientOptim = Literal["adamw", "adam", "sgd", "momentum", "yogi", "adagrad"]
ServerOptim = Literal["momentum", "adam", "yogi", "adagrad"]
AdapterKind = Literal["lora", "prompt_tuning", "p_tuning", "prefix_tuning"]
RankMix = Literal["same", "heavy_tail", "normal", "uniform"]
Compression = Literal["top_k", "random_k", "low_rank", "float16", "bfloat16", "quantize", "zstd"]
DownCompression = Literal["float16", "bfloat16", "quantize", "zstd"]
TrackerName = Literal["trackio", "tensorboard", "mlflow", "wandb"]
Method = Literal[
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "ffa_lora",
    "rolora",
    "fedsa_lora",
    "flora",
    "flex_lora",
    "fedex_lora",
    "het_lora",
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
}

METHOD_LINES: Mapping[str, str] = {
    "fedavg": "mean of the clients' adapters, weighed by their rows (McMahan et al. 2017)",
    "fedprox": "fedavg with a pull towards the round's start, for skewed clients (Li et al. 2020)",
    "fedavgm": "fedavg with momentum at the server (Hsu et al. 2019)",
    "fedadam": "Adam at the server (Reddi et al. 2021)",
    "fedyogi": "Yogi at the server (Reddi et al. 2021)",
    "fedadagrad": "Adagrad at the server (Reddi et al. 2021)",
    "ffa_lora": "A stays at its first values, B is averaged: exact, half the bytes (Sun et al. 2024)",
    "rolora": "B and A in turn, round by round: exact, half the bytes (Chen et al. 2024)",
    "fedsa_lora": "A is averaged, B stays with its client (Guo et al. 2025)",
    "flora": "the clients' products are stacked and merged into the base: exact, any ranks (Wang et al. 2024)",
    "flex_lora": "the mean of the products, cut to the rank by an SVD; clients of any rank (Bai et al. 2024)",
    "fedex_lora": "fedavg, and what averaging factors misses goes into the base: exact (Singhal et al. 2025)",
    "het_lora": "clients of different ranks, zero padded, weighed by what they learnt (Cho et al. 2024)",
}

# The settings each kind of adapter has, with what they are when nothing is said; None is settled by the model.
ADAPTER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lora": {
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "lora_target_modules": "auto",
        "client_ranks": "same",
    },
    "prompt_tuning": {"num_virtual_tokens": 20, "prompt_tuning_init_text": None},
    "p_tuning": {"num_virtual_tokens": 20, "encoder_reparameterization_type": "mlp", "encoder_hidden_size": None},
    "prefix_tuning": {"num_virtual_tokens": 20},
}

# The settings each way of compressing has, in the order in which messages go through them.
COMPRESS_ORDER = (("top_k", "random_k", "low_rank"), ("float16", "bfloat16", "quantize"), ("zstd",))
COMPRESS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "top_k": {"share": 0.1},
    "random_k": {"share": 0.1},
    "low_rank": {"low_rank_r": 4},
    "quantize": {"bits": 8, "block_size": None},
}
LOSSY = tuple(kind for kinds in COMPRESS_ORDER[:2] for kind in kinds)

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
    "adam": {"server_learning_rate": 1e-2, "server_beta1": 0.9, "server_beta2": 0.99, "server_tau": 1e-3},
    "yogi": {"server_learning_rate": 1e-2, "server_beta1": 0.9, "server_beta2": 0.99, "server_tau": 1e-3},
    "adagrad": {"server_learning_rate": 1e-2, "server_beta1": 0.0, "server_tau": 1e-3},
}

# What a checkpoint may be the best by, measured on the validation rows, and whether more is better. A benchmark task's
# metric (TASK/METRIC) may stand in their place; there more is better.
BEST_BY: Mapping[str, bool] = {
    "loss": False,
    "loss_plain_mean": False,
    "loss_decile": False,
    "score": True,
    "score_plain_mean": True,
    "score_decile": True,
}

COLUMN_NAMES = (
    "instruction", "input", "output", "category", "messages", "prompt", "completion", "text", "chosen", "rejected",
)  # fmt: skip
DEFAULT_CLIENTS = 4  # of a split that cannot tell by itself (iid, dirichlet, shards, quantity_skew)
DEFAULT_SHARDS = 2
DEFAULT_VAL_SHARE = 0.05
DEFAULT_TEST_SHARE = 0.1


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DataRecipe(_Block):
    """Where the rows come from and how they become tokens."""

    name: str | None = Field(
        None,
        description="A data set of the catalogue (`fedloom ls data`), `fed-dolly` say, which brings its columns, its "
        "split and, where it is published with any, its test rows. `local` is any file.",
    )
    path: str = Field(
        "",
        description="A json, jsonl, csv or parquet file, a folder of them, a Hugging Face data set id, or "
        "`builtin:skills`, `builtin:arith` or `builtin:code`. Beside data.name: a copy of that set. Required without; "
        "with model `builtin` it is `builtin:skills`. A name of the catalogue here is taken as data.name.",
    )
    test_path: str | None = Field(
        None, description="Rows to test on, from another file or data set. Without it test_set_size is set aside."
    )
    type: Literal["auto", "alpaca", "chat", "prompt_completion", "completion", "preference"] = Field(
        "auto",
        description="What a row is. `auto` looks at the columns and says what it took. `preference` is read and "
        "previewed; a run trains on answers to imitate.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our name of a column: its name in the file, for example `{input: context, output: response}`. "
        f"Our names are {', '.join(COLUMN_NAMES)}.",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        1024, description="Longest example in tokens, prompt and answer together; what is longer is cut and counted."
    )
    chat_template: Literal["auto", "alpaca", "tokenizer"] = Field(
        "auto",
        description="`tokenizer` is the model's own template, `alpaca` the Stanford-Alpaca layout; `auto` takes the "
        "tokenizer's where it has one.",
    )
    val_set_size: Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        DEFAULT_VAL_SHARE,
        description="Validation rows: a share below 1 of each client's, or a whole number over all clients, in "
        "proportion to what they have. Built-in tasks with the natural split bring their own.",
    )
    test_set_size: Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description=f"Test rows, as val_set_size. Default {DEFAULT_TEST_SHARE} without test_path. Built-in tasks bring "
        "their own, and so do named sets that are published with test rows, unless this is given.",
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Read no more than this many rows.")
    train_on_inputs: bool = Field(False, description="Put the loss on the prompt as well as on the answer.")
    cache: bool = Field(
        True, description="Keep the prepared data for the next time ($FEDLOOM_CACHE, 20 GB): fedloom cache shows it."
    )

    @property
    def label(self) -> str:
        """What the rows are called in a sentence."""
        return self.path or self.name or ""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in columns if name not in COLUMN_NAMES]
        if unknown:
            raise ValueError(
                f"no such column name: {', '.join(unknown)}; the left side is one of {', '.join(COLUMN_NAMES)}, "
                "the right side is the file's own name"
            )
        return columns


class SplitRecipe(_Block):
    """Who holds which rows."""

    kind: SplitKind = Field(
        "iid",
        description="`iid` deals rows at random; `dirichlet` skews categories by alpha; `shards` sorts by category, "
        "cuts equal shards and deals them; `quantity_skew` skews sizes by alpha; `by_category` gives each client its "
        "categories; `by_column` makes one client per value of a column; `files` one per file of a folder; `natural` "
        "is what a built-in task brings (its default).",
    )
    clients: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description=f"Number of clients. Default {DEFAULT_CLIENTS} for iid, dirichlet, shards and quantity_skew, else "
        "what the data has; fewer than categories, values or files, and those are dealt round robin; a built-in task "
        "loses its last ones.",
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Concentration: 0.1 is very skewed, 100 nearly even. Only for dirichlet and quantity_skew, which "
        "need it.",
    )
    column: str | None = Field(
        None, description="The column that by_column splits by, and dirichlet and shards in place of category."
    )
    shards_per_client: Annotated[int, Field(ge=1)] | None = Field(
        None, description=f"Shards each client gets. Default {DEFAULT_SHARDS}. Only for shards."
    )
    min_rows: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Categories, values or files with fewer rows are left out, and counted. Only for by_category, "
        "by_column and files.",
    )


class AdapterRecipe(_Block):
    """What is trained on top of the frozen model."""

    kind: AdapterKind = Field(
        "lora",
        description="The kind of adapter: `lora` on layers, or virtual tokens before every text: `prompt_tuning`, "
        "`p_tuning` (made by a small encoder), `prefix_tuning` (keys and values in every layer).",
    )
    lora_r: Annotated[int, Field(ge=1)] | None = Field(None, description="Rank. Default 8. Only for lora.")
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The update is scaled by lora_alpha / lora_r. Default 16. Only for lora."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="Dropout in front of A while training; draws differ with the size of a client batch. Default 0. "
        "Only for lora.",
    )
    lora_target_modules: Annotated[list[str], Field(min_length=1)] | Literal["auto", "all-linear"] | None = Field(
        None,
        description="Names of linear modules, `all-linear`, or `auto`: PEFT's choice for the architecture. Default "
        "auto. Only for lora.",
    )
    client_ranks: RankMix | None = Field(
        None,
        description="Ranks of clients: `same` is lora_r for all; `heavy_tail` gives 60, 25, 10 and 5 % of them an "
        "eighth, a quarter, half and all of lora_r, `normal` 15, 35, 35 and 15 %, `uniform` a quarter each. Default "
        "same. Only for lora.",
    )
    num_virtual_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Default 20. Only for prompt_tuning, p_tuning, prefix_tuning."
    )
    prompt_tuning_init_text: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="A text whose tokens the prompt begins with; without it they are drawn from the vocabulary. Only "
        "for prompt_tuning.",
    )
    encoder_reparameterization_type: Literal["mlp", "lstm"] | None = Field(
        None, description="The encoder of the virtual tokens. Default mlp. Only for p_tuning."
    )
    encoder_hidden_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Of the encoder. Default: the model's hidden size. Only for p_tuning."
    )


class ClientRecipe(_Block):
    """One client's work in one round."""

    kind: Literal["sgd"] = Field("sgd", description="The local algorithm: steps of an optimiser on own batches.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="Peak learning rate.")
    optim: ClientOptim = Field("adamw", description="Starts anew in each round.")
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Default 0.9. Only for momentum.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Decoupled for adamw, added to the gradient for sgd and momentum. Default 0. Only for these.",
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.9. Only for adamw, adam, yogi."
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.999. Only for adamw, adam, yogi."
    )
    adam_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Default 1e-8, yogi 1e-3, adagrad 1e-10. Only for adamw, adam, yogi, adagrad."
    )
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = Field(
        4, description="Examples of one client in one forward and backward pass."
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = Field(
        1, description="Passes per optimiser step: a step sees batch size x this many examples."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Each client's gradient is clipped to this norm; `null` is off."
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Over all rounds of the run; it does not restart in each round."
    )
    warmup_rounds: Annotated[int, Field(ge=0)] = Field(0, description="Rounds in which the learning rate rises.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="The end of the schedule as a share of the peak. Default 0. Only for linear and cosine."
    )
    prox_mu: Annotated[float, Field(ge=0)] = Field(
        0.0, description="FedProx: adds prox_mu / 2 x squared distance from the round's start to the loss."
    )
    trainable: Literal["all", "lora_A", "lora_B", "alternate"] = Field(
        "all",
        description="The factors that clients train and send: FFA-LoRA is `lora_B`, RoLoRA `alternate` (B, A in turn). "
        "The local and global arms train all.",
    )
    shared: Literal["all", "lora_A", "lora_B"] = Field(
        "all",
        description="The factors that are sent and averaged; the others stay with the client. FedSA-LoRA: `lora_A`.",
    )


class AggregateRecipe(_Block):
    """What the sum of uploads means."""

    kind: Literal["mean", "flora", "flex_lora", "fedex_lora", "het_lora"] = Field(
        "mean", description="The rule; docs/papers.md says what each makes of LoRA's factors."
    )
    norm_weighted: bool | None = Field(
        None,
        description="Weigh clients by the norm of what they learnt, not by rows. Default true. Only for het_lora.",
    )
    weighting: Literal["data", "uniform"] = Field(
        "data", description="`data` weighs a client by its number of training rows, `uniform` all the same."
    )


class CompressRecipe(_Block):
    """How messages are made smaller."""

    up: list[Compression] = Field(
        default_factory=list,
        description="What clients' messages go through, in this order: one of `top_k`, `random_k`, `low_rank`; then "
        "one of `float16`, `bfloat16`, `quantize`; then `zstd`.",
    )
    down: list[DownCompression] = Field(
        default_factory=list,
        description="The same for the broadcast, without the first kind: clients need every number.",
    )
    bits: Annotated[int, Field(ge=4, le=8)] | None = Field(None, description="8 or 4. Default 8. Only for quantize.")
    block_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Numbers that share a scale; default the whole tensor. Only for quantize."
    )
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Of the numbers that are sent. Default 0.1. Only for top_k and random_k."
    )
    low_rank_r: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Rank of what is sent of a matrix. Default 4. Only for low_rank."
    )
    error_feedback: bool | None = Field(
        None,
        description="Clients send later what compression left out. Default true for top_k and low_rank, else false. "
        "Only where something is lost.",
    )


class ServerRecipe(_Block):
    """From the parameters towards what the clients propose."""

    kind: Literal["replace", "optimize"] = Field(
        "replace", description="Take the proposal, or step towards it with an optimiser."
    )
    server_optim: ServerOptim | None = Field(None, description="Required for optimize.")
    server_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Default 1.0 for momentum, 0.01 for adam, yogi and adagrad. Only for optimize."
    )
    server_momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.9. Only for momentum."
    )
    server_beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.9, adagrad 0. Only for adam, yogi, adagrad."
    )
    server_beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.99. Only for adam, yogi."
    )
    server_tau: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Added to the denominator. Default 1e-3. Only for adam, yogi, adagrad."
    )


class RuntimeRecipe(_Block):
    """How clients are mapped to the machine. Changes speed and memory, never the result beyond rounding."""

    kind: Literal["batched", "sequential", "loopback"] = Field(
        "batched",
        description="`batched` trains several clients in one pass; `sequential` one after the other; `loopback` sends "
        "every payload through the wire format to client objects with their own model.",
    )
    clients_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="Clients in one pass. Default auto. Only for batched."
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="CPU threads of PyTorch.")
    client_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of a round's clients that fail, simulated."
    )


class EvaluateRecipe(_Block):
    """What is measured, and when."""

    eval_rounds: Annotated[int, Field(ge=0)] = Field(
        5, description="Validate every so many rounds, besides before the first and after the last; 0 only then."
    )
    score: Literal["auto", "none", "exact", "final_number", "pass_at_1"] = Field(
        "auto", description="How an answer is judged; `auto` is the task's own, or none where nothing is known."
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Score no more than this many test rows per client; the loss is always on all."
    )
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Longest generated answer. Default: the built-in task's own, else 256."
    )
    eval_batch_size: Annotated[int, Field(ge=1)] = Field(16, description="Examples in one pass of evaluation.")
    score_validation: bool = Field(
        False,
        description="Score the validation rows too at each validation, up to limit per client. Done anyway where "
        "best_by is a score.",
    )
    best_by: str | None = Field(
        None,
        description="What makes a checkpoint the best: of the validation rows "
        f"{', '.join(f'`{key}`' for key in BEST_BY)} (a decile is the mean of the worst tenth of the clients), or "
        "`TASK/METRIC` of a benchmark. Default loss where there are validation rows; where there is nothing to choose "
        "by, the last checkpoint is the best.",
    )
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Stop an arm after so many evaluations in a row that are no better by best_by than the best so "
        "far. `null` is off.",
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] | None = Field(
        None, description="By how much better counts as better. Default 0. Only with early_stopping_patience."
    )
    equal_samples: bool = Field(
        True,
        description="Where `local` is one of the arms: test the federated and the global arm also after the round in "
        "which their model has seen as many samples as one local model sees in the whole run.",
    )
    tasks: list[str] = Field(
        default_factory=list,
        description="Benchmarks that each arm's model is put to at the end, by name: `[gsm8k, mmlu]`.",
    )
    task_paths: dict[str, str] = Field(
        default_factory=dict,
        description="Where a benchmark's published files lie, for example `{gsm8k: test.jsonl}`. Default: below "
        "$FEDLOOM_DATA.",
    )
    task_limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="No more than this many items of a benchmark (of each subject, where it has subjects)."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Worked examples before each question. Default: the benchmark's own number."
    )
    task_rounds: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Run the benchmarks every so many rounds as well, and before the first."
    )
    task_clients: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Where each client has a model of its own (`local`, personalised methods), a benchmark's figure is "
        "their mean: take the models of only so many clients, the first ones.",
    )


class CheckpointRecipe(_Block):
    """What is kept to go on from, and what comes out."""

    save_rounds: Annotated[int, Field(ge=1)] = Field(1, description="Save every so many rounds.")
    save_total_limit: Annotated[int, Field(ge=1)] = Field(2, description="Checkpoints kept per arm, besides the best.")
    export: Literal["last", "best"] | None = Field(
        None,
        description="The state of an arm that is tested and written to `adapter/`: after its last round, or the best "
        "one. Default last, with early stopping best. The other one can be had by `--checkpoint`.",
    )


class Recipe(_Block):
    """A run. Blocks may be left out; a leaf may also be written flat (`learning_rate: 2e-4`)."""

    name: str = Field("run", min_length=1, description="Default: the recipe file's name.")
    model: str = Field(min_length=1, description="A hub id, a folder, or `builtin`.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="Of the frozen model; `auto` is bfloat16 where the hardware has it. Adapters are float32."
    )
    data: DataRecipe = Field(default_factory=DataRecipe, description="Where the rows come from.")
    split: SplitRecipe = Field(default_factory=SplitRecipe, description="Who holds which rows.")
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe, description="What is trained.")
    method: Method = Field(
        "fedavg", description="Fills client, aggregate and server; `fedloom cat` shows the result; a slot key replaces."
    )
    rounds: Annotated[int, Field(ge=1)] = Field(10, description="Rounds of training and averaging.")
    clients_per_round: Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="A whole number of clients, or a share below 1. `null` is all."
    )
    local_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Optimiser steps per client and round. This or local_epochs."
    )
    local_epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Passes over a client's rows per round. This or local_steps."
    )
    client: ClientRecipe = Field(default_factory=ClientRecipe, description="One client's work in one round.")
    aggregate: AggregateRecipe = Field(default_factory=AggregateRecipe, description="What the sum of uploads means.")
    server: ServerRecipe = Field(default_factory=ServerRecipe, description="What the server does with it.")
    compress: CompressRecipe = Field(default_factory=CompressRecipe, description="How messages are made smaller.")
    runtime: RuntimeRecipe = Field(default_factory=RuntimeRecipe, description="How clients are mapped to the machine.")
    arms: list[Arm] = Field(
        ["base", "federated"],
        min_length=1,
        description="What is compared: `base` untouched, `local` each client alone, `federated`, `global` pooled rows.",
    )
    evaluate: EvaluateRecipe = Field(default_factory=EvaluateRecipe, description="What is measured, and when.")
    checkpoint: CheckpointRecipe = Field(default_factory=CheckpointRecipe, description="What is kept to go on from.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="Every random draw comes from it.")
    output_dir: str = Field("", description="The run folder. Default `runs/<name>`.")
    report_to: Annotated[list[TrackerName], Field(min_length=1)] | Literal["none"] = Field(
        "none",
        description="Trackers that get the figures as well, each an extra of the same name. rounds.jsonl and "
        "report.html are always written.",
    )
    project: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="The project that trackers file the run under. Default fedloom. Only with report_to."
    )

    @field_validator("report_to")
    @classmethod
    def _trackers_once(cls, names: list[str] | str) -> list[str] | str:
        return list(dict.fromkeys(names)) if isinstance(names, list) else names

    @field_validator("arms")
    @classmethod
    def _arms_once(cls, arms: list[Arm]) -> list[Arm]:
        twice = sorted({arm for arm in arms if arms.count(arm) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice")
        return arms

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return fill(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _compose(self, info: ValidationInfo) -> Recipe:
        if isinstance(info.context, dict) and info.context.get("compose") is False:
            return self  # the loader asks for the objections itself, to tell their lines
        found = list(objections(self))
        if found:
            raise ValueError("; ".join(f"{objection.keys[0]}: {objection.message}" for objection in found))
        return self


BLOCKS: Mapping[str, type[_Block]] = {
    "data": DataRecipe,
    "split": SplitRecipe,
    "adapter": AdapterRecipe,
    "client": ClientRecipe,
    "aggregate": AggregateRecipe,
    "server": ServerRecipe,
    "compress": CompressRecipe,
    "runtime": RuntimeRecipe,
    "evaluate": EvaluateRecipe,
    "checkpoint": CheckpointRecipe,
}


def _is_builtin(path: object) -> bool:
    return isinstance(path, str) and path.startswith("builtin:")


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settle what depends on other keys: the method's slots, the optimisers' settings, sizes of splits, the folder.

    Never replaces a value that was given. Values may be wrong; what cannot be settled is left for validation.
    """
    filled: dict[str, Any] = dict(values)
    for name in BLOCKS:
        block = filled.get(name)
        if isinstance(block, BaseModel):
            block = block.model_dump(exclude_unset=True)
        if block is None or isinstance(block, Mapping):
            filled[name] = dict(block or {})
        else:
            return filled  # not a block at all: validation says so
    data, split, client = filled["data"], filled["split"], filled["client"]
    server, runtime = filled["server"], filled["runtime"]
    evaluate, saved = filled["evaluate"], filled["checkpoint"]

    def settle(block: dict[str, Any], defaults: Mapping[str, Any]) -> None:
        for key, value in defaults.items():
            if block.get(key) is None:
                block[key] = value

    method = filled.get("method", "fedavg")
    for slot, settings in METHODS.get(method if isinstance(method, str) else "", {}).items():
        if filled[slot].get("kind", settings["kind"]) == settings["kind"]:
            settle(filled[slot], settings)

    def row(table: Mapping[str, Mapping[str, Any]], name: object) -> Mapping[str, Any]:
        return table.get(name, {}) if isinstance(name, str) else {}

    adapter = filled["adapter"]
    settle(adapter, row(ADAPTER_DEFAULTS, adapter.get("kind", "lora")))
    settle(client, row(CLIENT_OPTIM_DEFAULTS, client.get("optim", "adamw")))
    if client.get("lr_scheduler_type", "cosine") in ("linear", "cosine"):
        settle(client, {"min_lr_ratio": 0.0})
    compress = filled["compress"]
    both_ways = [kind for way in ("up", "down") if isinstance(compress.get(way), Sequence) for kind in compress[way]]
    for kind, settings in COMPRESS_DEFAULTS.items():
        if kind in both_ways:
            settle(compress, settings)
    if any(kind in both_ways for kind in LOSSY):
        settle(compress, {"error_feedback": "top_k" in both_ways or "low_rank" in both_ways})
    if filled["aggregate"].get("kind") == "het_lora":
        settle(filled["aggregate"], {"norm_weighted": True})
    if server.get("kind") == "optimize":
        settle(server, row(SERVER_OPTIM_DEFAULTS, server.get("server_optim")))

    if data.get("name") is None and _named(data.get("path")) is not None:
        data["name"] = data["path"]
    if data.get("name") is not None and data.get("path") == data["name"]:
        data["path"] = ""
    named = _named(data.get("name"))
    if filled.get("model") == "builtin" and data.get("name") is None:
        settle(data, {"path": "builtin:skills"})
    if _is_builtin(data.get("path")):
        settle(split, {"kind": "natural"})
    else:
        if named is not None:
            if split.get("kind") in (None, named.split.get("kind")):
                settle(split, named.split)
            if named.score is not None and evaluate.get("score", "auto") == "auto":
                evaluate["score"] = named.score
        if data.get("test_path") is None and (named is None or not named.has_test):
            settle(data, {"test_set_size": DEFAULT_TEST_SHARE})
        if evaluate.get("score") != "none":
            settle(evaluate, {"max_new_tokens": 256})
    if split.get("kind", "iid") in ("iid", "dirichlet", "shards", "quantity_skew"):
        settle(split, {"clients": (named.clients if named is not None else None) or DEFAULT_CLIENTS})
    if split.get("kind") == "shards":
        settle(split, {"shards_per_client": DEFAULT_SHARDS})
    if data.get("val_set_size") != 0:
        settle(evaluate, {"best_by": "loss"})
    if evaluate.get("early_stopping_patience") is not None:
        settle(evaluate, {"early_stopping_threshold": 0.0})
    settle(saved, {"export": "last" if evaluate.get("early_stopping_patience") is None else "best"})
    if runtime.get("kind", "batched") == "batched":
        settle(runtime, {"clients_per_batch": "auto"})
    per_round = filled.get("clients_per_round")
    if isinstance(per_round, float) and per_round == 1.0:
        filled["clients_per_round"] = None  # the share 1.0 is everyone
    if filled.get("report_to", "none") != "none" and filled.get("project") is None:
        filled["project"] = "fedloom"
    if filled.get("name") is None:
        filled["name"] = "run"
    if not filled.get("output_dir"):
        filled["output_dir"] = f"runs/{filled['name']}"
    return filled


def _named(name: object) -> NamedSet | None:
    return CATALOG.get(name) if isinstance(name, str) else None


class Objection(NamedTuple):
    """One reason why values that are right by themselves do not go together."""

    keys: tuple[str, ...]  # dotted; the first is the one to look at, all must be sound for the reason to hold
    message: str


def objections(recipe: Recipe) -> Iterator[Objection]:
    """Every reason why the recipe's parts do not go together, found without data and without the model."""
    yield from _data_objections(recipe)
    yield from _split_objections(recipe)
    yield from _training_objections(recipe)
    yield from _evaluate_objections(recipe)
    yield from _compress_objections(recipe)
    yield from _tracking_objections(recipe)


def _data_objections(recipe: Recipe) -> Iterator[Objection]:
    data = recipe.data
    if data.name is not None and data.name not in (*CATALOG, LOCAL):
        known = suggest(data.name, [*CATALOG, LOCAL])
        yield Objection(("data.name",), f"{data.name}, but there is no such data set{known}: fedloom ls data")
    if data.name is not None and (data.path in CATALOG or _is_builtin(data.path)):
        yield Objection(("data.path", "data.name"), f"{data.path}, but data.name is {data.name}: leave one of them out")
    if not data.path and data.name in (None, LOCAL):
        yield Objection(
            ("data.path",), "missing: a file, a folder, a hub id, builtin:skills, or a name that fedloom ls data shows"
        )
    if _is_builtin(data.path):
        natural = recipe.split.kind == "natural"
        given: dict[str, Any] = {
            "test_path": data.test_path,
            "type": None if data.type == "auto" else data.type,
            "columns": data.columns or None,
            "val_set_size": data.val_set_size if natural and data.val_set_size != DEFAULT_VAL_SHARE else None,
            "test_set_size": data.test_set_size,
        }
        for key, value in given.items():
            if value is not None:
                yield Objection(
                    (f"data.{key}", "data.path"),
                    f"{yaml_value(value)} would have no effect: {data.path} brings its own rows",
                )
    elif data.test_path is not None and data.test_set_size is not None:
        yield Objection(
            ("data.test_set_size", "data.test_path"),
            f"{data.test_set_size} would have no effect: data.test_path gives the test rows; leave one of them out",
        )
    shares = [size for size in (data.val_set_size, data.test_set_size) if isinstance(size, float)]
    if sum(shares) >= 1:
        yield Objection(
            ("data.val_set_size", "data.test_set_size"),
            f"{data.val_set_size} + data.test_set_size {data.test_set_size} = {sum(shares):g}: "
            "nothing would be left to train on; together below 1",
        )


_SPLIT_SETTINGS: Mapping[str, tuple[str, ...]] = {  # which kinds of split have them
    "alpha": ("dirichlet", "quantity_skew"),
    "column": ("by_column", "dirichlet", "shards"),
    "shards_per_client": ("shards",),
    "min_rows": ("by_category", "by_column", "files"),
}


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _split_objections(recipe: Recipe) -> Iterator[Objection]:
    split = recipe.split
    if split.kind == "natural" and (recipe.data.path or recipe.data.name) and not _is_builtin(recipe.data.path):
        yield Objection(
            ("split.kind", "data.path"),
            "natural is what built-in tasks bring; your own data takes iid, dirichlet, shards, quantity_skew, "
            "by_category, by_column or files",
        )
    if split.kind in ("dirichlet", "quantity_skew") and split.alpha is None:
        yield Objection(("split.alpha", "split.kind"), f"missing: {split.kind} needs it, for example alpha: 0.5")
    if split.kind == "by_column" and split.column is None:
        yield Objection(("split.column", "split.kind"), "missing: by_column needs the column to split by")
    for key, kinds in _SPLIT_SETTINGS.items():
        value = getattr(split, key)
        if value is not None and split.kind not in kinds:
            having = f"{_listed(kinds)} {'has' if len(kinds) == 1 else 'have'} it"
            yield Objection(
                (f"split.{key}", "split.kind"), f"{value} would have no effect: kind is {split.kind}; {having}"
            )
    per_round = recipe.clients_per_round
    if isinstance(per_round, int) and split.clients is not None and per_round > split.clients:
        yield Objection(
            ("clients_per_round", "split.clients"),
            f"{per_round}, but the split has {split.clients} client{'s' if split.clients > 1 else ''}: "
            f"at most {split.clients}, or split.clients >= {per_round}",
        )


def _training_objections(recipe: Recipe) -> Iterator[Objection]:
    if recipe.local_steps is not None and recipe.local_epochs is not None:
        yield Objection(
            ("local_epochs", "local_steps"),
            f"{recipe.local_epochs}, and local_steps {recipe.local_steps} as well: leave one of them out",
        )
    if recipe.local_steps is None and recipe.local_epochs is None:
        yield Objection(
            ("local_steps", "local_epochs"),
            "missing: how long a client trains in a round, local_steps: 30 say, or local_epochs: 1",
        )
    client, server = recipe.client, recipe.server
    optional = ("momentum", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    for key in optional:
        value = getattr(client, key)
        if value is not None and key not in CLIENT_OPTIM_DEFAULTS[client.optim]:
            having = [name for name, settings in CLIENT_OPTIM_DEFAULTS.items() if key in settings]
            yield Objection(
                (f"client.{key}", "client.optim"),
                f"{value} would have no effect: optim is {client.optim}; {', '.join(having)} "
                f"{'has' if len(having) == 1 else 'have'} it",
            )
    if client.min_lr_ratio is not None and client.lr_scheduler_type == "constant":
        yield Objection(
            ("client.min_lr_ratio", "client.lr_scheduler_type"),
            f"{client.min_lr_ratio} would have no effect: lr_scheduler_type is constant; linear and cosine have an end",
        )
    if client.warmup_rounds >= recipe.rounds:
        yield Objection(
            ("client.warmup_rounds", "rounds"),
            f"{client.warmup_rounds}, but there {'are' if recipe.rounds > 1 else 'is'} {recipe.rounds} "
            f"round{'s' if recipe.rounds > 1 else ''}: at most {recipe.rounds - 1}",
        )
    if client.prox_mu > 0 and recipe.method == "fedavg":
        yield Objection(
            ("client.prox_mu", "method"),
            f"{client.prox_mu} makes this FedProx, and the method says fedavg: set method: fedprox",
        )
    yield from _adapter_objections(recipe)
    yield from _factor_objections(recipe)
    settings = {
        key: getattr(server, key)
        for key in (
            "server_optim",
            "server_learning_rate",
            "server_momentum",
            "server_beta1",
            "server_beta2",
            "server_tau",
        )
    }
    if server.kind == "replace":
        for key, value in settings.items():
            if value is not None:
                yield Objection(
                    (f"server.{key}", "server.kind", "method"),
                    f"{value} would have no effect: server.kind is replace; set method: fedavgm, fedadam, fedyogi or "
                    "fedadagrad, or server.kind: optimize",
                )
    elif server.server_optim is None:
        yield Objection(
            ("server.server_optim", "server.kind"), "missing: optimize needs momentum, adam, yogi or adagrad"
        )
    else:
        for key, value in settings.items():
            if value is not None and key != "server_optim" and key not in SERVER_OPTIM_DEFAULTS[server.server_optim]:
                having = [name for name, row in SERVER_OPTIM_DEFAULTS.items() if key in row]
                yield Objection(
                    (f"server.{key}", "server.server_optim"),
                    f"{value} would have no effect: server_optim is {server.server_optim}; {', '.join(having)} "
                    f"{'has' if len(having) == 1 else 'have'} it",
                )
    if recipe.runtime.kind != "batched" and recipe.runtime.clients_per_batch is not None:
        yield Objection(
            ("runtime.clients_per_batch", "runtime.kind"),
            f"{recipe.runtime.clients_per_batch} would have no effect: runtime.kind is {recipe.runtime.kind}, "
            "which takes one client at a time",
        )


def _adapter_objections(recipe: Recipe) -> Iterator[Objection]:
    adapter = recipe.adapter
    for key in dict.fromkeys(key for row in ADAPTER_DEFAULTS.values() for key in row):
        value = getattr(adapter, key)
        if value is not None and key not in ADAPTER_DEFAULTS[adapter.kind]:
            having = [name for name, row in ADAPTER_DEFAULTS.items() if key in row]
            yield Objection(
                (f"adapter.{key}", "adapter.kind"),
                f"{yaml_value(value)} would have no effect: kind is {adapter.kind}; {', '.join(having)} "
                f"{'has' if len(having) == 1 else 'have'} it",
            )
    if adapter.kind != "lora":
        needs = {
            "client.trainable": recipe.client.trainable != "all",
            "client.shared": recipe.client.shared != "all",
            "aggregate.kind": recipe.aggregate.kind != "mean",
        }
        for key, asked in needs.items():
            block, _, leaf = key.partition(".")
            if asked:
                yield Objection(
                    (key, "adapter.kind", "method"),
                    f"{getattr(getattr(recipe, block), leaf)}, but it works on LoRA's factors and adapter.kind is "
                    f"{adapter.kind}: adapter.kind: lora, or another method",
                )


def _factor_objections(recipe: Recipe) -> Iterator[Objection]:
    """LoRA's factors: which are trained, which are sent, at which ranks."""
    client, aggregate, mix = recipe.client, recipe.aggregate, recipe.adapter.client_ranks
    if client.shared != "all" and client.trainable not in ("all", client.shared):
        yield Objection(
            ("client.shared", "client.trainable"),
            f"{client.shared}, but client.trainable is {client.trainable}: what is sent must be trained in every round",
        )
    elif client.shared != "all" and client.trainable == client.shared:
        yield Objection(
            ("client.shared", "client.trainable"),
            f"{client.shared} would have no effect: client.trainable is {client.trainable}, so nothing else is trained",
        )
    if client.shared != "all" and aggregate.kind != "mean":
        yield Objection(
            ("client.shared", "aggregate.kind"),
            f"{client.shared}, but {aggregate.kind} needs both factors of every client: aggregate.kind: mean",
        )
    if client.trainable != "all" and aggregate.kind != "mean":
        yield Objection(
            ("client.trainable", "aggregate.kind"),
            f"{client.trainable}, but {aggregate.kind} is for clients that train both factors: aggregate.kind: mean",
        )
    if aggregate.norm_weighted is not None and aggregate.kind != "het_lora":
        yield Objection(
            ("aggregate.norm_weighted", "aggregate.kind"),
            f"{yaml_value(aggregate.norm_weighted)} would have no effect: kind is {aggregate.kind}; het_lora has it",
        )
    if aggregate.kind == "het_lora" and aggregate.norm_weighted and aggregate.weighting == "uniform":
        yield Objection(
            ("aggregate.weighting", "aggregate.norm_weighted"),
            "uniform would have no effect: het_lora weighs by norms; norm_weighted: false leaves it to the weighting",
        )
    if mix not in (None, "same") and recipe.adapter.lora_r == 1:
        yield Objection(("adapter.client_ranks", "adapter.lora_r"), f"{mix} would have no effect: lora_r is 1")


def _compress_objections(recipe: Recipe) -> Iterator[Objection]:
    compress = recipe.compress
    for way in ("up", "down"):
        kinds: list[str] = list(getattr(compress, way))
        for group in COMPRESS_ORDER:
            several = [kind for kind in kinds if kind in group]
            if len(several) > 1:
                yield Objection((f"compress.{way}",), f"{', '.join(several)}: one of them is enough")
        order = [kind for group in COMPRESS_ORDER for kind in group if kind in kinds]
        if len(set(kinds)) == len(kinds) and order != kinds:
            yield Objection((f"compress.{way}",), f"{yaml_value(kinds)}: in this order: {yaml_value(order)}")
    if compress.bits not in (None, 4, 8):
        yield Objection(("compress.bits",), f"{compress.bits}: must be 8 or 4")
    used = {*compress.up, *compress.down}
    for key in ("bits", "block_size", "share", "low_rank_r"):
        having = [kind for kind, row in COMPRESS_DEFAULTS.items() if key in row]
        if getattr(compress, key) is not None and not used.intersection(having):
            yield Objection(
                (f"compress.{key}", "compress.up", "compress.down"),
                f"{getattr(compress, key)} would have no effect: it is a setting of {' and '.join(having)}",
            )
    lossy = [kind for kind in compress.up if kind in LOSSY]
    if compress.error_feedback is True and not lossy:
        yield Objection(
            ("compress.error_feedback", "compress.up"), "true would have no effect: nothing is lost on the way up"
        )
    if compress.error_feedback and recipe.adapter.client_ranks not in (None, "same"):
        yield Objection(
            ("compress.error_feedback", "adapter.client_ranks"),
            f"true, but what is left out has no fixed size with client_ranks {recipe.adapter.client_ranks}: false",
        )


def _tracking_objections(recipe: Recipe) -> Iterator[Objection]:
    if recipe.report_to == "none" and recipe.project is not None:
        yield Objection(
            ("project", "report_to"),
            f"{yaml_value(recipe.project)} would have no effect: report_to is none, so no tracker files the run there",
        )


def _evaluate_objections(recipe: Recipe) -> Iterator[Objection]:
    evaluate = recipe.evaluate
    if evaluate.score == "none" and evaluate.max_new_tokens is not None:
        yield Objection(
            ("evaluate.max_new_tokens", "evaluate.score"),
            f"{evaluate.max_new_tokens} would have no effect: score is none, so nothing is generated",
        )
    if evaluate.score == "none" and evaluate.score_validation:
        yield Objection(
            ("evaluate.score_validation", "evaluate.score"),
            "true would have no effect: score is none, so nothing is scored",
        )
    yield from _best_objections(recipe)
    yield from _task_objections(recipe)


def _best_objections(recipe: Recipe) -> Iterator[Objection]:
    evaluate = recipe.evaluate
    best_by = evaluate.best_by
    slash = "/" in (best_by or "")
    if best_by is not None and slash:
        named = any(best_by.startswith(f"{task}/") and best_by != f"{task}/" for task in evaluate.tasks)
        if not named and not best_by.startswith("lm_eval:"):  # the task of a file of one's own has a name of its own
            yield Objection(
                ("evaluate.best_by", "evaluate.tasks"),
                f"{best_by}, but evaluate.tasks is {yaml_value(evaluate.tasks)}: a TASK/METRIC names one of them",
            )
        elif evaluate.task_rounds is None:
            yield Objection(
                ("evaluate.best_by", "evaluate.task_rounds"),
                f"{best_by}, but the benchmarks run only at the end: set evaluate.task_rounds",
            )
    elif best_by is not None and best_by not in BEST_BY:
        near = difflib.get_close_matches(best_by, BEST_BY, n=1)
        yield Objection(
            ("evaluate.best_by",),
            f"{best_by}, which is none of {', '.join(BEST_BY)} and no TASK/METRIC"
            + (f"; did you mean {near[0]}?" if near else ""),
        )
    elif best_by is not None and BEST_BY[best_by] and evaluate.score == "none":
        yield Objection(("evaluate.best_by", "evaluate.score"), f"{best_by}, but evaluate.score is none: best_by: loss")
    if best_by is not None and not slash and recipe.data.val_set_size == 0:
        yield Objection(
            ("evaluate.best_by", "data.val_set_size"),
            f"{best_by} would have no effect: data.val_set_size is 0, so there is nothing to choose by",
        )
    patience = evaluate.early_stopping_patience
    if patience is None and evaluate.early_stopping_threshold is not None:
        yield Objection(
            ("evaluate.early_stopping_threshold", "evaluate.early_stopping_patience"),
            f"{evaluate.early_stopping_threshold} would have no effect: early_stopping_patience is not set",
        )
    if patience is not None and best_by is None:
        yield Objection(
            ("evaluate.early_stopping_patience", "data.val_set_size", "evaluate.best_by"),
            f"{patience}, but data.val_set_size is 0, so there is nothing to stop by: set aside validation rows",
        )
    elif patience is not None and not slash and evaluate.eval_rounds == 0:
        yield Objection(
            ("evaluate.early_stopping_patience", "evaluate.eval_rounds"),
            f"{patience}, but eval_rounds is 0, so nothing is measured before the end: eval_rounds: 1, say",
        )
    if recipe.checkpoint.export == "best" and best_by is None:
        yield Objection(
            ("checkpoint.export", "data.val_set_size", "evaluate.best_by"),
            "best, but data.val_set_size is 0, so there is nothing to choose by: export: last, or validation rows",
        )


def _task_objections(recipe: Recipe) -> Iterator[Objection]:
    evaluate = recipe.evaluate
    twice = sorted({task for task in evaluate.tasks if evaluate.tasks.count(task) > 1})
    if twice:
        yield Objection(("evaluate.tasks",), f"{', '.join(twice)} is named twice")
    for task in evaluate.tasks:
        if not names_tasks(task):
            near = suggest(task, [*TASKS, *SETS])
            yield Objection(("evaluate.tasks",), f"there is no benchmark {task!r}{near}: fedloom ls tasks")
    if not evaluate.tasks:
        given: dict[str, Any] = {
            "task_paths": evaluate.task_paths or None,
            "task_limit": evaluate.task_limit,
            "num_fewshot": evaluate.num_fewshot,
            "task_rounds": evaluate.task_rounds,
            "task_clients": evaluate.task_clients,
        }
        for key, value in given.items():
            if value is not None:
                yield Objection(
                    (f"evaluate.{key}", "evaluate.tasks"),
                    f"{yaml_value(value)} would have no effect: evaluate.tasks is empty",
                )
        return
    for task in evaluate.task_paths:
        if task not in evaluate.tasks:
            yield Objection(
                ("evaluate.task_paths", "evaluate.tasks"),
                f"{task} is none of evaluate.tasks, which are {', '.join(evaluate.tasks)}",
            )
    personal = recipe.client.shared != "all" and "federated" in recipe.arms
    if evaluate.task_clients is not None and "local" not in recipe.arms and not personal:
        yield Objection(
            ("evaluate.task_clients", "arms"),
            f"{evaluate.task_clients} would have no effect: no client has a model of its own in these arms",
        )
    if personal and recipe.runtime.kind == "loopback":
        yield Objection(
            ("evaluate.tasks", "runtime.kind", "client.shared"),
            f"{yaml_value(evaluate.tasks)}, but with runtime.kind loopback what is not shared never leaves a client, "
            "and the benchmarks are not there: runtime.kind: batched",
        )


_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*(?::[\w./-]+)*")
_NOT_TEXT = re.compile(r"(?i:y|n|yes|no|on|off|true|false|null|none|\.inf|\.nan|[-+.]?\d.*)")


def yaml_value(value: object) -> str:
    """A value as YAML on one line, so that YAML 1.1 and 1.2 readers agree on what it is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return repr(value)
        mantissa, exponent = f"{value!r}e0".split("e")[:2] if "e" in repr(value) else _scientific(value)
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+03d}"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and not _NOT_TEXT.fullmatch(value) else _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml_value(key)}: {yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(yaml_value(item) for item in value) + "]"
    raise TypeError(f"no YAML for {type(value).__name__}")


def _quoted(text: str) -> str:
    """Text in double quotes. Not JSON's escapes: JSON writes what lies beyond 16 bits as pairs, which YAML does not."""

    def escaped(char: str) -> str:
        if char in '"\\':
            return f"\\{char}"
        return char if char.isprintable() else f"\\U{ord(char):08x}"

    return f'"{"".join(map(escaped, text))}"'


def _scientific(value: float) -> tuple[str, str]:
    exponent = math.floor(math.log10(abs(value)))
    for digits in range(17):  # the shortest that reads back as the same number
        text = f"{value:.{digits}e}"
        if float(text) == value:
            mantissa, power = text.split("e")
            return mantissa, power
    return repr(value / 10**exponent), str(exponent)


def _said(block: BaseModel) -> dict[str, Any]:
    """Keys worth writing: all but those that are `None` (or empty) because they do not apply."""
    values: dict[str, Any] = {}
    for key, field in type(block).model_fields.items():
        value = getattr(block, key)
        if isinstance(value, BaseModel):
            value = _said(value)
        elif (value is None and field.default is None) or value in ({}, []) or (key == "path" and not value):
            continue
        values[key] = value
    if isinstance(block, Recipe) and block.split.kind == "natural":
        del values["data"]["val_set_size"]  # the task brings its own
    return values


def resolved_yaml(recipe: Recipe, schema: str = "recipe.schema.json") -> str:
    """The recipe with everything settled, as YAML that reads back as the same recipe.

    Args:
        schema: where editors find the JSON schema, from the file's own folder.
    """
    lines = [f"# yaml-language-server: $schema={schema}"]
    for key, value in _said(recipe).items():
        if key in BLOCKS:
            lines.append(f"{key}:")
            lines.extend(f"  {leaf}: {yaml_value(item)}" for leaf, item in value.items())
        else:
            lines.append(f"{key}: {yaml_value(value)}")
    return "\n".join(lines) + "\n"


def resolved_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe with everything settled, as JSON values: the same keys as `resolved_yaml`."""
    return _said(recipe)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "fedloom recipe"
    return schema


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: a YAML file, a run folder, or the name of a packaged recipe.
        overrides: `k=v`, `--k=v`, or `--k` followed by its value; later ones win over earlier ones and the file.

    Raises:
        UserError: the file cannot be read, or its values are wrong; the message lists every objection.
    """
    from fedloom.study.load import read_recipe

    return read_recipe(path, overrides).recipe
