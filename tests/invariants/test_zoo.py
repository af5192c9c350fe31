"""What every method, adapter kind and slot must hold, made from a recipe as a run makes it.

sequential == batched == messages == two processes, whatever the cohort's order; resumed == uninterrupted, bit for bit;
a round leaves the state it started from as it was. Of a method with a runtime of its own, all but messages. The cases
come from the tables (tests/zoo.py), so that a new name is in here by itself.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo

from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import loopback
from fedloom.study import build, checkpoint
from fedloom.study.methods import METHODS
from fedloom.study.recipe import Recipe
from fedloom.study.settings import LOSSY
from fedloom.tree import flatten
from fedloom.types import Client, Runtime, State

CASES = {case.name: case.values for case in zoo.cases()}
TOLERANCE = 1e-9  # float64
TOLERANCE_LOSSY = 1e-5  # what is decoded from casts and quantised tensors is float32


class Setting:
    """A recipe with an adapter of its own, as one process has it."""

    def __init__(self, values: Mapping[str, Any], **runtime: Any) -> None:
        own = METHODS[values["method"]].get("runtime", {})
        if own:  # a method that is a runtime of its own runs in no other, but in blocks of any size
            runtime = {"clients_per_batch": runtime.get("clients_per_batch", 1), **own}
        self.recipe = Recipe.model_validate(zoo.merged(values, {"runtime": runtime}))
        self.federation = zoo.federation_of(self.recipe)
        self.evaluation = zoo.evaluation_of(self.recipe)
        self.algorithm = zoo.algorithm_of(self.recipe)
        base = zoo.new_base()
        self.adapter = build.adapter_of(base, self.recipe)
        self.runtime = build.runtime_of(
            self.recipe, self.federation, "federated", base, zoo.new_base, {"loss": self.evaluation}
        )
        self.first = initial_state(self.algorithm, self.adapter, self.recipe.seed)

    def cohort(self, round: int) -> list[Client]:
        population = build.population_of(self.federation, self.recipe, "federated")
        return [population.open(client, round) for client in population.ids]

    def after(self, state: State, rounds: int, *, backwards: bool = False, runtime: Runtime | None = None) -> State:
        for _ in range(rounds):
            cohort = self.cohort(state.round)[:: -1 if backwards else 1]
            state, report = run_round(self.algorithm, self.adapter, runtime or self.runtime, state, cohort)
            assert not report.failed
        return state

    def losses(self, state: State, runtime: Runtime | None = None) -> dict[str, float]:
        """Of what each client would use: its own model where the method gives it one."""
        clients = [client._replace(batches=()) for client in self.cohort(0)]
        found = (runtime or self.runtime).evaluate(self.algorithm, self.adapter, state, clients, self.evaluation)
        return {client: row["loss_sum"] for client, row in found.items()}


def leaves(state: State) -> dict[str, torch.Tensor]:
    """All tensors of a state, copied."""
    parts = {"params": state.params, "server": state.server, "personal": dict(state.personal), "base": state.base}
    measured = "metric~1seconds"  # of what is still under way in an asynchronous round
    return {name: leaf.clone() for name, leaf in flatten(parts).items() if not name.endswith(measured)}


def bit_for_bit(a: State, b: State) -> bool:
    first, second = leaves(a), leaves(b)
    return first.keys() == second.keys() and all(torch.equal(leaf, second[name]) for name, leaf in first.items())


def check_equal(name: str, want: State, got: State, tolerance: float) -> None:
    """The parameters; what was merged into the base may be held as other factors, and shows in the losses."""
    assert want.params.keys() == got.params.keys()
    gaps = {key: float((leaf - got.params[key]).abs().max()) for key, leaf in want.params.items()}
    worst = max(gaps, key=lambda key: gaps[key])
    assert gaps[worst] < tolerance, f"{name}: {worst} differs by {gaps[worst]:.2e} from one client after the other"


@pytest.fixture(scope="module")
def other_process() -> Iterator[Any]:
    """A connection to a new interpreter that holds the clients: nothing of this process is in it."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=zoo.serve, args=(theirs,), daemon=True)
    process.start()
    yield mine
    mine.send_bytes(b"end")
    process.join(30)
    process.kill()


def there(connection: Any, recipe: Recipe) -> Runtime:
    """A runtime whose clients are at the other end of a connection."""

    def ask(client: str, raw: bytes) -> bytes:
        connection.send_bytes(client.encode())
        connection.send_bytes(raw)
        assert connection.poll(60), "the other process does not answer"
        answer: bytes = connection.recv_bytes()
        return answer

    ask("recipe", json.dumps(recipe.model_dump(exclude_unset=True)).encode())
    ids = zoo.federation_of(recipe).clients
    return loopback({client: lambda raw, client=client: ask(client, raw) for client in ids})


@pytest.mark.parametrize("name", CASES)
def test_invariants(name: str, other_process: Any, tmp_path: Path) -> None:
    values = CASES[name]
    plain = Setting(values, kind="sequential")
    lossy = {*plain.recipe.compress.up, *plain.recipe.compress.down} & set(LOSSY)
    tolerance = TOLERANCE_LOSSY if lossy else TOLERANCE
    start = plain.losses(plain.first)
    middle = plain.after(plain.first, 1)
    before = leaves(middle)
    want = plain.after(middle, 1)
    losses = plain.losses(want)
    assert all(abs(loss - start[client]) > 1e-7 for client, loss in losses.items()), "a client's model did not move"

    # a round leaves its state as it was, and does the same again
    assert leaves(middle).keys() == before.keys()
    assert all(torch.equal(leaf, before[key]) for key, leaf in leaves(middle).items()), "a round wrote into its state"

    # resumed from a file, with a new algorithm, adapter and model: bit for bit
    fresh = Setting(values, kind="sequential")
    checkpoint.save(tmp_path, middle, {}, 1, False)
    back, _ = checkpoint.load(tmp_path, fresh.first)
    assert bit_for_bit(middle, back), "a checkpoint does not come back as it was"
    assert bit_for_bit(want, fresh.after(back, 1)), "a resumed run ends elsewhere"

    # blocks of clients in one pass, in another order
    batched = Setting(values, kind="batched", clients_per_batch=2)
    got = batched.after(batched.first, 2, backwards=True)
    check_equal(f"{name}, batched", want, got, tolerance)
    assert batched.losses(got) == pytest.approx(losses, rel=tolerance)

    if "runtime" in METHODS[values["method"]]:
        return

    # messages to clients with a model of their own, here and in another process
    far = Setting(values, kind="loopback")
    elsewhere = there(other_process, far.recipe)
    for place, runtime in (("messages", far.runtime), ("two processes", elsewhere)):
        got = far.after(far.first, 2, runtime=runtime)
        assert not got.personal, "personal state left its client"
        check_equal(f"{name}, {place}", want, got, tolerance)
        assert far.losses(got, runtime) == pytest.approx(losses, rel=tolerance)


def test_every_name_of_every_table_is_covered() -> None:
    """A name that is new in a table is made a case of by itself, or something is to be said about it."""
    refused = {name: reason for name, values in CASES.items() if (reason := zoo.problem(values)) is not None}
    assert not refused, (
        "these are in the tables of study/build.py and study/methods.py, but the recipe that tests/zoo.py makes of them"
        f" is refused: {refused}. Say in NEEDS of tests/zoo.py which other keys they need."
    )
    covered = {name for values in CASES.values() for name in zoo.reached(Recipe.model_validate(values))}
    missing = {f"{table}/{name}" for table, names in zoo.tables().items() for name in names} - covered
    assert not missing, f"no recipe of tests/zoo.py has these at work: {sorted(missing)}; add what they need to NEEDS"


def test_a_new_name_without_a_case_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.AGGREGATES, "median", build.AGGREGATES["mean"])  # type: ignore[arg-type]
    monkeypatch.setitem(CASES, "aggregate median", {case.name: case.values for case in zoo.cases()}["aggregate median"])
    with pytest.raises(AssertionError, match=r"aggregate median.*does not know it.*NEEDS"):
        test_every_name_of_every_table_is_covered()
