"""FedBuff against a plain simulation, one client and one event after the other."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from tests.small import clients, fedavg, gap, small_lora

from fedloom.clients import error_feedback, sgd_client, split_personal
from fedloom.compress import quantize, random_k, top_k
from fedloom.errors import RunError
from fedloom.optimizers import adamw, decay, sgd
from fedloom.rounds import Sampling, federate, initial_state, run_round
from fedloom.runtimes import batched, buffered, sequential
from fedloom.runtimes.clock import speeds
from fedloom.runtimes.fedbuff import CLOCK, UNDER_WAY, clock_of, under_way
from fedloom.servers import fed_avgm
from fedloom.study import checkpoint
from fedloom.types import Transform

SECONDS = {"c0": 1.0, "c1": 2.3, "c2": 7.0, "c3": 0.6, "c4": 1.7}
ETA = 0.3


def runtime(width=8, size=2, at_once=5, exponent=0.5, seconds=SECONDS):
    return buffered(
        width,
        buffer_size=size,
        concurrency=at_once,
        duration=lambda client: seconds[client.id] * len(client.batches),
        staleness_exponent=exponent,
    )


def run(algorithm, rounds, made=None, state=None, adapter=None, cohort=None):
    adapter = adapter or small_lora()
    state, reports = state or initial_state(algorithm, adapter, 3), []
    for _ in range(rounds):
        state, report = run_round(algorithm, adapter, made or runtime(), state, cohort or clients())
        reports.append(report)
    return state, reports


def simulate(rounds, size, exponent, lr=1.0):
    """The paper's Algorithm 1 with everyone training at once; (params, clock, staleness of each upload) by round."""
    adapter, alone = small_lora(), fedavg(sgd_client(sgd(ETA)))
    cohort = {client.id: client for client in clients()}
    versions = [initial_state(alone, adapter, 3)]
    busy = {i: (0, SECONDS[i] * len(c.batches)) for i, c in cohort.items()}  # version, arrival
    sent = dict.fromkeys(cohort, 0)
    buffer, found, ages = [], [], []
    while len(found) < rounds:
        i = min(busy, key=lambda one: busy[one][1])
        version, now = busy.pop(i)
        after, _ = run_round(alone, adapter, sequential(), versions[version], [cohort[i]])
        late = len(versions) - 1 - version
        buffer.append((i, {k: after.params[k] - versions[version].params[k] for k in after.params}, late))
        ages.append(late)
        if len(buffer) == size:
            whole = sum(cohort[j].weight for j, _, _ in buffer)
            step = {
                k: sum(cohort[j].weight * (1 + age) ** -exponent * delta[k] for j, delta, age in buffer) / whole
                for k in after.params
            }
            old = versions[-1]
            new = {k: leaf + lr * step[k] for k, leaf in old.params.items()}
            versions.append(dataclasses.replace(old, round=old.round + 1, params=new))
            found.append((new, now, list(ages)))
            buffer, ages = [], []
        for j, client in cohort.items():
            if j not in busy and sent[j] < len(versions) - 1:
                busy[j], sent[j] = (len(versions) - 1, now + SECONDS[j] * len(client.batches)), len(versions) - 1
    return found


@pytest.mark.parametrize(("size", "exponent"), [(2, 0.5), (3, 0.0), (1, 1.0)])
def test_it_is_algorithm_1(size, exponent):
    algorithm, rounds = fedavg(sgd_client(sgd(ETA))), 6
    wanted = simulate(rounds, size, exponent)
    state, adapter = initial_state(algorithm, small_lora(), 3), small_lora()
    for params, now, ages in wanted:
        state, report = run_round(algorithm, adapter, runtime(8, size, 5, exponent), state, clients())
        assert gap(state.params, params) < 1e-12
        assert clock_of(state) == pytest.approx(now)
        assert report.metrics["staleness"] == sum(ages)
        assert report.metrics["uploads"] == size
    assert max(age for _, _, ages in wanted for age in ages) > 1, "nothing was late"


def test_the_servers_optimiser_steps_on_the_buffer():
    algorithm = fedavg(sgd_client(sgd(ETA)), server=fed_avgm(0.5, momentum=0.0))
    state, _ = run(algorithm, 4)
    assert gap(state.params, simulate(4, 2, 0.5, lr=0.5)[-1][0]) < 1e-12


def test_with_equal_times_and_a_full_buffer_it_is_fedavg():
    same = runtime(size=5, seconds={c.id: 1 / len(c.batches) for c in clients()})
    ours, reports = run(fedavg(sgd_client(adamw(1e-2))), 3, same)
    plain, _ = run(fedavg(sgd_client(adamw(1e-2))), 3, batched(8))
    assert gap(ours.params, plain.params) < 1e-12
    assert clock_of(ours) == 3.0 and not under_way(ours)
    assert all(report.metrics["staleness"] == 0 for report in reports)


SPARSE = (top_k(0.3),)
ALGORITHMS = {
    "momentum": lambda: fedavg(sgd_client(sgd(0.1, momentum=0.9), schedule=decay("cosine", 9)), server=fed_avgm()),
    "compressed": lambda: fedavg(sgd_client(sgd(ETA)), compress=(random_k(0.5), quantize(8)), downlink=(quantize(8),)),
    "error feedback": lambda: fedavg(error_feedback(sgd_client(sgd(ETA)), SPARSE), compress=SPARSE),
    "personal": lambda: fedavg(split_personal(sgd_client(sgd(ETA)), lambda name: "lora_A" in name)),
    "kept optimiser": lambda: fedavg(sgd_client(adamw(1e-2), keep_optimizer=True)),
}


def without_wall_clock(state):
    return {
        who: {name: leaf for name, leaf in tree.items() if name != "metric/seconds"}
        for who, tree in state.personal.items()
        if tree
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    algorithm = ALGORITHMS[name]()
    plain, _ = run(algorithm, 5)
    half, _ = run(algorithm, 2)
    assert under_way(half)
    checkpoint.save(tmp_path, half, {}, 1, False)
    back, _ = checkpoint.load(tmp_path, initial_state(algorithm, small_lora(), 3))
    again, _ = run(ALGORITHMS[name](), 3, state=back)
    for ours, theirs in [({"": again.params}, {"": plain.params}), (*map(without_wall_clock, (again, plain)),)]:
        assert ours.keys() == theirs.keys()
        for who, tree in ours.items():
            assert tree.keys() == theirs[who].keys()
            assert all(torch.equal(leaf, theirs[who][leaf_name]) for leaf_name, leaf in tree.items())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blocks_and_the_order_of_the_cohort_change_nothing(name):
    want, _ = run(ALGORITHMS[name](), 4, runtime(1))
    got, _ = run(ALGORITHMS[name](), 4, runtime(3), cohort=clients()[::-1])
    assert gap(want.params, got.params) < 1e-10
    assert {who for who, tree in want.personal.items() if tree} == {who for who, tree in got.personal.items() if tree}


class Population:
    def __init__(self, number):
        self.rows = {f"p{i}": clients(4)[i % 4]._replace(id=f"p{i}") for i in range(number)}
        self.ids = list(self.rows)

    def open(self, client, round):
        return self.rows[client]


def test_few_of_many_train_at_once_and_nobody_twice():
    people, algorithm, adapter = Population(40), fedavg(sgd_client(sgd(ETA))), small_lora()
    speed_of = speeds("lognormal", 3)
    made = buffered(8, buffer_size=2, concurrency=6, duration=lambda c: speed_of(c.id) * len(c.batches))
    asked, before = [], 0.0
    first = initial_state(algorithm, adapter, 3)
    for state, report in federate(algorithm, adapter, made, first, people, rounds=12, sampling=Sampling(8)):
        flying = under_way(state)
        assert len(flying) <= 6
        assert report.metrics["uploads"] == 2
        asked += [c for c, flight in flying.items() if flight.round == state.round - 1]
        assert all(flight.arrives >= clock_of(state) for flight in flying.values())
        assert clock_of(state) > before
        before = clock_of(state)
    assert len(set(asked)) > 12, "the same few were asked again and again"


def test_a_client_that_fails_is_replaced_and_told():
    algorithm, cohort = fedavg(sgd_client(sgd(ETA))), clients()
    cohort[3] = cohort[3]._replace(batches=())
    state, reports = run(algorithm, 1, runtime(1, seconds={**SECONDS, "c3": 0.0}), cohort=cohort)
    assert "no training batches" in reports[0].failed["c3"]
    assert reports[0].metrics["uploads"] == 2
    assert UNDER_WAY + "c3" not in state.personal


def test_protected_sums_are_refused():
    plain = Transform(lambda tree, site: tree, lambda tree, site: tree)
    with pytest.raises(RunError, match="protected"):
        run(fedavg(sgd_client(sgd(ETA)), protect=(plain,)), 1)


def test_speeds_are_drawn_once_per_client_and_as_said():
    ids = [f"client {i}" for i in range(4000)]
    drawn = {kind: [speeds(kind, 1)(id) for id in ids] for kind in ("steps", "uniform", "lognormal")}
    assert set(drawn["steps"]) == {1.0}
    assert 0.5 <= min(drawn["uniform"]) < 0.51 and 1.49 < max(drawn["uniform"]) <= 1.5
    assert statistics.mean(drawn["uniform"]) == pytest.approx(1.0, abs=0.02)
    assert statistics.median(drawn["lognormal"]) == pytest.approx(1.0, rel=0.06)
    late = sum(x > 5.18 for x in drawn["lognormal"]) / len(ids)  # exp(1.645)
    assert late == pytest.approx(0.05, abs=0.01)
    assert [speeds("uniform", 1)(id) for id in ids] == drawn["uniform"]
    assert [speeds("uniform", 2)(id) for id in ids] != drawn["uniform"]


def test_the_clock_is_in_the_state():
    state, _ = run(fedavg(sgd_client(sgd(ETA))), 1)
    assert clock_of(state) == float(state.personal[CLOCK]["now"]) > 0
    assert clock_of(initial_state(fedavg(), small_lora(), 3)) is None


def timed(**seconds):
    """Durations of whole visits, whatever the number of steps."""
    return {client.id: seconds[client.id] / len(client.batches) for client in clients(len(seconds))}


def test_a_client_is_sent_a_rounds_parameters_once():
    made = runtime(size=3, at_once=3, seconds=timed(c0=0.1, c1=5.0, c2=4.0))
    state, (report,) = run(fedavg(sgd_client(sgd(ETA))), 1, made, cohort=clients(3))
    assert set(report.clients) == {"c0", "c1", "c2"}
    assert clock_of(state) == 5.0


def test_what_stays_with_a_client_is_its_own_when_it_starts_again_at_once():
    algorithm, adapter, cohort = ALGORITHMS["personal"](), small_lora(), clients(3)
    made = runtime(size=2, at_once=3, seconds=timed(c0=1.0, c1=1.1, c2=1.5))
    first = initial_state(algorithm, adapter, 3)
    second, _ = run(algorithm, 1, made, cohort=cohort)
    last, _ = run(algorithm, 2, made, second, cohort=cohort)  # c2 arrives at 1.5, starts again, and arrives at 3.0
    once, _ = run(algorithm, 1, sequential(), first, cohort=cohort[2:])
    mine = dataclasses.replace(second, personal={"c2": once.personal["c2"]})
    twice, _ = run(algorithm, 1, sequential(), mine, cohort=cohort[2:])
    assert "c2" not in second.personal
    assert gap(last.personal["c2"], twice.personal["c2"]) < 1e-12
    assert gap(once.personal["c2"], twice.personal["c2"]) > 1e-4
