"""Every method with every other name of the tables: a pair runs a round, or the recipe refuses it and says why.

docs/matrix.md is made here: `pytest tests/invariants/test_matrix.py --rewrite`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from tests import zoo

from fedloom.rounds import initial_state, run_round
from fedloom.study import build
from fedloom.study.blocks import AggregateRecipe
from fedloom.study.methods import METHODS
from fedloom.study.recipe import Recipe

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
RUNS, OWN = "yes", "own"


def columns() -> dict[str, dict[str, Mapping[str, Any]]]:
    """Table title -> column -> the keys that ask for it."""
    names = zoo.tables()
    weightings = get_args(AggregateRecipe.model_fields["weighting"].annotation)
    return {
        "adapter.kind": {name: zoo.alone("adapter", name) for name in names["adapter"]},
        "aggregate.kind": {name: zoo.alone("aggregate", name) for name in names["aggregate"]},
        "aggregate.weighting": {name: {"aggregate": {"weighting": name}} for name in weightings},
        "client.kind": {name: zoo.alone("client", name) for name in names["client"]},
        "client.optim": {name: zoo.alone("client optimiser", name) for name in names["client optimiser"]},
        "server.kind": {name: zoo.alone("server", name) for name in names["server"] if name != "optimize"},
        "server.server_optim": {name: zoo.alone("server optimiser", name) for name in names["server optimiser"]},
        "compress.up": {name: zoo.alone("compress up", name) for name in names["compress up"]},
        "compress.down": {name: zoo.alone("compress down", name) for name in names["compress down"]},
        "other": {
            "ranks that differ": {"adapter": {"client_ranks": "uniform"}},
            "preference pairs": {"data": {"path": str(zoo.folder() / "pairs.json"), "type": "preference"}},
        },
    }


def outcome(method: str, keys: Mapping[str, Any]) -> str:
    """RUNS, OWN or the reason why not. Whatever else happens is raised."""
    plain = zoo.values_of(method)
    values = zoo.values_of(method, **keys)
    for one in (plain, values):
        one.update(local_epochs=None, local_steps=1)
    reason = zoo.refusal(values)
    if reason is not None:
        return reason
    recipe = Recipe.model_validate(values)
    one_round(recipe)
    return OWN if recipe == Recipe.model_validate(plain) else RUNS


def one_round(recipe: Recipe) -> None:
    federation = zoo.federation_of(recipe)
    base = zoo.new_base()
    algorithm, adapter = zoo.algorithm_of(recipe), build.adapter_of(base, recipe)
    runtime = build.runtime_of(recipe, federation, "federated", base, zoo.new_base, {})
    population = build.population_of(federation, recipe, "federated")
    cohort = [population.open(client, 0) for client in list(population.ids)[:2]]
    state = initial_state(algorithm, adapter, recipe.seed)
    _, report = run_round(algorithm, adapter, runtime, state, cohort)
    assert not report.failed, report.failed


@functools.lru_cache(maxsize=1)
def outcomes() -> dict[str, dict[tuple[str, str], str]]:
    return {
        title: {
            (method, name): outcome(method, zoo.merged(keys, zoo.NEEDS.get(f"{title}/{name}", {})))
            for method in METHODS
            for name, keys in names.items()
        }
        for title, names in columns().items()
    }


def document() -> str:
    """The matrix with a number where there is a reason against it."""
    reasons: dict[str, int] = {}
    lines = [
        "# Which method goes with what",
        "",
        "Each method of `fedloom ls methods` with one other setting at a time: `yes` has run a round on a tiny model,",
        "`own` is what the method does anyway, a number is the reason why the recipe is refused. Made by",
        "`pytest tests/invariants/test_matrix.py --rewrite`; a test tells when it is out of date.",
    ]
    for title, found in outcomes().items():
        names = list(dict.fromkeys(name for _, name in found))
        lines += ["", f"## {title}" if title != "other" else "## Other", ""]
        lines += ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for method in METHODS:
            cells = [found[method, name] for name in names]
            # one reason for all columns: what is refused is what the column asks for
            told = [
                cell
                if cell in (RUNS, OWN)
                else str(reasons.setdefault(re.sub(rf"\b{name}\b(?!:)", "THIS", cell), len(reasons) + 1))
                for name, cell in zip(names, cells, strict=True)
            ]
            lines.append(f"| {method} | " + " | ".join(told) + " |")
    lines += ["", "## Reasons", "", "THIS is what the column asks for.", ""]
    lines += [f"{number}. {' '.join(reason.split())}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def test_each_pair_runs_or_is_refused_with_a_reason() -> None:
    """What is neither has raised; a reason names the key it is about and is a sentence of ours."""
    found = outcomes()
    for title, pairs in found.items():
        for (method, name), said in pairs.items():
            if said not in (RUNS, OWN):
                assert len(said) > 20 and ("." in said.split(":")[0] or "compose" in said), (title, method, name, said)
    assert {RUNS, OWN} <= {said for pairs in found.values() for said in pairs.values()}


def test_the_document_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--rewrite"):
        DOCUMENT.write_text(document(), encoding="utf-8")
    assert DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == document(), (
        "docs/matrix.md is not what the tables give now: pytest tests/invariants/test_matrix.py --rewrite"
    )
