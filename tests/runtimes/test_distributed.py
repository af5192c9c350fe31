"""Two processes give what one gives: every method, adapter kind and slot; what goes wrong in one is told to both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import zoo

from fedloom.adapters import lora
from fedloom.adapters.targets import decoder_blocks
from fedloom.errors import RunError, UserError
from fedloom.evaluate.generate import Opening
from fedloom.evaluate.loglikelihood import Continuation
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.tasks.run import ModelAnswerer
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import Room, sequential, shards, with_dropout, with_ranks
from fedloom.runtimes.distributed import adds_leaf_by_leaf, distributed, split
from fedloom.runtimes.lead import Lead, trees_from, trees_to
from fedloom.runtimes.shards import local_bytes
from fedloom.runtimes.team import Over, Team, host, leave, meet, member
from fedloom.study import build
from fedloom.study.methods import METHODS
from fedloom.study.processes import check_processes, together
from fedloom.study.recipe import Recipe
from fedloom.study.settings import LOSSY
from fedloom.study.team_tasks import TeamAnswerer
from fedloom.types import Client, State, Trained, Upload

ROOT = Path(__file__).resolve().parents[2]
CASES = {case.name: case.values for case in zoo.cases()}
TOLERANCE = 1e-10  # float64: the order of a sum is another
TOLERANCE_LOSSY = 1e-5  # what is decoded from casts and quantised tensors is float32


def started(size: int) -> tuple[Team, list[subprocess.Popen[bytes]]]:
    store, port = host(size)
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("follower.py")
    others = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(size), str(rank)], env={**os.environ, "PYTHONPATH": path}
        )
        for rank in range(1, size)
    ]

    def watch() -> None:
        gone = [rank for rank, other in enumerate(others, start=1) if other.poll() is not None]
        if gone:
            raise RunError(f"process {gone[0]} is gone", code="processes.died")

    team = member(store, 0, size, watch)
    meet(team, 300)
    assert team.mesh.size() == size
    return team, others


@pytest.fixture(scope="module")
def lead() -> Iterator[Lead]:
    team, others = started(2)
    lead = Lead(team)
    yield lead
    if all(other.poll() is None for other in others):
        lead.end()
        assert [other.wait(20) for other in others] == [0]
    leave()


class Setting:
    """A recipe in one process, and in two."""

    def __init__(self, values: Mapping[str, Any], lead: Lead, fault: str = "", width: int = 2) -> None:
        self.recipe = Recipe.model_validate(values)
        self.federation = zoo.federation_of(self.recipe)
        self.population = build.population_of(self.federation, self.recipe, "federated")
        self.algorithm = zoo.algorithm_of(self.recipe)
        self.base = zoo.new_base()
        self.adapter = build.adapter_of(self.base, self.recipe)
        self.evaluation = zoo.evaluation_of(self.recipe)
        self.first = initial_state(self.algorithm, self.adapter, self.recipe.seed)
        self.lead = lead
        lead.shards = build.sharded(lead.team, self.adapter, self.recipe) if self.recipe.runtime.shard_base else None
        self.heavy = "many"  # who is alone in the first part
        said = self.recipe.model_dump(mode="json", exclude_unset=True)
        self.key = json.dumps({"values": said, "fault": fault})
        self.room = Room(width)
        self.shared = distributed(
            lead, self.key, self.room, load=lambda client: 10.0 if client.id == self.heavy else 1.0
        )

    def ranked(self, runtime: Any) -> Any:
        ranks = self.recipe.adapter.client_ranks not in (None, "same")
        return with_ranks(runtime, lambda client: build.rank_of(self.recipe, client)) if ranks else runtime

    def round(self, runtime: Any, state: State, drop: float = 0.0) -> tuple[State, Any]:
        cohort = [self.population.open(client, state.round) for client in self.population.ids]
        runtime = with_dropout(self.ranked(runtime), drop)
        return run_round(self.algorithm, self.adapter, runtime, state, cohort)

    def losses(self, runtime: Any, state: State) -> dict[str, float]:
        clients = [Client(id, ()) for id in self.population.ids]
        found = self.ranked(runtime).evaluate(self.algorithm, self.adapter, state, clients, self.evaluation)
        return {id: row["loss_sum"] for id, row in found.items()}


def gap(a: Any, b: Any) -> float:
    assert a.keys() == b.keys()
    return max((float((a[name] - b[name]).abs().max()) for name in a if a[name].numel()), default=0.0)


# ---- the same result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, lead: Lead) -> None:
    values = CASES[name]
    if METHODS[values["method"]].get("runtime"):
        with pytest.raises(UserError, match=r"runtime.kind buffered is for one process .* and this run has 2"):
            check_processes(Recipe.model_validate(values), 2)
        return
    setting = Setting(values, lead)
    recipe = setting.recipe
    lossy = {*recipe.compress.up, *recipe.compress.down} & set(LOSSY)
    tolerance = TOLERANCE_LOSSY if lossy else TOLERANCE
    want = got = setting.first
    for heavy in ("many", "few"):  # in the second round clients are with another process than in the first
        setting.heavy = heavy
        want, wanted = setting.round(sequential(), want)
        got, told = setting.round(setting.shared, got)
        assert gap(want.params, got.params) < tolerance
        assert list(told.clients) == list(wanted.clients), "not in the order of one process"
        for id, row in wanted.clients.items():
            assert {
                key: value for key, value in row.items() if key not in ("seconds", "padded_tokens")
            } == pytest.approx(
                {key: told.clients[id][key] for key in row if key not in ("seconds", "padded_tokens")},
                rel=1e-4 if lossy else 1e-9,
            )
        assert want.personal.keys() == got.personal.keys()
        assert all(gap(want.personal[id], got.personal[id]) < tolerance for id in want.personal)
    wanted_losses, losses = setting.losses(sequential(), want), setting.losses(setting.shared, got)
    assert list(losses) == list(wanted_losses)
    assert losses == pytest.approx(wanted_losses, rel=1e-4 if lossy else 1e-9)
    moved = setting.losses(setting.shared, setting.first)
    assert all(abs(moved[id] - losses[id]) > 1e-7 for id in losses), "a client's model did not move"


def test_a_client_that_drops_out_is_missed_by_both(lead: Lead) -> None:
    setting = Setting(CASES["fedavg"], lead)
    seen = set()
    for round in range(4):
        at = State(3, round, setting.first.params, setting.first.server)
        want, got = (setting.round(runtime, at, 0.3) for runtime in (sequential(), setting.shared))
        assert want[1].failed == got[1].failed
        assert gap(want[0].params, got[0].params) < TOLERANCE
        seen.add(frozenset(got[1].failed))
    assert len(seen) > 1


def test_a_process_without_a_client_adds_nothing(lead: Lead) -> None:
    for name in ("fedavg", "flora", "fednova"):
        setting = Setting(CASES[name], lead)
        cohort = [setting.population.open("few", 0)]
        want, got = (
            run_round(setting.algorithm, setting.adapter, runtime, setting.first, cohort)[0]
            for runtime in (sequential(), setting.shared)
        )
        assert gap(want.params, got.params) < TOLERANCE


def test_one_all_reduce_in_a_round_for_each_dtype(lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[Any] = []
    add = lead.team.sum
    monkeypatch.setattr(lead.team, "sum", lambda flat: (reduced.append((flat.dtype, flat.numel())), add(flat))[1])
    counts = {}
    for name in ("fedavg", "scaffold", "flora"):
        setting = Setting(CASES[name], lead)
        del reduced[:]
        setting.round(setting.shared, setting.first)
        counts[name] = len(reduced)
    assert counts == {"fedavg": 1, "scaffold": 1, "flora": 0}, "factors side by side are gathered"


def test_parameters_travel_when_they_are_new_and_only_then(lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    tell = lead.team.broadcast
    monkeypatch.setattr(lead.team, "broadcast", lambda raw=b"": (sizes.append(len(raw)), tell(raw))[1])
    setting = Setting(CASES["fedavg"], lead)
    setting.losses(setting.shared, setting.first)
    setting.losses(setting.shared, setting.first)
    after, _ = setting.round(setting.shared, setting.first)
    setting.losses(setting.shared, after)
    payload = sum(leaf.numel() * leaf.element_size() for leaf in setting.first.params.values())
    assert [size > payload for size in sizes] == [True, False, False, True]


def test_questions_are_answered_by_all(lead: Lead) -> None:
    setting = Setting(CASES["fedavg"], lead)
    state, _ = setting.round(sequential(), setting.first)
    alone = ModelAnswerer(setting.adapter, state.params, setting.base.tokenizer, 2, "auto", None)
    arguments = (setting.adapter, state.params, setting.base.tokenizer, 2, "auto", None)
    shared = TeamAnswerer(lead, setting.key, state, *arguments)
    asked = [
        Opening([5 + i, 7, 9 + i], 2 + i % 2, (), Sampling(1.0, 1.0, 5, 40 + i) if i % 3 == 0 else None)
        for i in range(5)
    ]
    assert shared.written(asked) == alone.written(asked)
    told = [Continuation([3, 4 + i], [8, 9 + i]) for i in range(5)]
    for one, other in zip(shared.loglikelihoods(told), alone.loglikelihoods(told), strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-9)
        assert one.greedy == other.greedy
    assert shared.written([]) == []


# ---- the base in parts -----------------------------------------------------------------------------------------------


def parted(**more: Any) -> dict[str, Any]:
    return zoo.values_of("fedavg", **zoo.merged({"runtime": {"shard_base": True}}, more))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": "scaffold"},
        {"runtime": {"gradient_checkpointing": True}},
        {"runtime": {"shard_offload": True}},  # on a CPU to see that it computes the same: a run refuses it there
    ],
    ids=str,
)
def test_a_base_in_parts_gives_the_same(more: Mapping[str, Any], lead: Lead) -> None:
    values = {**parted(), **more, "runtime": {"threads": 1, "shard_base": True, **more.get("runtime", {})}}
    plain = Setting({**values, "runtime": {**values["runtime"], "shard_base": False, "shard_offload": False}}, lead)
    setting = Setting(values, lead)
    assert lead.shards is not None
    blocks, whole = (
        sum(local_bytes(block) for block in decoder_blocks(one.adapter.model).values()) for one in (setting, plain)
    )
    assert whole / 2 <= blocks < 0.51 * whole, "not half of the blocks"
    want = got = setting.first
    for heavy in ("many", "few"):
        setting.heavy = heavy
        lead.shards, shards = None, lead.shards
        want, _ = plain.round(sequential(), want)
        lead.shards = shards
        got, report = setting.round(setting.shared, got)
        assert not report.failed
        assert gap(want.params, got.params) < TOLERANCE
        assert setting.losses(setting.shared, got) == pytest.approx(plain.losses(sequential(), want), rel=1e-9)
    assert shards.fillers > 0, "both had the same work, so keeping step was not tried"
    # work of this process alone, and answers of other lengths
    alone = lead.alone(lambda: setting.losses(sequential(), got))
    assert alone == pytest.approx(setting.losses(setting.shared, got), rel=1e-9)
    asked = [Opening([5 + i, 7, 9 + i], 1 + 2 * i, ()) for i in range(3)]
    answers = TeamAnswerer(lead, setting.key, got, setting.adapter, got.params, setting.base.tokenizer, 1, "auto", None)
    whole_base = ModelAnswerer(plain.adapter, got.params, plain.base.tokenizer, 1, "auto", None)
    assert answers.written(asked) == whole_base.written(asked)
    lead.shards = None


def test_what_needs_a_whole_base_is_refused() -> None:
    for more, reason in (
        ({"adapter": {"kind": "full"}}, "full moves the base's own weights"),
        ({"adapter": {"kind": "ia3"}}, "lora so far, not ia3"),
        ({"aggregate": {"kind": "flora"}}, "flora adds to the base's weights"),
        ({"aggregate": {"kind": "fedex_lora"}}, "fedex_lora adds to the base's weights"),
        ({"data": {"path": str(zoo.folder() / "pairs.json"), "type": "preference"}}, "a loss on pairs"),
    ):
        assert reason in (zoo.problem(parted(**more)) or ""), more
    with pytest.raises(UserError, match="this is one process"):
        check_processes(Recipe.model_validate(parted()), 1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="without a GPU they are there"):
            check_processes(Recipe.model_validate(parted(runtime={"shard_offload": True})), 2)


def test_parts_that_wait_elsewhere_are_asked_of_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(shards, "fully_shard", lambda block, **given: asked.append(given["offload_policy"]))
    adapter = lora(zoo.new_base().model, rank=2)
    for device, offload in (("cpu", False), ("cpu", True), ("cuda", True)):
        team: Any = SimpleNamespace(mesh=None, device=torch.device(device))
        shards.shard(team, adapter, adapter.init(0), [torch.nn.Linear(2, 2)], offload=offload)
    assert [getattr(policy, "pin_memory", None) for policy in asked] == [None, False, True]


def test_an_adapter_begins_where_its_base_computes_wherever_weights_wait_by_then() -> None:
    adapter = lora(zoo.new_base().model, rank=2)
    for layer in adapter.sites.values():
        layer.weight = torch.nn.Parameter(layer.weight.detach().to("meta"))
    assert {leaf.device.type for leaf in adapter.init(0).values()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, beside which the parts wait")
def test_parts_wait_in_pinned_memory_beside_a_gpu() -> None:
    code = """
import torch
from tests.adapters.test_recompute import cohort_batch, moved
from tests.small import gap, llama
from fedloom.adapters import lora
from fedloom.adapters import lora
from fedloom.adapters.targets import decoder_blocks
from fedloom.runtimes.shards import shard
from fedloom.runtimes.team import host, leave, meet, member
store, _ = host(1)
team = member(store, 0, 1, lambda: None)
meet(team)
there = moved(lora(llama(), rank=2), 2)  # drawn on the CPU
def found(adapter):
    leaves = {name: leaf.detach().cuda().requires_grad_() for name, leaf in there.items()}
    batch = {name: leaf.cuda() for name, leaf in cohort_batch(2).items()}
    loss = adapter.loss(leaves, batch).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
want = found(lora(llama().cuda(), rank=2))
adapter = lora(llama().cuda(), rank=2)
blocks = list(decoder_blocks(adapter.model).values())
shard(team, adapter, adapter.init(0), blocks, offload=True)
got = found(adapter)
parts = [leaf.to_local() for block in blocks for leaf in block.parameters()]
assert all(part.device.type == "cpu" and part.is_pinned() for part in parts)
assert gap(want, got) < 1e-12
leave()
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=300)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_out_of_memory_in_one_process_halves_its_passes_alone(lead: Lead) -> None:
    setting = Setting(CASES["fedavg"], lead, fault="memory")
    heard: list[str] = []
    lead.hear = heard.append
    want, _ = setting.round(sequential(), setting.first)
    got, report = setting.round(setting.shared, setting.first)
    lead.hear = lambda text: None
    assert gap(want.params, got.params) < TOLERANCE
    assert not report.failed
    assert heard == ["process 1: out of memory with 2 clients in one pass: 1 from now on"]
    assert setting.room.width == 2
    assert lead.peak_elsewhere == 1234


def test_a_client_that_fails_elsewhere_is_named_and_the_rest_goes_on(lead: Lead) -> None:
    setting = Setting(CASES["fedavg"], lead, fault="refused")
    _, report = setting.round(setting.shared, setting.first)
    assert report.failed == {"few": "it would rather not", "some": "it would rather not"}
    assert list(report.clients) == ["many"]


def test_an_error_elsewhere_ends_the_round_here_and_nobody_waits(lead: Lead) -> None:
    setting = Setting(CASES["fedavg"], lead, fault="bug")
    with pytest.raises(RunError, match=r"process 1 of 2: ZeroDivisionError: no such number \(.*follower.py"):
        setting.round(setting.shared, setting.first)
    well = Setting(CASES["fedavg"], lead)  # both are where they were
    assert not well.round(well.shared, well.first)[1].failed


def test_an_error_here_ends_the_round_there(lead: Lead) -> None:
    setting = Setting(CASES["fedavg"], lead)

    def broken(tree_C: Any, batch_CBT: Any) -> Any:
        raise ZeroDivisionError("here")

    loss, setting.adapter.loss = setting.adapter.loss, broken
    with pytest.raises(ZeroDivisionError, match="here"):
        setting.round(setting.shared, setting.first)
    setting.adapter.loss = loss
    assert not setting.round(setting.shared, setting.first)[1].failed


DEATH = """
import os, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from fedloom.errors import RunError
from fedloom.runtimes.team import host, meet, member
if len(sys.argv) > 2:
    meet(member(int(sys.argv[2]), 1, 2))
    os._exit(7)
store, port = host(2)
other = subprocess.Popen([sys.executable, "-c", os.environ["DEATH"], sys.argv[1], str(port)])
def watch():
    if other.poll() is not None:
        raise RunError(f"process 1 ended with {other.poll()}")
team = member(store, 0, 2, watch)
meet(team)
start = time.monotonic()
try:
    team.barrier()
except RunError as error:
    print(error.message, time.monotonic() - start < 20)
"""


def test_a_process_that_dies_ends_the_wait_in_seconds() -> None:
    """In another interpreter, as a process has one team at a time."""
    done = subprocess.run(
        [sys.executable, "-c", DEATH, str(ROOT / "src")],
        env={**os.environ, "DEATH": DEATH},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "process 1 ended with 7 True", done.stderr


def test_who_gives_up_is_heard_while_waiting(lead: Lead) -> None:
    team = lead.team
    other = Team(team.store, 1, 2, 1, 2)
    try:
        other.give_up("no more disk")
        other.give_up("and no more time")
        with pytest.raises(RunError, match="process 1 of 2: no more disk"):
            team.look(now=True)
        with pytest.raises(Over, match="process 1 of 2 has ended the run: no more disk"):
            other.look(now=True)
    finally:
        team.store.delete_key("over")
    team.look(now=True)


# ---- without another process -----------------------------------------------------------------------------------------


def test_the_longest_go_first_to_who_has_least() -> None:
    assert split([5, 1, 4, 2, 3, 1], 2) == [[0, 1, 3], [2, 4, 5]]
    assert split([1, 1, 1, 1], 3) == [[0, 3], [1], [2]]
    assert split([7], 2) == [[0], []]
    assert split([0, 0, 0, 0], 2) == [[0, 2], [1, 3]], "no load at all is shared out, too"
    assert split([], 2) == [[], []]


def test_a_rule_says_itself_whether_it_adds() -> None:
    def upload(**leaves: Any) -> Upload:
        return Upload({name: torch.tensor(leaf) for name, leaf in leaves.items()}, 2.0)

    plain = zoo.algorithm_of(Recipe.model_validate(CASES["fedavg"])).aggregate
    assert adds_leaf_by_leaf(plain, upload(a=[1.0, -2.0], b=[3]))

    def rule(add: Any) -> Any:
        return plain._replace(add=lambda a, b: Upload({"a": add(a.tree["a"], b.tree["a"])}, a.weight + b.weight))

    one = upload(a=[1.0, -2.0])
    assert adds_leaf_by_leaf(rule(torch.add), one)
    assert not adds_leaf_by_leaf(rule(lambda a, b: torch.cat([a, b])), one), "a list"
    assert not adds_leaf_by_leaf(rule(torch.maximum), one)
    halves = plain._replace(add=lambda a, b: Upload({"a": a.tree["a"] + b.tree["a"]}, (a.weight + b.weight) / 2))
    assert not adds_leaf_by_leaf(halves, one), "weights must add as well"


def test_personal_trees_travel_under_any_name() -> None:
    trees = {"a/b": {"x": torch.ones(2)}, "\x1f:: ü": {}, "c": {"x": torch.zeros(0), "y/z": torch.tensor(3)}}
    back = trees_from(trees_to(trees))
    assert back.keys() == trees.keys()
    assert all(torch.equal(leaf, back[id][name]) for id, tree in trees.items() for name, leaf in tree.items())


@pytest.mark.parametrize("kind", ["buffered", "loopback"])
def test_runtimes_for_one_process_are_refused(kind: str) -> None:
    recipe = Recipe.model_validate(zoo.values_of("fedavg", runtime={"kind": kind}))
    check_processes(recipe, 1)
    with pytest.raises(UserError, match=f"runtime.kind {kind} is for one process .* this run has 4"):
        check_processes(recipe, 4)


def test_as_many_processes_as_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with together(1) as alone, together(None) as unsaid:
        assert alone is None and unsaid is None
    with pytest.raises(UserError, match="--nproc 0, must be 1 or more"), together(0):
        pass
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--nproc 2, but torchrun has started 4 processes"), together(2):
        pass


def test_a_failed_round_has_nothing_to_add_up(lead: Lead) -> None:
    setting = Setting(CASES["fedavg"], lead, fault="refused")
    setting.heavy = ""
    cohort = [setting.population.open(id, 0)._replace(batches=()) for id in setting.population.ids]
    found = setting.shared.train(setting.algorithm, setting.adapter, setting.first, cohort)
    assert isinstance(found, Trained)
    assert found.upload is None
    assert list(found.failed) == list(setting.population.ids)
