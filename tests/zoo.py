"""The whole zoo, made from the tables: each method, adapter kind and slot of a recipe, on one tiny model and split.

Nothing is listed here by hand but `NEEDS`: what a name needs besides itself to be at work. What has no case fails
tests/invariants/test_zoo.py.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from pydantic import ValidationError

from fedloom.data.batches import eval_batches
from fedloom.data.federation import Federation, prepare
from fedloom.data.tokens import pad_id_of
from fedloom.errors import UserError
from fedloom.evaluate.loss import loss_evaluation
from fedloom.models.load import Base, random_base
from fedloom.runtimes import ClientSite
from fedloom.study import build
from fedloom.study.methods import METHODS
from fedloom.study.recipe import Recipe
from fedloom.study.settings import ADAPTER_DEFAULTS, DownCompression
from fedloom.types import Algorithm, Evaluation

# What a name of a table needs besides itself so that a recipe takes it and it does something: "TABLE/NAME" -> keys.
NEEDS: Mapping[str, Mapping[str, Any]] = {}

# Settings that make any adapter small; each is said where the kind has it.
SMALL: Mapping[str, Any] = {"lora_r": 4, "lora_alpha": 8.0, "num_virtual_tokens": 3, "encoder_hidden_size": 8}

WORDS = ("apple", "stone", "river", "cloud", "horse", "bread")
SIZES = {"few": 2, "many": 5, "some": 3}  # rows of each client: other numbers of steps, ragged batches


class UnknownName(Exception):
    """A table of study/build.py has a name that a recipe (study/blocks.py, settings.py, methods.py) does not know."""


class Case(NamedTuple):
    """A recipe, as the values that it is made of."""

    name: str
    values: Mapping[str, Any]


# ---- model and data --------------------------------------------------------------------------------------------------


def text_of(i: int) -> tuple[str, str]:
    return f"say {WORDS[i % 6]}" + " now" * (i % 3), f"{WORDS[i % 6]} {WORDS[(i * 5 + 1) % 6]}"


@functools.lru_cache(maxsize=1)
def folder() -> Path:
    """Where the rows lie; gone with the process."""
    place = Path(tempfile.mkdtemp(prefix="fedloom-zoo-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    answers, pairs = [], []
    for category, size in SIZES.items():
        for _ in range(size):
            i = len(answers)
            prompt, answer = text_of(i)
            answers.append({"prompt": prompt, "completion": answer, "category": category})
            worse = " ".join(reversed(answer.split())) + " no" * (1 + i % 2)
            pairs.append({"prompt": prompt, "chosen": answer, "rejected": worse, "category": category})
    (place / "answers.json").write_text(json.dumps(answers))
    (place / "pairs.json").write_text(json.dumps(pairs))
    return place


@functools.lru_cache(maxsize=1)
def _base() -> Base:
    base = random_base(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        vocab_size=300,
        text=WORDS * 20,
        dtype=torch.float64,
        max_positions=96,
    )
    with torch.no_grad():
        for weight in base.model.parameters():
            if weight.ndim == 2:  # so that a random model has opinions, and gradients are not tiny
                weight.mul_(12.0)
    return base


def copy_of(base: Base) -> Base:
    """A model of its own: an adapter hooks into it, and may change its weights."""
    model: Any = base.model
    return replace(base, model=copy.deepcopy(model, {id(model.config): model.config}))


def new_base() -> Base:
    return copy_of(_base())


_federations: dict[str, Federation] = {}


def federation_of(recipe: Recipe, tokenizer: Any = None) -> Federation:
    key = f"{recipe.data} {recipe.split} {id(tokenizer)}"
    if key not in _federations:
        _federations[key] = prepare(recipe.data, recipe.split, tokenizer or _base().tokenizer, recipe.seed)
    return _federations[key]


def evaluation_of(recipe: Recipe, tokenizer: Any = None) -> Evaluation:
    """The loss of each client's model on its own rows."""
    federation = federation_of(recipe, tokenizer)
    pad_id = pad_id_of(federation.tokenizer)
    return loss_evaluation(
        "loss", lambda client: eval_batches(federation.clients[client].train, batch_size=4, pad_id=pad_id)
    )


def algorithm_of(recipe: Recipe, tokenizer: Any = None) -> Algorithm:
    """As a run composes it, who knows the whole population."""
    weight = build.population_weight_of(recipe, federation_of(recipe, tokenizer))
    return build.algorithm_of(recipe, population_weight=weight)


def site_of(recipe: Recipe, client: str) -> ClientSite:
    """Where a client's data is, as study/build.py sets it up for the loopback."""
    return ClientSite(
        client,
        lambda: (build.algorithm_of(recipe), build.adapter_of(new_base(), recipe)),
        lambda round: build.population_of(federation_of(recipe), recipe, "federated").open(client, round),
        {"loss": evaluation_of(recipe)},
        build.rank_of(recipe, client),
    )


def serve(connection: Any) -> None:
    """Another process: clients with their own models, who answer bytes with bytes. A recipe as JSON begins anew."""
    torch.set_num_threads(1)
    sites: dict[str, ClientSite] = {}
    recipe = None
    while (client := connection.recv_bytes().decode()) != "end":
        said = connection.recv_bytes()
        if client == "recipe":
            values = json.loads(said)
            values["data"]["path"] = str(folder() / Path(values["data"]["path"]).name)
            recipe, sites = Recipe.model_validate(values), {}
            connection.send_bytes(b"ready")
            continue
        if client not in sites:
            sites[client] = site_of(recipe, client)
        connection.send_bytes(sites[client].serve(said))


# ---- recipes ---------------------------------------------------------------------------------------------------------


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Values of recipes, later ones in place of earlier ones, block by block."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, Mapping) else value
    return whole


def values_of(method: str, kind: str | None = None, **more: Any) -> dict[str, Any]:
    """A tiny recipe of a method with an adapter kind (its own where none is named)."""
    natural = METHODS[method].get("adapter", {}).get("kind", "lora")
    kind = kind or more.get("adapter", {}).get("kind") or natural
    return merged(
        {
            "model": "tiny",
            "dtype": "float64",
            "data": {"path": str(folder() / "answers.json"), "max_length": 96, "val_set_size": 0, "cache": False},
            "split": {"kind": "by_category"},
            "method": method,
            "adapter": {"kind": kind, **{k: v for k, v in SMALL.items() if k in ADAPTER_DEFAULTS.get(kind, {})}},
            "rounds": 3,
            "local_epochs": 1,
            "client": {"learning_rate": 2e-2, "per_device_train_batch_size": 2},
            "arms": ["federated"],
            "evaluate": {"score": "none", "eval_rounds": 0},
            "runtime": {"threads": 1},
            "seed": 3,
        },
        NEEDS.get(f"method/{method}", {}),
        NEEDS.get(f"adapter/{kind}", {}),
        more,
    )


def on_built_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same method on the built-in model and task, with few rows."""
    own = {"path": "builtin:skills", "max_length": 256, "limit": 24, "cache": False}
    if values["data"].get("type", "auto") != "auto":
        own["type"] = values["data"]["type"]
    changed = {"model": "builtin", "data": None, "split": {"kind": "quantity_skew", "alpha": 1.0, "clients": 3}}
    own_rate = METHODS[values["method"]].get("client", {}).get("learning_rate")
    if own_rate is not None:  # steps without gradients are far smaller than those that suit all others
        changed["client"] = {"learning_rate": own_rate}
    return {**merged(values, changed), "data": {**own, "val_set_size": 0}}


def refusal(values: Mapping[str, Any]) -> str | None:
    """Why a recipe of these values is refused, as a user reads it; None where it is taken.

    Only objections to the composition count: a value that a recipe does not know at all raises UnknownName.
    """
    try:
        recipe = Recipe.model_validate(values)
        build.algorithm_of(recipe)
        build.adapter_of(new_base(), recipe)
    except ValidationError as error:
        wrong = [one for one in error.errors() if one["type"] != "value_error" or one["loc"]]
        if wrong:
            raise UnknownName("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong)) from error
        return "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
    except UserError as error:
        return error.message
    return None


def problem(values: Mapping[str, Any]) -> str | None:
    """`refusal`, with unknown names as a reason, too."""
    try:
        return refusal(values)
    except UnknownName as error:
        return f"the recipe does not know it: {error}"


def reached(recipe: Recipe) -> set[str]:
    """The names of the tables that are at work in a recipe, as "TABLE/NAME"."""
    names = {
        f"method/{recipe.method}",
        f"adapter/{recipe.adapter.kind}",
        f"client/{recipe.client.kind}",
        f"client optimiser/{recipe.client.optim}",
        f"aggregate/{recipe.aggregate.kind}",
        f"server/{recipe.server.kind}",
        *(f"compress up/{kind}" for kind in recipe.compress.up),
        *(f"compress down/{kind}" for kind in recipe.compress.down),
    }
    return names | ({f"server optimiser/{recipe.server.server_optim}"} if recipe.server.server_optim else set())


def tables() -> dict[str, list[str]]:
    """Every name of every table of study/build.py and study/methods.py."""
    return {
        "method": list(METHODS),
        "adapter": list(build.ADAPTERS),
        "client": list(build.CLIENTS),
        "client optimiser": list(build.CLIENT_OPTIMIZERS),
        "aggregate": list(build.AGGREGATES),
        "server": list(build.SERVERS),
        "server optimiser": list(build.SERVER_OPTIMIZERS),
        "compress up": list(build.COMPRESS),
        "compress down": list(get_args(DownCompression)),
    }


def alone(table: str, name: str) -> dict[str, Any]:
    """The recipe keys that ask for one name of a table."""
    return {
        "adapter": {"adapter": {"kind": name}},
        "client": {"client": {"kind": name}},
        "client optimiser": {"client": {"optim": name}},
        "aggregate": {"aggregate": {"kind": name}},
        "server": {"server": {"kind": name}},
        "server optimiser": {"server": {"kind": "optimize", "server_optim": name}},
        "compress up": {"compress": {"up": [name]}},
        "compress down": {"compress": {"down": [name]}},
    }[table]


def cases() -> Iterator[Case]:
    """Every method, then `fedavg` with each name of a table that no recipe before has at work."""
    done: set[str] = set()
    for method in METHODS:
        values = values_of(method)
        yield Case(method, values)
        if problem(values) is None:
            done |= reached(Recipe.model_validate(values))
    for table, names in tables().items():
        for name in names:
            if f"{table}/{name}" not in done:
                values = values_of("fedavg", **merged(alone(table, name), NEEDS.get(f"{table}/{name}", {})))
                yield Case(f"{table} {name}", values)
                if problem(values) is None:
                    done |= reached(Recipe.model_validate(values))
