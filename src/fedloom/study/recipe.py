"""The recipe: what a run is asked to do, as validated values. Imports neither torch nor transformers.

The models below are the only list of keys: the command line, the JSON schema and docs/recipe.md are made from them.
A value that depends on others (the momentum of an optimiser that has one) is `None` until `fill` settles it, so a
resolved recipe says everything it uses and nothing it does not; a setting that would have no effect is an error.

Reading a recipe file, with every objection at once, is `fedloom.study.load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from fedloom.data.catalog import CATALOG, NamedSet
from fedloom.study.blocks import (
    AdapterRecipe,
    AggregateRecipe,
    Block,
    CheckpointRecipe,
    ClientRecipe,
    CompressRecipe,
    DataRecipe,
    DpoRecipe,
    EvaluateRecipe,
    RuntimeRecipe,
    ServerRecipe,
    SplitRecipe,
)
from fedloom.study.methods import METHODS, Method
from fedloom.study.objections import is_builtin, objections
from fedloom.study.settings import (
    ADAPTER_DEFAULTS,
    ADAPTER_LEARNING_RATES,
    AGGREGATE_DEFAULTS,
    CLIENT_OPTIM_DEFAULTS,
    COMPRESS_DEFAULTS,
    DEFAULT_CLIENTS,
    DEFAULT_SHARDS,
    DEFAULT_TEST_SHARE,
    DPO_DEFAULTS,
    LOSSY,
    RUNTIME_DEFAULTS,
    SERVER_OPTIM_DEFAULTS,
    ZEROTH_DEFAULTS,
    Arm,
    TrackerName,
)
from fedloom.study.yaml_text import yaml_value

__all__ = ["BLOCKS", "Recipe", "fill", "json_schema", "load_recipe", "resolved_json", "resolved_yaml"]


class Recipe(Block):
    """A run. Blocks may be left out; a leaf may also be written flat (`learning_rate: 2e-4`)."""

    name: str = Field("run", min_length=1, description="Default: the recipe file's name.")
    model: str = Field(min_length=1, description="A hub id, a folder, or `builtin`.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="What the frozen model computes in; `auto` is bfloat16 where the hardware has it, float16 (with "
        "loss scaling) on GPUs that have only that. Adapters are float32.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="What the frozen model's layers are stored in: `nf4` is QLoRA's 4 bits with double quantisation, "
        "`int8` 8 bits with a scale per row. Needs `fedloom[quant]`.",
    )
    data: DataRecipe = Field(default_factory=DataRecipe, description="Where the rows come from.")
    start_from: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="A run, or a PEFT folder of a LoRA adapter, that is merged into the model first: what is trained "
        "then is a new adapter on top, and the reference of `dpo` is the merged model. Only with adapter.kind lora.",
    )
    split: SplitRecipe = Field(default_factory=SplitRecipe, description="Who holds which rows.")
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe, description="What is trained.")
    method: Method = Field(
        "fedavg",
        description="Fills client, aggregate and server, for fedbuff runtime too; `fedloom cat` shows the result; a "
        "slot key replaces.",
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
    dpo: DpoRecipe = Field(default_factory=DpoRecipe, description="The loss on pairs of answers.")
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


BLOCKS: Mapping[str, type[Block]] = {
    "data": DataRecipe,
    "split": SplitRecipe,
    "adapter": AdapterRecipe,
    "client": ClientRecipe,
    "dpo": DpoRecipe,
    "aggregate": AggregateRecipe,
    "server": ServerRecipe,
    "compress": CompressRecipe,
    "runtime": RuntimeRecipe,
    "evaluate": EvaluateRecipe,
    "checkpoint": CheckpointRecipe,
}


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
        kind = settings.get("kind")
        if filled[slot].get("kind", kind) == kind:
            settle(filled[slot], settings)

    def row(table: Mapping[str, Mapping[str, Any]], name: object) -> Mapping[str, Any]:
        return table.get(name, {}) if isinstance(name, str) else {}

    adapter = filled["adapter"]
    own = dict(row(ADAPTER_DEFAULTS, adapter.get("kind", "lora")))
    if adapter.get("bottleneck_size") is not None:
        own.pop("reduction_factor", None)
    settle(adapter, own)
    if adapter.get("kind") in ADAPTER_LEARNING_RATES:
        settle(client, {"learning_rate": ADAPTER_LEARNING_RATES[adapter["kind"]]})
    if adapter.get("kind") == "seed_space":
        settle(adapter, {"direction_seed": filled.get("seed", 42)})
        if filled.get("dtype", "auto") == "auto":
            filled["dtype"] = "float32"  # steps are smaller than bfloat16 can tell apart
    settle(client, row(CLIENT_OPTIM_DEFAULTS, client.get("optim", "adamw")))
    if client.get("kind") in ZEROTH_DEFAULTS:
        settle(client, {**ZEROTH_DEFAULTS[client["kind"]], "max_grad_norm": None})
    if client.get("lr_scheduler_type", "cosine") in ("linear", "cosine"):
        settle(client, {"min_lr_ratio": 0.0})
    if data.get("type") == "preference":
        settle(filled["dpo"], {"loss_type": "sigmoid"})
        settle(filled["dpo"], row(DPO_DEFAULTS, filled["dpo"]["loss_type"]))
    compress = filled["compress"]
    both_ways = [kind for way in ("up", "down") if isinstance(compress.get(way), Sequence) for kind in compress[way]]
    for kind, settings in COMPRESS_DEFAULTS.items():
        if kind in both_ways:
            settle(compress, settings)
    if any(kind in both_ways for kind in LOSSY):
        settle(compress, {"error_feedback": "top_k" in both_ways or "low_rank" in both_ways})
    settle(filled["aggregate"], row(AGGREGATE_DEFAULTS, filled["aggregate"].get("kind", "mean")))
    if filled["aggregate"].get("weighting") == "loss":
        settle(filled["aggregate"], {"fair_q": 1.0})
    if server.get("kind") == "optimize":
        settle(server, row(SERVER_OPTIM_DEFAULTS, server.get("server_optim")))

    if data.get("name") is None and _named(data.get("path")) is not None:
        data["name"] = data["path"]
    if data.get("name") is not None and data.get("path") == data["name"]:
        data["path"] = ""
    named = _named(data.get("name"))
    if filled.get("model") == "builtin" and data.get("name") is None:
        settle(data, {"path": "builtin:skills"})
    if is_builtin(data.get("path")):
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
    settle(runtime, row(RUNTIME_DEFAULTS, runtime.get("kind", "batched")))
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


def _said(block: BaseModel) -> dict[str, Any]:
    """Keys worth writing: all but those that are `None` (or empty) because they do not apply."""
    values: dict[str, Any] = {}
    for key, field in type(block).model_fields.items():
        value = getattr(block, key)
        if isinstance(value, BaseModel):
            value = _said(value)
            if not value and key == "dpo":
                continue  # rows to imitate have none of it
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
            if not value:  # a block in which nothing applies
                continue
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
