"""Other tools' settings as a recipe: TRL (SFTConfig and its command line's YAML), Axolotl, LLaMA-Factory.

What has a counterpart is translated, what has none is listed with the reason, and nothing is dropped silently. A
federated run needs what no such file says (how many clients, how many rounds): those are put in and marked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from fedloom.errors import UserError
from fedloom.study.aliases import SAME_VALUES
from fedloom.study.recipe import BLOCKS, Recipe
from fedloom.study.settings import CLIENT_OPTIM_DEFAULTS
from fedloom.study.yaml_text import yaml_value

__all__ = ["Translated", "translate"]

ROUNDS = 10
CLIENTS = 4
LOCAL_STEPS = 30


@dataclass(frozen=True)
class Translated:
    """A recipe's text without its first line, and what became of each key."""

    tool: str
    text: str
    taken: tuple[tuple[str, str], ...]  # their key and value, ours
    dropped: tuple[tuple[str, str, str], ...]  # key, value, reason


# Keys that mean the same in all three.
_COMMON: Mapping[str, str] = {
    "lora_r": "adapter.lora_r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "learning_rate": "client.learning_rate",
    "gradient_accumulation_steps": "client.gradient_accumulation_steps",
    "gradient_checkpointing": "runtime.gradient_checkpointing",
    "max_grad_norm": "client.max_grad_norm",
    "weight_decay": "client.weight_decay",
    "adam_beta1": "client.adam_beta1",
    "adam_beta2": "client.adam_beta2",
    "adam_epsilon": "client.adam_epsilon",
    "seed": "seed",
    "report_to": "report_to",
    "trust_remote_code": "trust_remote_code",
}

_KEYS: Mapping[str, Mapping[str, str]] = {
    "TRL": {
        **_COMMON,
        "model_name_or_path": "model",
        "dataset_name": "data.path",
        "max_length": "data.max_length",
        "max_seq_length": "data.max_length",
        "per_device_train_batch_size": "client.per_device_train_batch_size",
        "per_device_eval_batch_size": "evaluate.eval_batch_size",
        "optim": "client.optim",
        "lr_scheduler_type": "client.lr_scheduler_type",
        "lora_target_modules": "adapter.lora_target_modules",
        "torch_dtype": "dtype",
        "dtype": "dtype",
    },
    "Axolotl": {
        **_COMMON,
        "base_model": "model",
        "sequence_len": "data.max_length",
        "micro_batch_size": "client.per_device_train_batch_size",
        "eval_batch_size": "evaluate.eval_batch_size",
        "optimizer": "client.optim",
        "lr_scheduler": "client.lr_scheduler_type",
        "lora_target_modules": "adapter.lora_target_modules",
        "val_set_size": "data.val_set_size",
        "train_on_inputs": "data.train_on_inputs",
        "adam_beta1": "client.adam_beta1",
        "wandb_project": "project",
        "adapter": "adapter.kind",
    },
    "LLaMA-Factory": {
        **_COMMON,
        "model_name_or_path": "model",
        "cutoff_len": "data.max_length",
        "max_samples": "data.limit",
        "lora_rank": "adapter.lora_r",
        "lora_target": "adapter.lora_target_modules",
        "per_device_train_batch_size": "client.per_device_train_batch_size",
        "per_device_eval_batch_size": "evaluate.eval_batch_size",
        "optim": "client.optim",
        "lr_scheduler_type": "client.lr_scheduler_type",
        "val_size": "data.val_set_size",
        "train_on_prompt": "data.train_on_inputs",
        "finetuning_type": "adapter.kind",
        "freeze_trainable_layers": "adapter.trainable_layers",
    },
}

# Keys that no other tool has; the one with most of them in the file is taken to be its author.
_MARKS: Mapping[str, frozenset[str]] = {
    "Axolotl": frozenset({"base_model", "datasets", "micro_batch_size", "sequence_len", "lr_scheduler",
                          "sample_packing", "flash_attention", "wandb_project", "lora_target_linear", "load_in_8bit",
                          "adapter"}),
    "LLaMA-Factory": frozenset({"stage", "finetuning_type", "template", "cutoff_len", "lora_rank", "lora_target",
                                "overwrite_cache", "preprocessing_num_workers", "dataset_dir", "do_train",
                                "plot_loss"}),
    "TRL": frozenset({"dataset_name", "use_peft", "model_name_or_path", "max_length", "max_seq_length", "packing",
                      "completion_only_loss", "assistant_only_loss", "dataset_text_field", "eos_token", "push_to_hub"}),
}  # fmt: skip

_REASONS: Mapping[str, str] = {
    "output_dir": "a federated run gets a folder of its own",
    "logging_dir": "trackers write into the run folder or their own",
    "logging_steps": "a row is written for every round",
    "eval_strategy": "evaluate.eval_rounds says when",
    "evaluation_strategy": "evaluate.eval_rounds says when",
    "eval_steps": "counted in rounds: evaluate.eval_rounds",
    "evals_per_epoch": "counted in rounds: evaluate.eval_rounds",
    "save_strategy": "checkpoint.save_rounds says when",
    "save_steps": "counted in rounds: checkpoint.save_rounds",
    "saves_per_epoch": "counted in rounds: checkpoint.save_rounds",
    "warmup_steps": "counted in rounds: client.warmup_rounds",
    "warmup_ratio": "counted in rounds: client.warmup_rounds",
    "num_train_epochs": "a federated run has rounds of local steps",
    "num_epochs": "a federated run has rounds of local steps",
    "max_steps": "a federated run has rounds of local steps",
    "packing": "not here: rows are sorted by length instead",
    "sample_packing": "not here: rows are sorted by length instead",
    "eval_sample_packing": "not here: rows are sorted by length instead",
    "pad_to_sequence_len": "not here: batches are padded to their longest row",
    "flash_attention": "the model's own choice of attention is used",
    "attn_implementation": "the model's own choice of attention is used",
    "group_by_length": "always done",
    "deepspeed": "not here",
    "fsdp": "not here",
    "push_to_hub": "nothing is sent anywhere",
    "hub_model_id": "nothing is sent anywhere",
    "use_peft": "adapter.kind says what is trained",
    "template": "the tokenizer's own template is used: data.chat_template",
    "stage": "supervised fine-tuning",
    "do_train": "always",
    "model_type": "found from the model",
    "tokenizer_type": "found from the model",
    "tf32": "always on where a GPU has it, for what is float32",
}

# Values that change the training so much that dropping them must be said louder.
_SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant"}


def translate(path: Path) -> Translated:
    """Read another tool's settings file.

    Raises:
        UserError: it cannot be read, or no tool's keys are in it.
    """
    settings = _read(path)
    tool = _tool_of(settings, path)
    ours: dict[str, Any] = {}
    taken: list[tuple[str, str]] = []
    dropped: list[tuple[str, str, str]] = []

    def take(key: str, value: Any, target: str, made: Any) -> None:
        ours[target] = made
        taken.append((f"{key}: {_short(value)}", f"{target}: {yaml_value(made)}"))

    for key, value in settings.items():
        if value is None or value in ("", [], {}):
            continue
        special = _SPECIAL.get(key)
        if special is not None and (made := special(tool, value)) is not None:
            for target, converted in made.items():
                take(key, value, target, converted)
            if not made:
                taken.append((f"{key}: {_short(value)}", "as it is without a word"))
            if isinstance(value, list):
                dropped += [(f"{key}[{place}]", _short(item), "one data set is taken, the first")
                            for place, item in enumerate(value[1:], 2)]  # fmt: skip
            continue
        counterpart = _KEYS[tool].get(key)
        if counterpart is None or special is not None:
            dropped.append((key, _short(value), _REASONS.get(key, "no counterpart here")))
            continue
        sound = _sound(counterpart, value)
        if sound is None:
            dropped.append((key, _short(value), f"{counterpart} has no such value"))
        else:
            take(key, value, counterpart, sound[0])
    if "project" in ours:  # Axolotl turns Weights & Biases on by naming its project
        ours.setdefault("report_to", ["wandb"])
    optim = ours.get("client.optim", "adamw")
    for key in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        if key not in CLIENT_OPTIM_DEFAULTS[optim] and f"client.{key}" in ours:
            dropped.append((key, _short(ours.pop(f"client.{key}")), f"{optim} has no such setting"))
            taken = [row for row in taken if not row[1].startswith(f"client.{key}:")]
    return Translated(tool, _write(tool, path, ours), tuple(taken), tuple(dropped))


def _read(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", code="init.from") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", code="init.from") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}", code="init.from") from error
    except YAMLError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: not YAML: {first}", "JSON and YAML settings are read", "init.from") from error
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: no settings in it", "expected keys and values", "init.from")
    return {str(key): item for key, item in value.items()}


def _tool_of(settings: Mapping[str, Any], path: Path) -> str:
    if set(settings) & set(BLOCKS) - {"adapter"} and any(isinstance(settings.get(block), dict) for block in BLOCKS):
        raise UserError(f"{path}: this is a fedloom recipe already", f"fedloom validate {path}", "init.from")
    hits = {tool: len(marks & set(settings)) for tool, marks in _MARKS.items()}
    best = max(hits, key=lambda tool: hits[tool])
    if hits[best] == 0:
        shown = ", ".join(list(settings)[:8])
        raise UserError(
            f"{path}: its keys ({shown}) are not those of TRL, Axolotl or LLaMA-Factory",
            "fedloom init DATA --model M writes a recipe from your data",
            "init.from",
        )
    return best


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sound(target: str, value: Any) -> tuple[Any] | None:
    """The value as the recipe has it, in a tuple; None where the recipe has no such value."""
    block, _, leaf = target.rpartition(".")
    field = (BLOCKS[block] if block else Recipe).model_fields[leaf]
    if isinstance(value, str):
        value = SAME_VALUES.get(target, {}).get(value, value)
        if target == "client.optim" and value.startswith(("adamw", "paged_adamw")):
            value = "adamw"
        if target == "client.lr_scheduler_type":
            value = _SCHEDULES.get(value, value)
        if target == "report_to" and value != "none":
            value = [name.strip() for name in value.split(",")]
        if target == "adapter.lora_target_modules" and value not in ("all-linear", "auto"):
            value = [name.strip() for name in value.split(",")]
    if target == "client.max_grad_norm" and value == 0:
        return (None,)
    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    try:
        return (TypeAdapter(annotation).validate_python(value),)
    except ValidationError:
        return None


def _precision(tool: str, value: Any) -> dict[str, Any] | None:
    if value == "auto":
        return {"dtype": "auto"}
    return {"dtype": "bfloat16"} if value is True else None


def _stored_in(kind: str) -> Callable[[str, Any], dict[str, Any] | None]:
    return lambda tool, value: {"quantization": kind} if value is True else {} if value in (False, None) else None


def _bits(tool: str, value: Any) -> dict[str, Any] | None:
    return {"quantization": {4: "nf4", 8: "int8"}[value]} if value in (4, 8) else None


def _half(tool: str, value: Any) -> dict[str, Any] | None:
    return {"dtype": "float16"} if value is True else {} if value in (False, "auto") else None


def _answer_only(tool: str, value: Any) -> dict[str, Any] | None:
    return {"data.train_on_inputs": not value} if isinstance(value, bool) else None


def _all_linear(tool: str, value: Any) -> dict[str, Any] | None:
    return {"adapter.lora_target_modules": "all-linear"} if value is True else None


def _datasets(tool: str, value: Any) -> dict[str, Any] | None:
    """Axolotl's list of data sets (one is taken); LLaMA-Factory's and TRL's name."""
    if isinstance(value, str):
        return {"data.path": value.split(",")[0].strip()}
    if not isinstance(value, list) or not value or not isinstance(value[0], dict) or "path" not in value[0]:
        return None
    first = value[0]
    path = first["path"]
    if path in ("json", "csv", "parquet") and first.get("data_files"):
        files = first["data_files"]
        path = files[0] if isinstance(files, list) else files
    found: dict[str, Any] = {"data.path": str(path)}
    kind = str(first.get("type", ""))
    if kind.startswith("alpaca"):
        found["data.type"] = "alpaca"
    elif kind in ("chat_template", "sharegpt") or "field_messages" in first:
        found["data.type"] = "chat"
        if first.get("field_messages"):
            found["data.columns"] = {"messages": str(first["field_messages"])}
    elif kind == "completion":
        found["data.type"] = "completion"
    return found


_SPECIAL: Mapping[str, Callable[[str, Any], dict[str, Any] | None]] = {
    "bf16": _precision,
    "fp16": _half,
    "load_in_4bit": _stored_in("nf4"),
    "load_in_8bit": _stored_in("int8"),
    "quantization_bit": _bits,
    "completion_only_loss": _answer_only,
    "assistant_only_loss": _answer_only,
    "lora_target_linear": _all_linear,
    "datasets": _datasets,
    "dataset": _datasets,
}

_PLACEHOLDER = {"model": "builtin", "data.path": "data.jsonl"}


def _write(tool: str, path: Path, ours: Mapping[str, Any]) -> str:
    values: dict[str, Any] = {**ours}
    missing = [key for key in _PLACEHOLDER if key not in values]
    for key in missing:
        values[key] = _PLACEHOLDER[key]
    lines = [f"# From {tool}: {path.name}"]
    for key in ("model", "dtype", "quantization", "trust_remote_code"):
        if key in values:
            note = "    # not in the file: put yours here" if key in missing else ""
            lines.append(f"{key}: {yaml_value(values[key])}{note}")
    for block in ("data", "split", "adapter", "client", "runtime", "evaluate"):
        leaves = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{block}.")}
        if block == "split":
            lines += [
                "split:",
                "  kind: iid                     # not in the file; or by_category, by_column, dirichlet, files",
                f"  clients: {CLIENTS}".ljust(32) + "# not in the file",
            ]
            continue
        if not leaves:
            continue
        lines.append(f"{block}:")
        for leaf, value in leaves.items():
            note = "    # not in the file: put yours here" if f"{block}.{leaf}" in missing else ""
            lines.append(f"  {leaf}: {yaml_value(value)}{note}")
    lines += [
        "method: fedavg                  # not in the file",
        f"rounds: {ROUNDS}".ljust(32) + "# not in the file",
        f"local_steps: {LOCAL_STEPS}".ljust(32) + "# not in the file: optimiser steps per client and round",
    ]
    lines += [f"{key}: {yaml_value(values[key])}" for key in ("report_to", "project", "seed") if key in values]
    return "\n".join(lines) + "\n"
