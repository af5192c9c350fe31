"""Every runtime gives the same result, for every client update."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.small import CLIENT_UPDATES, clients, fedavg, gap, small_lora

from fedloom import wire
from fedloom.clients import sgd_client
from fedloom.errors import RunError
from fedloom.optimizers import adamw
from fedloom.rounds import Sampling, federate, initial_state, run_round
from fedloom.runtimes import ClientSite, batched, loopback, sequential, with_dropout, with_ranks
from fedloom.servers import fed_adam, fed_avgm
from fedloom.types import Algorithm, Client, Evaluation, Runtime, State

TOLERANCE = 1e-10  # float64


def loss_evaluation(by_id):
    def run(adapter, tree_C, block):
        rows = []
        for i, client in enumerate(block):
            tree = {name: leaf[i : i + 1] for name, leaf in tree_C.items()}
            batch = {name: leaf[None] for name, leaf in by_id[client.id].batches[0].items()}
            nll, count = adapter.nll(tree, batch)
            rows.append({"loss_sum": float(nll[0]), "target_tokens": float(count[0])})
        return rows

    return Evaluation("loss", run)


def sites(algorithm: Algorithm, cohort: list[Client]) -> dict[str, ClientSite]:
    evaluation = loss_evaluation({c.id: c for c in cohort})
    return {
        c.id: ClientSite(c.id, lambda: (algorithm, small_lora()), lambda round, c=c: c, {"loss": evaluation})
        for c in cohort
    }


def two_rounds(algorithm: Algorithm, runtime: Runtime, cohort: list[Client]) -> tuple[State, dict]:
    adapter = small_lora()
    state = initial_state(algorithm, adapter, seed=3)
    for _ in range(2):
        state, report = run_round(algorithm, adapter, runtime, state, cohort)
    assert not report.failed
    return state, runtime.evaluate(algorithm, adapter, state, cohort, loss_evaluation({c.id: c for c in cohort}))


@pytest.mark.parametrize("name", CLIENT_UPDATES)
def test_batched_and_messages_equal_sequential(name):
    algorithm = fedavg(CLIENT_UPDATES[name]())
    want, want_eval = two_rounds(algorithm, sequential(), clients())
    if name != "local_only":
        assert gap(want.params, initial_state(algorithm, small_lora(), 3).params) > 1e-4, "nothing moved"
    for runtime in (batched(8), batched(3)):
        got, got_eval = two_rounds(algorithm, runtime, clients())
        assert gap(want.params, got.params) < TOLERANCE
        assert want.personal.keys() == got.personal.keys()
        assert all(gap(want.personal[i], got.personal[i]) < TOLERANCE for i in want.personal)
        for client in want_eval:
            assert want_eval[client]["loss_sum"] == pytest.approx(got_eval[client]["loss_sum"], rel=1e-9)
    homes = sites(algorithm, clients())
    far, far_eval = two_rounds(algorithm, loopback({i: home.serve for i, home in homes.items()}), clients())
    assert gap(want.params, far.params) < TOLERANCE
    assert not far.personal, "personal state left its client"
    for i in want.personal:
        assert gap(want.personal[i], homes[i].personal) < TOLERANCE
    for client in want_eval:
        assert want_eval[client]["loss_sum"] == pytest.approx(far_eval[client]["loss_sum"], rel=1e-9)


def test_messages_tell_what_making_and_reading_them_took(monkeypatch):
    algorithm, cohort = fedavg(), clients(2)
    adapter = small_lora()
    state = initial_state(algorithm, adapter, seed=3)
    homes = sites(algorithm, cohort)
    sends = loopback({i: home.serve for i, home in homes.items()})
    _, first = run_round(algorithm, adapter, sends, state, cohort)
    said = {i: row["communication_seconds"] for i, row in first.clients.items()}
    assert all(0 < seconds < first.seconds for seconds in said.values())
    assert first.metrics["communication_seconds"] == pytest.approx(sum(said.values()))
    assert "communication_seconds" not in run_round(algorithm, adapter, batched(2), state, cohort)[1].metrics

    clock = [0.0]  # a clock that stands still but while a message is made or read

    def slow(work):
        def worked(*args, **more):
            clock[0] += 1.0
            return work(*args, **more)

        return worked

    for name in ("encode", "decode"):
        monkeypatch.setattr(wire, name, slow(getattr(wire, name)))
    monkeypatch.setattr("fedloom.runtimes.messages.time.perf_counter", lambda: clock[0])
    _, timed = run_round(algorithm, adapter, sends, state, cohort)
    assert {row["communication_seconds"] for row in timed.clients.values()} == {4.0}, "made and read, both ways"


def test_local_only_moves_each_client_and_not_the_server():
    algorithm = fedavg(CLIENT_UPDATES["local_only"]())
    state, _ = two_rounds(algorithm, batched(8), clients())
    assert gap(state.params, initial_state(algorithm, small_lora(), 3).params) == 0
    assert all(gap(state.params, own) > 1e-4 for own in state.personal.values())
    alone = fedavg(sgd_client(adamw(1e-2)))  # with one client FedAvg is local training
    adapter = small_lora()
    one = initial_state(alone, adapter, 3)
    for _ in range(2):
        one, _ = run_round(alone, adapter, sequential(), one, [clients()[3]])
    assert gap(one.params, state.personal["c3"]) < 1e-9


def test_bytes_are_those_of_the_messages():
    algorithm = fedavg()
    cohort = clients()
    adapter = small_lora()
    state = initial_state(algorithm, adapter, 3)
    here = batched(8).train(algorithm, adapter, state, cohort)
    seen: dict[str, tuple[int, int]] = {}

    def spy(home):
        def send(raw):
            reply = home.serve(raw)
            seen[home.client] = (len(reply), len(raw))
            return reply

        return send

    loopback({i: spy(home) for i, home in sites(algorithm, cohort).items()}).train(algorithm, adapter, state, cohort)
    for client, row in here.clients.items():
        assert (row["bytes_up"], row["bytes_down"]) == seen[client]
    assert all(up > 4 * 2 * 3 * 32 for up, _ in seen.values())


def test_order_of_the_cohort_does_not_matter():
    algorithm = fedavg(CLIENT_UPDATES["adamw"]())
    want, _ = two_rounds(algorithm, batched(2), clients())
    got, _ = two_rounds(algorithm, batched(2), clients()[::-1])
    assert gap(want.params, got.params) < TOLERANCE


def test_a_round_leaves_its_state_as_it_was():
    algorithm = fedavg(CLIENT_UPDATES["adamw"](), server=fed_adam())
    adapter = small_lora()
    state = initial_state(algorithm, adapter, 3)
    state, _ = run_round(algorithm, adapter, batched(8), state, clients())
    before = {name: leaf.clone() for name, leaf in state.params.items()}
    once, _ = run_round(algorithm, adapter, batched(8), state, clients())
    twice, _ = run_round(algorithm, adapter, batched(8), state, clients())
    assert gap(before, state.params) == 0
    assert gap(once.params, twice.params) == 0
    assert gap(once.params, state.params) > 0


def test_the_server_remembers_from_round_to_round():
    algorithm = fedavg(server=fed_avgm(1.0, momentum=0.5))
    plain = fedavg()
    adapter = small_lora()
    first = initial_state(algorithm, adapter, 3)
    second, _ = run_round(algorithm, adapter, batched(8), first, clients())
    third, _ = run_round(algorithm, adapter, batched(8), second, clients())
    pull, _ = run_round(plain, adapter, batched(8), dataclasses.replace(second, server=None), clients())
    heavy = {k: pull.params[k] + 0.5 * (second.params[k] - first.params[k]) for k in first.params}
    assert gap(third.params, heavy) < TOLERANCE
    assert gap(third.params, pull.params) > 1e-4


def test_a_client_is_told_who_takes_part_and_when():
    algorithm = fedavg()
    told = []

    def listen(raw):
        told.append(wire.decode(raw))
        return wire.encode("failed", {"reason": "only listening"})

    state = dataclasses.replace(initial_state(algorithm, small_lora(), 3), round=6)
    done = loopback({"c0": listen, "c1": listen}).train(algorithm, small_lora(), state, clients(2))
    assert done.failed == {"c0": "only listening", "c1": "only listening"}
    assert [message.kind for message in told] == ["train", "train"]
    assert told[1].header == {"seed": 3, "round": 6, "client": "c1", "cohort": ["c0", "c1"]}
    assert gap(told[1].trees["params"], state.params) == 0


def test_mixed_ranks_in_a_cohort_equal_each_at_its_own_rank():
    algorithm = fedavg(CLIENT_UPDATES["adamw"]())
    cohort = clients(3, ranks=[1, 2, 4])
    adapter = small_lora(rank=4)
    state = initial_state(algorithm, adapter, 3)
    for client in cohort:
        moved, _ = run_round(algorithm, adapter, batched(8), state, [client])
        small = small_lora(rank=client.rank)

        def cut(tree, rank=client.rank):
            """The client's own factors: the server's are in the scale of the full rank."""
            return {k: leaf[:rank] if "lora_A" in k else leaf[:, :rank] * (rank / 4) for k, leaf in tree.items()}

        own = dataclasses.replace(state, params=cut(state.params))
        want, _ = run_round(algorithm, small, sequential(), own, [client._replace(rank=None)])
        assert gap(cut(moved.params), want.params) < TOLERANCE


def test_failed_clients_are_left_out_and_the_rest_goes_on():
    algorithm = fedavg()
    adapter = small_lora()
    state = initial_state(algorithm, adapter, 3)
    good = clients()
    broken = [c if c.id != "c2" else c._replace(batches=()) for c in good]
    homes = sites(algorithm, broken)
    for runtime in (sequential(), loopback({i: home.serve for i, home in homes.items()})):
        after, report = run_round(algorithm, adapter, runtime, state, broken)
        assert list(report.failed) == ["c2"]
        want, _ = run_round(algorithm, adapter, sequential(), state, [c for c in good if c.id != "c2"])
        assert gap(after.params, want.params) < TOLERANCE


def test_a_non_finite_client_fails_alone_inside_a_block():
    algorithm = fedavg()
    adapter = small_lora()
    state = initial_state(algorithm, adapter, 3)
    loss = adapter.loss

    def poisoned(tree_C, batch_CBT):
        out_C = loss(tree_C, batch_CBT)
        if out_C.shape[0] == 5:
            return out_C * torch.tensor([1.0, 1, float("nan"), 1, 1], dtype=out_C.dtype)
        return out_C

    adapter.loss = poisoned
    order = sorted(clients(), key=lambda c: -len(c.batches))
    after, report = run_round(algorithm, adapter, batched(8), state, clients())
    assert list(report.failed) == [order[2].id]
    assert "step 1" in report.failed[order[2].id]
    adapter.loss = loss
    want, _ = run_round(algorithm, adapter, batched(8), state, [c for c in clients() if c.id != order[2].id])
    assert gap(after.params, want.params) < TOLERANCE


def test_a_round_without_any_client_stops_with_every_reason():
    algorithm = fedavg()
    adapter = small_lora()
    state = initial_state(algorithm, adapter, 3)
    with pytest.raises(RunError, match=r"none of 5 clients finished[\s\S]*c0: dropped out[\s\S]*c4: dropped out"):
        run_round(algorithm, adapter, with_dropout(batched(2), 1.0), state, clients())


def test_dropout_is_the_same_in_every_runtime_and_differs_by_round():
    algorithm = fedavg()
    adapter = small_lora()
    state = initial_state(algorithm, adapter, 3)
    lost = []
    for round in range(12):
        at = dataclasses.replace(state, round=round)
        a = run_round(algorithm, adapter, with_dropout(sequential(), 0.4), at, clients())[1].failed
        b = run_round(algorithm, adapter, with_dropout(batched(8), 0.4), at, clients()[::-1])[1].failed
        assert a.keys() == b.keys()
        lost.append(frozenset(a))
    assert len(set(lost)) > 3
    assert 0.2 < sum(map(len, lost)) / 60 < 0.6


class Everyone:
    def __init__(self, cohort):
        self.by_id = {c.id: c for c in cohort}
        self.ids = list(self.by_id)

    def open(self, client, round):
        return self.by_id[client]


def test_partial_participation_is_seeded_and_covers_everyone():
    seen = [Sampling(2).cohort(list("abcdef"), seed=1, round=r) for r in range(30)]
    assert seen == [Sampling(2).cohort(list("abcdef"), seed=1, round=r) for r in range(30)]
    assert all(len(set(ids)) == 2 for ids in seen)
    assert set().union(*seen) == set("abcdef")
    assert seen != [Sampling(2).cohort(list("abcdef"), seed=2, round=r) for r in range(30)]
    with pytest.raises(RunError, match="clients_per_round is 7, but there are 6 clients"):
        Sampling(7).cohort(list("abcdef"), 1, 0)


def test_a_run_that_goes_on_from_a_saved_state_is_the_uninterrupted_one_bit_for_bit():
    algorithm = fedavg(CLIENT_UPDATES["schedule"](), server=fed_avgm(0.7, momentum=0.5))
    adapter = small_lora()
    states = [initial_state(algorithm, adapter, 3)]
    for state, _ in federate(
        algorithm, adapter, batched(2), states[0], Everyone(clients()), rounds=4, sampling=Sampling(3)
    ):
        states.append(state)
    other = small_lora()
    again = list(federate(algorithm, other, batched(2), states[2], Everyone(clients()), rounds=4, sampling=Sampling(3)))
    assert [s.round for s, _ in again] == [3, 4]
    assert gap(again[-1][0].params, states[-1].params) == 0


@pytest.mark.parametrize("name", ["adamw", "fedsa_lora", "rolora"])
def test_ranks_of_clients_are_the_same_in_every_runtime(name):
    ranks = {"c0": 1, "c1": 4, "c2": 2, "c3": 3, "c4": 1}
    algorithm = fedavg(CLIENT_UPDATES[name]())
    want, want_eval = two_rounds(algorithm, with_ranks(sequential(), ranks.get), clients())
    got, got_eval = two_rounds(algorithm, with_ranks(batched(3), ranks.get), clients())
    evaluation = loss_evaluation({c.id: c for c in clients()})
    homes = {
        c.id: ClientSite(
            c.id, lambda: (algorithm, small_lora()), lambda round, c=c: c, {"loss": evaluation}, ranks[c.id]
        )
        for c in clients()
    }
    far, far_eval = two_rounds(algorithm, loopback({i: home.serve for i, home in homes.items()}), clients())
    equal, _ = two_rounds(algorithm, sequential(), clients())
    assert gap(want.params, got.params) < TOLERANCE
    assert gap(want.params, far.params) < TOLERANCE
    assert gap(want.params, equal.params) > 1e-4, "the ranks made no difference"
    for client in want_eval:
        for other in (got_eval, far_eval):
            assert want_eval[client]["loss_sum"] == pytest.approx(other[client]["loss_sum"], rel=1e-9)
