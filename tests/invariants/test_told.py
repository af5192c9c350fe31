"""Every runtime gives the same for clients that send more than parameters, or keep more than a model."""

from __future__ import annotations

import pytest
from tests.small import clients, fedavg, gap, small_lora

from fedloom import wire
from fedloom.aggregates import fednova, mean, q_fedavg, scaffold
from fedloom.clients import (
    error_feedback,
    fednova_client,
    scaffold_client,
    sgd_client,
    split_personal,
    tells_start_loss,
    with_control,
)
from fedloom.compress import top_k
from fedloom.optimizers import adamw, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import ClientSite, batched, loopback, sequential
from fedloom.runtimes.cohort import has_own_model
from fedloom.servers import nesterov

SPARSE = (top_k(0.3),)
ALGORITHMS = {
    "fednova": lambda: fedavg(fednova_client(sgd(0.3, momentum=0.9), prox_mu=0.1), aggregate=fednova()),
    "fednova, error feedback": lambda: fedavg(
        error_feedback(fednova_client(sgd(0.3)), SPARSE), aggregate=fednova(), compress=SPARSE
    ),
    "fednova, personal": lambda: fedavg(
        split_personal(fednova_client(sgd(0.3)), lambda name: "lora_A" in name), aggregate=fednova()
    ),
    "q_fedavg": lambda: fedavg(tells_start_loss(sgd_client(sgd(0.3))), aggregate=q_fedavg(2.0, 0.3)),
    "scaffold": lambda: fedavg(scaffold_client(sgd(0.3)), aggregate=scaffold(15.0)),
    "scaffold, adamw, server momentum": lambda: fedavg(
        scaffold_client(adamw(1e-2)), aggregate=scaffold(15.0), server=nesterov()
    ),
    "scaffold, error feedback": lambda: fedavg(
        error_feedback(scaffold_client(sgd(0.3)), SPARSE), aggregate=scaffold(15.0), compress=SPARSE
    ),
    "kept optimiser": lambda: fedavg(sgd_client(adamw(1e-2), keep_optimizer=True), aggregate=mean(), server=nesterov()),
}


def adapter_for(name):
    return with_control(small_lora()) if "scaffold" in name else small_lora()


def two_rounds(name, runtime, cohort):
    algorithm, adapter = ALGORITHMS[name](), adapter_for(name)
    state = initial_state(algorithm, adapter, 3)
    reports = []
    for number in range(2):  # someone is missing in the second round
        state, report = run_round(algorithm, adapter, runtime, state, cohort[number:])
        assert not report.failed, report.failed
        reports.append(report)
    return state, reports


@pytest.mark.parametrize("name", ALGORITHMS)
def test_batched_and_messages_equal_sequential(name):
    want, _ = two_rounds(name, sequential(), clients())
    got, reports = two_rounds(name, batched(3), clients()[::-1][:5][::-1])
    assert gap(want.params, got.params) < 1e-10
    assert want.personal.keys() == got.personal.keys()
    assert all(gap(want.personal[i], got.personal[i]) < 1e-10 for i in want.personal)
    homes = {
        c.id: ClientSite(c.id, lambda: (ALGORITHMS[name](), adapter_for(name)), lambda round, c=c: c, {})
        for c in clients()
    }
    sizes = {}

    def spied(home):
        def send(raw):
            reply = home.serve(raw)
            assert wire.decode(reply).kind == "trained"
            sizes[home.client] = (float(len(reply)), float(len(raw)))
            return reply

        return send

    far, _ = two_rounds(name, loopback({i: spied(home) for i, home in homes.items()}), clients())
    assert gap(want.params, far.params) < 1e-10
    for i, own in want.personal.items():
        assert gap(own, homes[i].personal) < 1e-10
    for i, row in reports[-1].clients.items():
        assert (row["bytes_up"], row["bytes_down"]) == sizes[i]


def test_what_is_personal_but_no_model():
    params = with_control(small_lora()).init(0)
    own = {name: has_own_model(make().client, params) for name, make in ALGORITHMS.items()}
    assert [name for name, is_own in own.items() if is_own] == ["fednova, personal"]
