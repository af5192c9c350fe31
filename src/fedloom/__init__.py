"""fedloom: federated fine-tuning of language models.

Parties with similar tasks and private data get one good model: `fedloom demo` shows it, `fedloom run RECIPE` does it,
and the names below are for programs. They are looked up when used, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.adapters import (
        Lora,
        bottleneck,
        dpo,
        full,
        last_layers,
        lora,
        p_tuning,
        prefix_tuning,
        prompt_tuning,
        seed_space,
        with_recompute,
        with_triton,
    )
    from fedloom.aggregates import fed_exp, fedex_lora, fednova, flex_lora, flora, het_lora, mean, q_fedavg, scaffold
    from fedloom.clients import (
        alternate,
        fednova_client,
        local_only,
        mezo_client,
        scaffold_client,
        sgd_client,
        split_personal,
        tells_start_loss,
        with_control,
        zo_client,
    )
    from fedloom.data import Federation, population, prepare
    from fedloom.errors import FedloomError, RunError, UserError
    from fedloom.models.load import Base, load_base
    from fedloom.optimizers import adagrad, adam, adamw, decay, sgd, yogi
    from fedloom.rounds import Sampling, federate, initial_state, run_round
    from fedloom.runtimes import ClientSite, batched, buffered, loopback, sequential, with_dropout, with_ranks
    from fedloom.seeds import seed_of
    from fedloom.servers import fed_adagrad, fed_adam, fed_avgm, fed_yogi, nesterov, optimize, replace
    from fedloom.study.blocks import DataRecipe, SplitRecipe
    from fedloom.study.recipe import Recipe, load_recipe
    from fedloom.study.run import run_recipe
    from fedloom.types import (
        Adapter,
        Aggregate,
        Algorithm,
        Client,
        ClientUpdate,
        Evaluation,
        Runtime,
        ServerUpdate,
        State,
        Transform,
    )

_HOMES = {
    "fedloom.adapters": (
        "Ia3",
        "Lora",
        "bottleneck",
        "dora",
        "dpo",
        "full",
        "ia3",
        "last_layers",
        "lora",
        "p_tuning",
        "prefix_tuning",
        "prompt_tuning",
        "seed_space",
        "with_recompute",
        "with_triton",
    ),
    "fedloom.aggregates": (
        "fed_exp",
        "fedex_lora",
        "fednova",
        "flex_lora",
        "flora",
        "het_lora",
        "mean",
        "q_fedavg",
        "scaffold",
    ),
    "fedloom.clients": (
        "alternate",
        "fednova_client",
        "local_only",
        "mezo_client",
        "scaffold_client",
        "sgd_client",
        "split_personal",
        "tells_start_loss",
        "with_control",
        "zo_client",
    ),
    "fedloom.data": ("Federation", "population", "prepare"),
    "fedloom.errors": ("FedloomError", "RunError", "UserError"),
    "fedloom.models.load": ("Base", "load_base"),
    "fedloom.optimizers": ("adagrad", "adam", "adamw", "decay", "sgd", "yogi"),
    "fedloom.rounds": ("Sampling", "federate", "initial_state", "run_round"),
    "fedloom.runtimes": ("ClientSite", "batched", "buffered", "loopback", "sequential", "with_dropout", "with_ranks"),
    "fedloom.seeds": ("seed_of",),
    "fedloom.servers": ("fed_adagrad", "fed_adam", "fed_avgm", "fed_yogi", "nesterov", "optimize", "replace"),
    "fedloom.study.recipe": ("DataRecipe", "Recipe", "SplitRecipe", "load_recipe"),
    "fedloom.study.run": ("run_recipe",),
    "fedloom.types": (
        "Adapter",
        "Aggregate",
        "Algorithm",
        "Client",
        "ClientUpdate",
        "Evaluation",
        "Runtime",
        "ServerUpdate",
        "State",
        "Transform",
    ),
}

__all__ = [
    "Adapter",
    "Aggregate",
    "Algorithm",
    "Base",
    "Client",
    "ClientSite",
    "ClientUpdate",
    "DataRecipe",
    "Evaluation",
    "Federation",
    "FedloomError",
    "Lora",
    "Recipe",
    "RunError",
    "Runtime",
    "Sampling",
    "ServerUpdate",
    "SplitRecipe",
    "State",
    "Transform",
    "UserError",
    "adagrad",
    "adam",
    "adamw",
    "alternate",
    "batched",
    "bottleneck",
    "buffered",
    "decay",
    "dpo",
    "fed_adagrad",
    "fed_adam",
    "fed_avgm",
    "fed_exp",
    "fed_yogi",
    "federate",
    "fedex_lora",
    "fednova",
    "fednova_client",
    "flex_lora",
    "flora",
    "full",
    "het_lora",
    "initial_state",
    "last_layers",
    "load_base",
    "load_recipe",
    "local_only",
    "loopback",
    "lora",
    "mean",
    "mezo_client",
    "nesterov",
    "optimize",
    "p_tuning",
    "population",
    "prefix_tuning",
    "prepare",
    "prompt_tuning",
    "q_fedavg",
    "replace",
    "run_recipe",
    "run_round",
    "scaffold",
    "scaffold_client",
    "seed_of",
    "seed_space",
    "sequential",
    "sgd",
    "sgd_client",
    "split_personal",
    "tells_start_loss",
    "with_control",
    "with_dropout",
    "with_ranks",
    "with_recompute",
    "with_triton",
    "yogi",
    "zo_client",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
