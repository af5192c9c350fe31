"""Each method and adapter kind on the built-in model and task, three rounds: the losses are those once written down.

A changed formula, draw or default shows here. Where the change is meant: `pytest tests/invariants/test_pinned.py
--rewrite`, and read the difference of the file before committing it. float64, norms and rotary positions too, which
transformers has in float32: else another processor, or another order of sums, shows after three rounds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from torch import Tensor
from transformers.models.llama import modeling_llama

from fedloom.models.load import load_base
from fedloom.models.rows import Rows
from fedloom.rounds import initial_state, run_round
from fedloom.study import build
from fedloom.study.methods import METHODS
from fedloom.study.recipe import Recipe

FILE = Path(__file__).parent / "pinned_losses.json"
PINNED: Mapping[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
CASES = {case.name: case.values for case in zoo.cases() if case.name in METHODS or case.name.startswith("adapter ")}
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotary positions of Llama in the model's own type."""

    def norm(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        return out

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.head_dim
        inverse = self.config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=x.dtype) / size)
        angles = position_ids[:, :, None].to(x.dtype) * inverse
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)


@functools.lru_cache(maxsize=1)
def built_in() -> Any:
    return load_base("builtin", dtype="float64")


def losses_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What clients lost while training, round by round, and what their models lose after it."""
    recipe = Recipe.model_validate(zoo.on_built_in(values))
    federation = zoo.federation_of(recipe, built_in().tokenizer)
    base = zoo.copy_of(built_in())
    algorithm, adapter = zoo.algorithm_of(recipe, built_in().tokenizer), build.adapter_of(base, recipe)
    evaluation = zoo.evaluation_of(recipe, built_in().tokenizer)
    runtime = build.runtime_of(
        recipe, federation, "federated", base, lambda: zoo.copy_of(built_in()), {"loss": evaluation}
    )
    population = build.population_of(federation, recipe, "federated")
    state, training = initial_state(algorithm, adapter, recipe.seed), []
    for round in range(recipe.rounds):
        cohort = [population.open(client, round) for client in population.ids]
        state, report = run_round(algorithm, adapter, runtime, state, cohort)
        training.append(report.metrics["loss_sum"] / report.metrics["target_tokens"])
    clients = [client._replace(batches=()) for client in cohort]
    found = runtime.evaluate(algorithm, adapter, state, clients, evaluation)
    return {"training": training, "after": [row["loss_sum"] / row["target_tokens"] for row in found.values()]}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_written_down(name: str, request: pytest.FixtureRequest) -> None:
    found = losses_of(CASES[name])
    if request.config.getoption("--rewrite"):
        pinned = json.loads(FILE.read_text()) if FILE.exists() else {}
        rounded = {key: [float(f"{value:.10g}") for value in values] for key, values in found.items()}
        kept = {one: pinned[one] for one in pinned if one in CASES}
        FILE.write_text(json.dumps(dict(sorted({**kept, name: rounded}.items())), indent=1) + "\n")
        return
    assert name in PINNED, f"{name} has no losses yet: pytest tests/invariants/test_pinned.py --rewrite -k '{name}'"
    assert found == {key: pytest.approx(values, rel=TOLERANCE) for key, values in PINNED[name].items()}


def test_nothing_is_pinned_that_is_gone(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--rewrite"):
        assert PINNED.keys() == CASES.keys(), "pytest tests/invariants/test_pinned.py --rewrite"


def test_methods_differ_from_one_another(request: pytest.FixtureRequest) -> None:
    """Else the pinned numbers of one say nothing about it."""
    if request.config.getoption("--rewrite"):
        return  # what was read is the old file
    seen: dict[str, str] = {}
    for name, losses in PINNED.items():
        same = seen.setdefault(json.dumps(losses), name)
        assert same == name, f"{name} and {same} have the same losses: a setting of one of them is not at work"


def test_losses_of_padded_rows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written down is of packed rows, where they pay."""
    monkeypatch.setattr(Rows, "way", "padded")
    found = losses_of(CASES["fedavg"])
    assert found == {key: pytest.approx(values, rel=1e-9) for key, values in PINNED["fedavg"].items()}
