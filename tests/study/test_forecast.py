"""What a run will take: its work is counted exactly, and summed up by arithmetic that no clock changes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.study.tiny_runs import recipe

from fedloom.errors import RunError
from fedloom.evaluate import generate as generation
from fedloom.evaluate.loss import add_metrics
from fedloom.models.quantised import largest_layer_bytes, packed_bytes, stored_bytes
from fedloom.ops import memory
from fedloom.rounds import federate
from fedloom.runtimes import batched
from fedloom.study import forecast as casts
from fedloom.study import plan as plans
from fedloom.study import probe as probes
from fedloom.study import suggest
from fedloom.study.build import algorithm_of, clients_in_a_pass, global_pieces, population_of, sampling_of
from fedloom.study.folder import RunFolder
from fedloom.study.forecast import Cost, Line, Measured, Memory, fitted, line_through
from fedloom.study.passes import ArmWork, Decoding, Passes, Step, arm_work, decodings, evaluation_passes
from fedloom.study.plan import plan
from fedloom.study.probe import Meter, Probe, largest_of
from fedloom.study.run import run_recipe
from fedloom.study.session import initial_state, open_session
from fedloom.types import Client

EVERY = {"rounds": 2, "arms": ["local", "federated", "global"]}


@pytest.mark.parametrize(
    "values",
    [
        {"clients_per_round": 2, "local_steps": 2},
        {"local_steps": None, "local_epochs": 1, "split": {"kind": "quantity_skew", "clients": 4, "alpha": 0.5}},
        {"client": {"gradient_accumulation_steps": 2}, "runtime": {"clients_per_batch": 2}},
        {"runtime": {"kind": "sequential"}},
    ],
)
def test_the_tokens_counted_are_those_of_the_run(values, home, tmp_path):
    told = recipe(home, tmp_path / "run", **{**EVERY, **values})
    session = open_session(told)
    width = session.room.width
    works = {arm: arm_work(told, session.federation, arm, width) for arm in told.arms}
    assert all(work.scale == 1 for work in works.values())
    for arm, work in works.items():
        pieces = global_pieces(told, session.federation, session.room) if arm == "global" else 1
        algorithm = algorithm_of(told, arm, pieces=pieces)
        population = population_of(session.federation, told, arm)
        rounds = federate(
            algorithm,
            session.adapter,
            batched(clients_in_a_pass(told, session.room)),
            initial_state(algorithm, session.adapter, told.seed),
            population,
            rounds=told.rounds,
            sampling=sampling_of(told, arm, len(population.ids)),
        )
        made = add_metrics(report.metrics for _, report in rounds)
        assert work.real_tokens == made["tokens"], arm
        assert work.passes.padded == made["padded_tokens"], arm
        assert work.samples_per_round * told.rounds * work.models == pytest.approx(made["examples"]), arm


def test_rounds_stand_for_all_where_there_are_many(home, tmp_path):
    session = open_session(recipe(home, tmp_path / "run", **{**EVERY, "rounds": 400}))
    whole = arm_work(session.recipe.model_copy(update={"rounds": 64}), session.federation, "federated", 3)
    some = arm_work(session.recipe, session.federation, "federated", 3)
    assert (whole.scale, some.scale) == (1, 400 / 64) and some.rounds == 400
    assert some.real_tokens == pytest.approx(400 / 64 * whole.real_tokens, rel=0.05)
    ticks = iter(range(0, 10_000, 2))
    hasty = arm_work(session.recipe, session.federation, "federated", 3, clock=lambda: next(ticks))
    assert {step.round for step in hasty.steps} == {0, 399} and hasty.scale == 200


@pytest.mark.parametrize("own_models", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_passes_and_answers_of_evaluation_are_those_that_are_made(own_models, width, home, tmp_path, monkeypatch):
    told = recipe(home, tmp_path / "run", evaluate={"eval_batch_size": 3, "score": "exact", "limit": None})
    session = open_session(told)
    arm = "local" if own_models else "federated"
    algorithm = algorithm_of(told, arm)
    state = initial_state(algorithm, session.adapter, 1)
    nll = session.adapter.nll
    made, written = Passes(), []

    def looked(tree_C, batch):
        nonlocal made
        c, b, t = batch["input_ids"].shape
        made += Passes(1, c * b * t, 0, c * b * t)
        return nll(tree_C, batch)

    def look(adapter, tree_C, prompts, *given, **more):
        own = [ids for one in prompts for ids in one]
        written.append((len(own), sum(map(len, own))))
        return [[[] for _ in one] for one in prompts]

    monkeypatch.setattr(session.adapter, "nll", looked)
    monkeypatch.setattr(generation, "generate", look)
    clients = [Client(owner, ()) for owner in session.owners]
    evaluation = session.measures().common if own_models else session.measures().own
    batched(width).evaluate(algorithm, session.adapter, state, clients, evaluation)
    counted = evaluation_passes(told, session.federation, "test", width, own_models=own_models)
    assert counted._replace(real=0) == made
    answers = decodings(told, session.federation, "test", width, 5, own_models=own_models)
    assert sorted((one.rows, one.prompts) for one in answers) == sorted(written)
    assert all(one.longest <= 5 and one.answers <= 5 * one.rows for one in answers)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_points_and_never_below_zero():
    assert line_through([(10, 7), (20, 12), (50, 27)]) == pytest.approx((2, 0.5))
    a, b = line_through([(1, 1), (100, 200)])  # a line through both would begin below 0
    assert a == 0 and 1 < b < 2
    assert line_through([(10, 5), (20, 4)])[1] == 0
    assert line_through([(10, 5)]) == (0, 0.5)


def test_the_line_leaves_padding_out_where_the_passes_do():
    made = [(Passes(1, padded, real), Cost(2 * real, real)) for padded, real in ((100, 30), (100, 90), (50, 40))]
    line = fitted(made)
    assert line.real and line.of(Passes(2, 1000, 70)) == pytest.approx((140, 70))
    made = [
        (Passes(2, padded, real), Cost(2 + padded, 1 + padded / 2)) for padded, real in ((10, 3), (30, 9), (20, 20))
    ]
    line = fitted(made)
    assert not line.real and line.of(Passes(4, 40, 1)) == pytest.approx((44, 22))


def test_the_peak_is_the_largest_moment():
    parts = {"resident": 100, "training": 50, "evaluation": 30, "states": 7, "report": 5}
    assert Memory(**parts).peak == 162 and Memory(**parts, loading=200).peak == 200
    assert Memory(**{**parts, "evaluation": 80}).peak == 192
    assert Memory(**parts).dominant == "libraries, model and data"
    assert Memory(**{**parts, "training": 500}).dominant == "a pass of training"
    assert casts.kept_bytes(10, 3) == 60


def test_the_time_is_the_sum_of_what_is_done_how_often(home, tmp_path):
    told = recipe(
        home,
        tmp_path / "run",
        rounds=7,
        arms=["base", "local", "federated"],
        evaluate={"eval_rounds": 3},
        checkpoint={"save_rounds": 2},
    )
    step = Step(clients=2, rows=4, tokens=10, real=70, pieces=2)
    work = ArmWork([step, step], 7.0, 7, 3, 1, samples_per_round=8, blocks_per_round=1)
    measured = Measured(
        start=Cost(100, 50),
        step=Line(Cost(1, 1), Cost(0.1, 0.1)),
        per_client_round=Cost(0.5, 0.5),
        evaluation=Line(Cost(2, 2), Cost(0, 0)),
        token=Line(Cost(0.01, 0.01), Cost(0, 0)),
        judge=Cost(0.125, 0.125),
        untrained_answer=20,
        checkpoint=Cost(3, 3),
        report=Cost(4, 4),
    )
    one = casts.EvaluationWork(
        Passes(5, 1, 1), Passes(6, 1, 1), (), [Decoding(rows=8, prompts=9, answers=30, longest=5, slots=4)]
    )
    works = {"local": work, "federated": work}
    only = casts.forecast(told, works, measured)
    assert only == {"training": pytest.approx((2 * (7 * (2 * 2 + 2 * 8) + 10.5),) * 2)}
    parts = casts.forecast(
        told,
        works,
        measured,
        {arm: [one] for arm in ("base", "local", "federated")},
        equal_samples=40,
        most_new_tokens=6,
    )
    # validated once for all, then after rounds 3, 6 and 7 of two arms; federated is tested twice
    assert casts.validations(told) == 3
    assert parts["evaluation"].cpu == pytest.approx(2 * 5 + 2 * 3 * 2 * 5 + (1 + 1 + 2) * 2 * 6)
    assert parts["answers"].cpu == pytest.approx((2 * 2 + 0.12 + 1) + 3 * (2 * 2 + 0.08 + 1))
    assert parts["checkpoints"].cpu == 3 * 2 * (1 + len({2, 3, 4, 6, 7}))
    so_far = sum(cost.wall for name, cost in parts.items() if name != "report")
    assert parts["report"].wall == pytest.approx(4 * (1 + 0.25 * min(14 + 3, int(so_far / 30))))
    assert so_far > 30
    assert casts.tests_of(told, "federated", work, 8 * 7) == 1 and casts.tests_of(told, "federated", work, 8) == 2


def test_processes_share_a_round_and_the_slowest_ends_it(home, tmp_path):
    told = recipe(home, tmp_path / "run", arms=["federated", "global"], rounds=2, method="fedavg")
    session = open_session(told, processes=2)
    one, two = (
        {arm: arm_work(told, session.federation, arm, 3, processes=number) for arm in told.arms} for number in (1, 2)
    )
    assert one["global"].passes == two["global"].passes
    assert all(len(shares) == 2 and shares[1].clients == 0 for shares in two["global"].shares), "it is one client's"
    for shares in two["federated"].shares:
        assert sorted(share.clients for share in shares) == [1, 2]
    assert two["federated"].real_tokens == one["federated"].real_tokens
    assert two["federated"].largest.pass_tokens < one["federated"].largest.pass_tokens, "a part is narrower"
    measured = Measured(Cost(10, 8), Line(Cost(0, 0), Cost(1, 1), real=True), Cost(2, 2), follower=Cost(4, 3))
    alone, shared = casts.training(one["federated"], measured), casts.training(two["federated"], measured)
    assert shared.cpu == pytest.approx(alone.cpu) and alone.wall / 2 <= shared.wall < alone.wall
    slowest = sum(max(s.passes.real + 2 * s.clients for s in shares) for shares in two["federated"].shares)
    assert shared.wall == pytest.approx(slowest)
    for own_models in (False, True):
        whole = evaluation_passes(told, session.federation, "test", 3, own_models=own_models)
        parts = [
            evaluation_passes(told, session.federation, "test", 3, own_models=own_models, of=(n, 2)) for n in (0, 1)
        ]
        assert all(0 < part.real < whole.real for part in parts)
        assert sum(part.real for part in parts) == pytest.approx(whole.real)
    work = casts.EvaluationWork(Passes(1, 0, 0), Passes(3, 0, 0))
    more = casts.EvaluationWork(Passes(2, 0, 0), Passes(5, 0, 0))
    measured = Measured(
        Cost(10, 8), Line(Cost(), Cost()), evaluation=Line(Cost(1, 1), Cost()), follower=Cost(4, 3), report=Cost(1, 1)
    )
    parts = casts.forecast(told, two, measured, {"federated": [work, more]}, equal_samples=None)
    times = casts.validations(told)
    assert parts["evaluation"] == pytest.approx((2 + 2 * times + 5, 3 + 3 * times + 8))
    assert parts["start"] == pytest.approx((14, 11))
    assert Memory(100, 50, report=7, states=3, kept=5).total(3) == 165 + 2 * 155
    assert Memory(100, 50, code=9).peak == 159


def test_benchmarks_are_counted_as_often_as_they_are_asked(home, tmp_path):
    told = recipe(home, tmp_path / "run", rounds=7, evaluate={"tasks": ["arc_easy"], "task_rounds": 3})
    models = {"base": 1, "federated": 1, "local": 4}
    assert [casts.asked(told, arm, number) for arm, number in models.items()] == [1, 3, 12]
    once = told.model_copy(update={"evaluate": told.evaluate.model_copy(update={"task_rounds": None})})
    assert [casts.asked(once, arm, number) for arm, number in models.items()] == [1, 1, 4]
    measured = Measured(
        Cost(), Line(Cost(), Cost()), evaluation=Line(Cost(), Cost()), tasks={"arc_easy": Cost(3, 2), "own": Cost(1, 1)}
    )
    nothing = casts.EvaluationWork(Passes(), Passes())
    evaluations = {"local": [nothing] * 2, "federated": [nothing] * 2}
    parts = casts.forecast(told, {}, measured, evaluations, models={"local": 4})
    times = 12 + 3 + 1  # and the untrained model, once for all
    assert parts["tasks"] == pytest.approx((4 * times / 2, 3 * times))


def test_rows_run_through_frozen_blocks_once_while_there_is_room():
    making = Line(Cost(1, 1), Cost(0.5, 0.5))
    rows = Passes(10, 100, 100)
    assert casts.KeptRows(rows, 1000, 1.0).takes(making).cpu == 60
    assert casts.KeptRows(rows, 1000, 0.25).takes(making).cpu == pytest.approx(60 * (1 + 0.75 * 9))


def test_benchmarks_and_kept_states_are_probed(home, tmp_path, monkeypatch):
    monkeypatch.setattr(Probe, "report", lambda self: (Cost(), 0))
    items = [{"question": f"Which is {n}?", "choices": ["one", "two", "three"], "answer": n % 3} for n in range(30)]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    told = recipe(
        home,
        tmp_path / "run",
        arms=["base", "federated"],
        method="fedavg",
        adapter={"kind": "last_layers", "trainable_layers": 1},
        runtime={"activation_cache_gb": 1.0},
        evaluate={"tasks": ["multiple_choice"], "task_paths": {"multiple_choice": str(tmp_path / "own.jsonl")}},
    )
    session = open_session(told)
    ticks = iter(range(10**6))
    clock = lambda: Cost(*[float(next(ticks))] * 2)  # noqa: E731
    probe = Probe(session, None, clock)
    tasks, _ = probe.tasks()
    assert list(tasks) == ["multiple_choice"] and tasks["multiple_choice"].cpu > 0
    asked: list[int] = []
    monkeypatch.setattr(probes, "run_task", lambda task, answerer, **given: asked.append(len(task.load(None, None))))
    probe.tasks()
    assert asked == [1, 4, 16]
    frozen = probe.frozen
    made, at_hand = frozen.made, frozen.found
    trained = probe.training(lambda width: {"federated": arm_work(told, session.federation, "federated", width)})
    assert frozen.made > made and trained.measured
    assert frozen.found - at_hand >= frozen.made - made, "the passes that are timed have their rows at hand"
    found = plan(session, whole=True)
    assert {"frozen blocks", "tasks"} <= found.forecast.parts.keys()
    lengths = {part: session.federation.pooled(part).lengths.sum() for part in ("train", "validation", "test")}
    wanted = sum(lengths.values()) * probe.bytes_of_a_state()
    assert 0 < found.forecast.memory.kept + frozen.bytes <= 1.5 * wanted


# ---- memory and width ------------------------------------------------------------------------------------------------


def test_what_there_is_ends_at_the_control_groups_limit(tmp_path):
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "status").write_text("VmRSS:\t100 kB\n")
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert memory.room_bytes(proc, group) == 5100 * 1024
    (proc / "self" / "cgroup").write_text("4:memory:/a/b\n0::/c/d\n")
    first = group / "memory" / "a"
    (first / "b").mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("3000000\n")
    (first / "memory.usage_in_bytes").write_text("2000000\n")
    (first / "memory.stat").write_text("total_inactive_file 500000\n")
    assert memory.room_bytes(proc, group) == 100 * 1024 + 1_500_000
    second = group / "c" / "d"
    second.mkdir(parents=True)
    (second / "memory.max").write_text("1000000\n")
    (second / "memory.current").write_text("400000\n")
    assert memory.room_bytes(proc, group) == 100 * 1024 + 600_000
    (second / "memory.max").write_text("max\n")
    assert memory.room_bytes(proc, group) == 100 * 1024 + 1_500_000


@pytest.fixture
def reckoned(monkeypatch):
    """Passes that are made up: 1,000 bytes and a second for each token, and what was tried."""
    tried = []

    def make(self, clients):
        passes = probes.passes_through([client.batches[0] for client in clients])
        tried.append((len(clients), passes))
        return passes, seconds(len(clients), passes)

    def seconds(width, passes):
        return Cost(passes.real, passes.real).times(1 / min(width, 2))  # twice as fast with two, and no faster

    monkeypatch.setattr(Probe, "make", make)
    monkeypatch.setattr(Probe, "client_bytes", lambda self: 0)
    monkeypatch.setattr(Probe, "_resident", lambda self: 10_000)
    monkeypatch.setattr(Probe, "_round", lambda self, *given: Cost())
    monkeypatch.setattr(Meter, "added", property(lambda self: int(1000 * tried[-1][1].padded)))
    monkeypatch.setattr(plans, "peak_memory_bytes", lambda: 0)
    return tried


def test_memory_says_how_many_clients_go_in_a_pass(home, tmp_path, reckoned):
    session = open_session(recipe(home, tmp_path / "run", arms=["federated"]))
    assert session.room.width == 3
    largest = {width: arm_work(session.recipe, session.federation, "federated", width).largest for width in (1, 2, 3)}
    two = 10_000 + 1000 * largest[2].pass_tokens
    assert two < 10_000 + 1000 * largest[3].pass_tokens
    found = plan(session, limit=two + 1)
    assert session.room.width == found.clients_per_batch == 2
    assert found.forecast.memory.peak == two and not found.forecast.too_much
    assert max(passes.padded for _, passes in reckoned) == largest[2].pass_tokens, "a pass too large was made"
    assert any("memory is for 2 clients" in note for note in found.notes)


def test_what_does_not_fit_is_not_made_and_ways_out_are_named(home, tmp_path, reckoned):
    session = open_session(recipe(home, tmp_path / "run", arms=["federated"], runtime={"clients_per_batch": 3}))
    work = arm_work(session.recipe, session.federation, "federated", 3)
    limit = 10_000 + 1000 * work.largest.pass_tokens // 3
    found = plan(session, limit=limit)
    assert session.room.width == 3, "it was asked for"
    assert found.forecast.too_much and not found.forecast.memory.measured
    assert found.forecast.memory.peak == pytest.approx(10_000 + 1000 * work.largest.pass_tokens, abs=1)
    assert max(passes.padded for _, passes in reckoned) < work.largest.pass_tokens
    ways = {one.overrides[0].partition("=")[0]: one for one in found.forecast.suggestions}
    assert {"runtime.clients_per_batch", "client.per_device_train_batch_size", "data.max_length"} <= set(ways)
    assert all(one.peak_bytes <= limit for one in ways.values())
    assert ways["client.per_device_train_batch_size"].overrides == (
        "client.per_device_train_batch_size=1",
        "client.gradient_accumulation_steps=2",
        "runtime.clients_per_batch=1",
    )


def test_a_smaller_base_is_a_way_out_where_it_can_be_loaded(home, tmp_path, reckoned, monkeypatch):
    own = {"arms": ["federated"], "dtype": "float32", "method": "fedavg", "runtime": {"clients_per_batch": 3}}
    session = open_session(recipe(home, tmp_path / "run", **own))
    monkeypatch.setattr(suggest, "check_installed", lambda kind: None)
    monkeypatch.setattr(Probe, "_resident", lambda self: 10_000 + stored_bytes(session.base.model))
    peak = plan(session).forecast.memory.peak
    model = session.base.model
    saved = {kind: stored_bytes(model) - packed_bytes(model, kind) for kind in ("int8", "nf4")}
    assert 0 < saved["int8"] < saved["nf4"]
    found = plan(session, limit=peak - 1).forecast
    ways = {one.overrides[0]: one for one in found.suggestions}
    for kind, less in saved.items():
        assert ways[f"quantization={kind}"].peak_bytes <= peak - less + largest_layer_bytes(session.base.model)
    monkeypatch.setattr(suggest, "check_installed", lambda kind: (_ for _ in ()).throw(RunError("not here")))
    assert not any("quantization" in one.overrides[0] for one in plan(session, limit=peak - 1).forecast.suggestions)
    monkeypatch.setattr(suggest, "check_installed", lambda kind: None)
    moved = open_session(recipe(home, tmp_path / "run", **own, adapter={"kind": "full"}))
    there = plan(moved).forecast.memory.peak
    assert not any("quantization" in one.overrides[0] for one in plan(moved, limit=there - 1).forecast.suggestions)


def test_on_a_gpu_activations_may_wait_elsewhere(home, tmp_path, reckoned, monkeypatch):
    three = {"clients_per_batch": 3}
    session = open_session(recipe(home, tmp_path / "run", arms=["federated"], method="fedavg", runtime=three))
    peak = plan(session).forecast.memory.peak
    tried = []

    @contextlib.contextmanager
    def offloading(adapter):
        tried.append(adapter)
        yield

    def ways():
        return [one.overrides[0] for one in plan(session, limit=peak - 1).forecast.suggestions]

    monkeypatch.setattr(suggest, "offloading", offloading)
    monkeypatch.setattr(suggest, "bytes_on", lambda *given: 0)
    assert "runtime.gradient_checkpointing=true" in ways() and not tried
    monkeypatch.setattr(type(session.base), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(plans, "available_cores", lambda: 1)
    monkeypatch.setattr(suggest, "recomputing", offloading)
    assert "runtime.activation_offload=true" in ways() and tried


def test_the_fastest_width_is_tried_kept_and_resumed(home, tmp_path, reckoned, monkeypatch):
    told = recipe(home, tmp_path / "run", arms=["federated"], runtime={"clients_per_batch": "fastest"})
    session = open_session(told)
    found = plan(session)
    assert session.room.width == 3 and "too short" in found.notes[-1]
    monkeypatch.setattr(plans, "WORTH", 0)
    found = plan(session)
    assert session.room.width == found.clients_per_batch == 2 and "fastest: 2" in found.notes[-1]

    class Ends(Exception):
        pass

    def end(self, arm):
        seen.append(self.session.room.width)
        raise Ends

    seen: list[int] = []
    monkeypatch.setattr("fedloom.study.run._Runner._train", end)
    with pytest.raises(Ends):
        run_recipe(told)
    assert RunFolder.look(tmp_path / "run").read_facts()["clients_per_batch"] == 2
    with pytest.raises(Ends):
        run_recipe(told, resume=tmp_path / "run")
    assert seen == [2, 2]


def test_a_run_says_before_it_starts_that_memory_will_not_do(home, tmp_path, reckoned, monkeypatch):
    monkeypatch.setattr(plans, "room_bytes", lambda: 20_000)
    told = recipe(home, tmp_path / "run", arms=["federated"], runtime={"clients_per_batch": 3})
    monkeypatch.setattr("fedloom.study.run._Runner._train", lambda self, arm: (_ for _ in ()).throw(RunError("enough")))
    with pytest.raises(RunError, match="enough"):
        run_recipe(told)
    assert "this run may need" in (tmp_path / "run" / "log.txt").read_text()


def test_a_probe_leaves_nothing_behind(home, tmp_path, monkeypatch):
    monkeypatch.setattr(Probe, "report", lambda self: (Cost(), 0))  # drawing takes long, and touches no model
    told = recipe(home, tmp_path / "run", arms=["base", "federated"], method="fedavg")
    session = open_session(told)
    state = initial_state(algorithm_of(told), session.adapter, told.seed)
    before = {name: leaf.clone() for name, leaf in session.base.model.state_dict().items()}
    found = plan(session, whole=True, limit=1)
    assert found.forecast.too_much
    after = session.base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = initial_state(algorithm_of(told), session.adapter, told.seed)
    assert all(torch.equal(state.params[name], again.params[name]) for name in state.params)
    assert not any("forward" in vars(module) for module in session.base.model.modules())
    assert not session.adapter.recomputes and not (tmp_path / "run").exists()


SCRIPT = """
import json, sys
from fedloom.study.recipe import Recipe
from fedloom.study import run
kept = []
plan = run.plan
run.plan = lambda session: kept.append(plan(session)) or kept[0]
path = run.run_recipe(Recipe(**json.loads(sys.argv[1])))
costs = json.loads((path / "result.json").read_text())["costs"]
print(json.dumps([kept[0].forecast.memory.peak, costs["peak_memory_bytes"]]))
"""


def test_the_peak_foretold_is_that_of_a_run(home, tmp_path):
    told = recipe(
        home,
        tmp_path / "run",
        arms=["federated"],
        rounds=1,
        evaluate={"score": "none", "max_new_tokens": None, "limit": None},
        client={"per_device_train_batch_size": 8},
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, told.model_dump_json()], capture_output=True, text=True, check=True, cwd=root
    )
    foretold, taken = json.loads(done.stdout.splitlines()[-1])
    assert foretold == pytest.approx(taken, rel=0.15)


def test_the_code_of_shapes_still_to_come_is_counted_where_products_make_code(home, tmp_path):
    work = ArmWork([Step(1, 4, size, 4 * size) for size in range(64, 512, 8)], 1.0, 1, 1, 1, 1.0, 1.0)
    found = {}
    for dtype in ("float32", "bfloat16"):
        probe = Probe(open_session(recipe(home, tmp_path / dtype, dtype=dtype)), None)
        found[dtype] = [probe.code_to_come(arms) for arms in ({"global": work}, {"global": work, "federated": work})]
    assert found["float32"] == [0, 0]
    assert 2**20 < found["bfloat16"][0] == found["bfloat16"][1] <= 256 * 2**20, "arms share shapes; no more are kept"


def test_a_step_is_timed_when_its_shapes_have_been_there_before(home, tmp_path):
    for dtype, often in (("float32", 1), ("bfloat16", 2)):
        ticks = iter(range(100))
        clock = lambda ticks=ticks: Cost(float(next(ticks)) ** 2, 0.0)  # noqa: E731
        session = open_session(recipe(home, tmp_path / dtype, dtype=dtype))
        probe = Probe(session, None, clock)
        arm, step = largest_of({"federated": arm_work(session.recipe, session.federation, "federated", 2)})
        _, cost = probe.make(probe.passes_of(arm, step))
        assert next(ticks) == 2 * often and cost.wall == (2 * often - 1) ** 2 - (2 * often - 2) ** 2
