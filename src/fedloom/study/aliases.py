"""Other tools' spellings, in one literal table. Tested row by row.

(a) `SAME`: the same meaning under another name, taken silently. `SAME_VALUES`: the same for values.
(b) `SAID`: another unit or the inverse; taken, and what was made of it is said.
(c) `REFUSED`: the same word with another meaning here; refused, with the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["REFUSED", "SAID", "SAME", "SAME_VALUES", "Said"]

# What a recipe says so far, by dotted key; for arithmetic in messages. Values may be missing.
Context = Mapping[str, Any]

SAME: Mapping[str, str] = {
    # model
    "base_model": "model",
    "model_name_or_path": "model",
    "model_name": "model",
    "model_id": "model",
    "torch_dtype": "dtype",
    # data
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "data_path": "data.path",
    "train_file": "data.path",
    "test_file": "data.test_path",
    "test_data_path": "data.test_path",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "val_size": "data.val_set_size",
    "max_samples": "data.limit",
    # split
    "client_num": "split.clients",
    "num_clients": "split.clients",
    "num_supernodes": "split.clients",
    "num_partitions": "split.clients",
    "dirichlet_alpha": "split.alpha",
    "partition_by": "split.column",
    # adapter
    "lora_rank": "adapter.lora_r",
    "rank": "adapter.lora_r",
    "r": "adapter.lora_r",
    "peft_lora_r": "adapter.lora_r",
    "peft_lora_alpha": "adapter.lora_alpha",
    "lora_target": "adapter.lora_target_modules",
    "target_modules": "adapter.lora_target_modules",
    "peft_type": "adapter.kind",
    # rounds
    "num_rounds": "rounds",
    "num_server_rounds": "rounds",
    "total_round_num": "rounds",
    "comm_round": "rounds",
    "sample_clients": "clients_per_round",
    "sample_client_num": "clients_per_round",
    "client_num_per_round": "clients_per_round",
    "local_update_steps": "local_steps",
    "algorithm": "method",
    "strategy": "method",
    "fed_alg": "method",
    # client
    "lr": "client.learning_rate",
    "optimizer": "client.optim",
    "micro_batch_size": "client.per_device_train_batch_size",
    "grad_accum_steps": "client.gradient_accumulation_steps",
    "gradient_clipping": "client.max_grad_norm",
    "grad_clip": "client.max_grad_norm",
    "lr_scheduler": "client.lr_scheduler_type",
    "adam_eps": "client.adam_epsilon",
    "proximal_mu": "client.prox_mu",
    "mu": "client.prox_mu",
    # server
    "server_lr": "server.server_learning_rate",
    "fedopt_eta": "server.server_learning_rate",
    "fedopt_beta1": "server.server_beta1",
    "fedopt_beta2": "server.server_beta2",
    "fedopt_tau": "server.server_tau",
    "server_optimizer": "server.server_optim",
    # evaluate
    "every": "evaluate.eval_rounds",
    "eval_every": "evaluate.eval_rounds",
    "metric_for_best_model": "evaluate.best_by",
    "patience": "evaluate.early_stopping_patience",
    "eval_tasks": "evaluate.tasks",
    "n_shot": "evaluate.num_fewshot",
    # the rest
    "per_device_eval_batch_size": "evaluate.eval_batch_size",
    "random_seed": "seed",
    "out": "output_dir",
    "outdir": "output_dir",
    "run_name": "name",
}

# By dotted key, then the other spelling of the value -> ours.
SAME_VALUES: Mapping[str, Mapping[str, str]] = {
    "dtype": {
        "fp32": "float32",
        "float": "float32",
        "bf16": "bfloat16",
        "fp16": "float16",
        "half": "float16",
        "fp64": "float64",
        "double": "float64",
    },
    "data.type": {
        "sharegpt": "chat",
        "chatml": "chat",
        "messages": "chat",
        "chat_template": "chat",
        "text": "completion",
    },
    "adapter.kind": {
        "LORA": "lora",
        "LoRA": "lora",
        "qlora": "lora",
        "DoRA": "dora",
        "IA3": "ia3",
        "freeze": "last_layers",
    },
    "adapter.lora_target_modules": {"all": "all-linear", "all_linear": "all-linear"},
    "client.optim": {
        "AdamW": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "Adam": "adam",
        "SGD": "sgd",
    },
    "method": {
        "FedAvg": "fedavg",
        "FedProx": "fedprox",
        "FedAvgM": "fedavgm",
        "FedAdam": "fedadam",
        "FedYogi": "fedyogi",
        "FedAdagrad": "fedadagrad",
        "DiLoCo": "diloco",
        "SCAFFOLD": "scaffold",
        "FedNova": "fednova",
        "FedBuff": "fedbuff",
        "QFedAvg": "qfedavg",
        "q_fedavg": "qfedavg",
    },
    "evaluate.best_by": {"eval_loss": "loss", "val_loss": "loss", "eval_score": "score"},
    "split.kind": {"by_files": "files", "lda": "dirichlet", "uniform": "iid"},
    "arms": {"all": "base, local, federated, global"},
}


class Said(NamedTuple):
    """A row of (b): the keys it stands for, how the value turns into theirs, and the sentence that says so."""

    keys: tuple[str, ...]
    convert: Callable[[Any, Context], Mapping[str, Any]]  # raises ValueError with a sentence
    says: str


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("true or false is expected")


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError("a number is expected")


def _bf16(value: Any, _: Context) -> Mapping[str, Any]:
    if value == "auto":
        return {"dtype": "auto"}
    return {"dtype": "bfloat16" if _truth(value) else "float32"}


def _fp16(value: Any, _: Context) -> Mapping[str, Any]:
    if value == "auto" or not _truth(value):
        return {}
    return {"dtype": "float16"}


def _share(value: Any, _: Context) -> Mapping[str, Any]:
    share = _number(value)
    if not 0 < share <= 1:
        raise ValueError("a share above 0 and at most 1 is expected")
    return {"clients_per_round": None if share == 1 else share}


def _warmup(value: Any, context: Context) -> Mapping[str, Any]:
    share, rounds = _number(value), context.get("rounds", 10)
    if not 0 <= share < 1:
        raise ValueError("a share of the run below 1 is expected")
    return {"client.warmup_rounds": round(share * rounds) if isinstance(rounds, int) else 0}


def _answer_only(value: Any, _: Context) -> Mapping[str, Any]:
    return {"data.train_on_inputs": not _truth(value)}


def _all_linear(value: Any, _: Context) -> Mapping[str, Any]:
    return {"adapter.lora_target_modules": "all-linear"} if _truth(value) else {}


def _stored_in(kind: str) -> Callable[[Any, Context], Mapping[str, Any]]:
    def convert(value: Any, _: Context) -> Mapping[str, Any]:
        return {"quantization": kind} if _truth(value) else {}

    return convert


def _bits(value: Any, _: Context) -> Mapping[str, Any]:
    kinds = {4: "nf4", 8: "int8"}
    if value not in kinds:
        raise ValueError("4 or 8 is expected")
    return {"quantization": kinds[value]}


def _uniform(value: Any, _: Context) -> Mapping[str, Any]:
    return {"aggregate.weighting": "uniform" if _truth(value) else "data"}


def _best_at_end(value: Any, _: Context) -> Mapping[str, Any]:
    return {"checkpoint.export": "best" if _truth(value) else "last"}


SAID: Mapping[str, Said] = {
    "load_best_model_at_end": Said(("checkpoint.export",), _best_at_end, "true is checkpoint.export: best"),
    "bf16": Said(("dtype",), _bf16, "true is dtype: bfloat16, false is dtype: float32"),
    "fp16": Said(("dtype",), _fp16, "true is dtype: float16, false needs no key here"),
    "fraction_fit": Said(("clients_per_round",), _share, "a share of the clients; 1.0 is all, which is null here"),
    "fraction_train": Said(("clients_per_round",), _share, "a share of the clients; 1.0 is all, which is null here"),
    "sample_client_rate": Said(
        ("clients_per_round",), _share, "a share of the clients; 1.0 is all, which is null here"
    ),
    "warmup_ratio": Said(("client.warmup_rounds",), _warmup, "a share of the run, turned into whole rounds"),
    "completion_only_loss": Said(("data.train_on_inputs",), _answer_only, "the inverse of train_on_inputs"),
    "assistant_only_loss": Said(("data.train_on_inputs",), _answer_only, "the inverse of train_on_inputs"),
    "lora_target_linear": Said(
        ("adapter.lora_target_modules",), _all_linear, "true is lora_target_modules: all-linear"
    ),
    "uniform_weight": Said(("aggregate.weighting",), _uniform, "true is aggregate.weighting: uniform"),
    "load_in_4bit": Said(("quantization",), _stored_in("nf4"), "true is quantization: nf4, false needs no key here"),
    "load_in_8bit": Said(("quantization",), _stored_in("int8"), "true is quantization: int8, false needs no key here"),
    "quantization_bit": Said(("quantization",), _bits, "4 is quantization: nf4, 8 is quantization: int8"),
}


def _max_steps(value: Any, context: Context) -> str:
    steps = context.get("local_steps")
    if isinstance(value, int) and isinstance(steps, int) and steps > 0 and value >= steps:
        rounds = max(1, round(value / steps))
        return (
            f"here a run has rounds of local steps: max_steps {rounds * steps} = {rounds} rounds x local_steps: {steps}"
        )
    return "here a run has rounds of local steps: max_steps 200 = 50 rounds x local_steps: 4"


def _epochs(value: Any, context: Context) -> str:
    rounds = context.get("rounds")
    if isinstance(value, int) and value > 0:
        if isinstance(rounds, int) and rounds > value:
            return (
                f"here a client passes over its rows in every round it takes part in: {value} passes over {rounds} "
                f"rounds is local_steps = {value} x batches per client / {rounds}, or rounds: {value} x local_epochs: 1"
            )
        return (
            "here a client passes over its rows in every round it takes part in: "
            f"{value} passes = rounds: {value} x local_epochs: 1 with all clients in each round"
        )
    return "here a client passes over its rows in every round: 3 passes = rounds: 3 x local_epochs: 1"


def _in_rounds(key: str, ours: str) -> Callable[[Any, Context], str]:
    def refuse(value: Any, context: Context) -> str:
        steps = context.get("local_steps")
        if isinstance(value, int) and isinstance(steps, int) and steps > 0:
            rounds = max(1, round(value / steps))
            return f"steps are counted per client and round here: {value} / local_steps {steps} = {ours}: {rounds}"
        return f"counted in rounds here: {ours}; {key} / local_steps = {ours}"

    return refuse


def _batch_size(value: Any, context: Context) -> str:
    batch = context.get("client.per_device_train_batch_size", 4)
    pieces = context.get("client.gradient_accumulation_steps", 1)
    clients = context.get("clients_per_round") or context.get("split.clients") or 4
    if not all(isinstance(number, int) for number in (batch, pieces, clients)):
        batch, pieces, clients = 4, 1, 4
    return (
        "per client or over all of them? client.per_device_train_batch_size "
        f"{batch} x gradient_accumulation_steps {pieces} = {batch * pieces} examples per step of a client, "
        f"x {clients} clients = {batch * pieces * clients} per step of a round"
    )


def _one_row_a_round(value: Any, context: Context) -> str:
    return "a row is written for every round, always: leave it out"


REFUSED: Mapping[str, Callable[[Any, Context], str]] = {
    "max_steps": _max_steps,
    "num_train_epochs": _epochs,
    "num_epochs": _epochs,
    "epochs": _epochs,
    "eval_steps": _in_rounds("eval_steps", "eval_rounds"),
    "save_steps": _in_rounds("save_steps", "save_rounds"),
    "warmup_steps": _in_rounds("warmup_steps", "warmup_rounds"),
    "logging_steps": _one_row_a_round,
    "batch_size": _batch_size,
    "train_batch_size": _batch_size,
}
