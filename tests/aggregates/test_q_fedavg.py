"""q-FedAvg against Algorithm 2 of the paper, with the losses measured apart."""

from __future__ import annotations

import pytest
import torch
from tests.small import clients, fedavg, gap, small_lora

from fedloom.aggregates import q_fedavg
from fedloom.clients import sgd_client, tells_start_loss
from fedloom.errors import RunError
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential

ETA = 0.2


def start_loss(adapter, params, client):
    """The mean over answer tokens of the client's batches, before any step."""
    rows = [
        adapter.nll({k: v[None] for k, v in params.items()}, {k: v[None] for k, v in batch.items()})
        for batch in client.batches
    ]
    return sum(float(total[0]) for total, _ in rows) / sum(float(count[0]) for _, count in rows)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("uniform", [True, False])
def test_it_is_algorithm_2(q, uniform):
    cohort, adapter = clients(), small_lora()
    update = tells_start_loss(sgd_client(sgd(ETA)))
    algorithm = fedavg(update, aggregate=q_fedavg(q, ETA), uniform_weight=uniform)
    state = initial_state(algorithm, adapter, 3)
    state, _ = run_round(algorithm, adapter, batched(3), state, cohort)  # B is not zero from here on
    after, _ = run_round(algorithm, adapter, batched(3), state, cohort)

    big_l, top, bottom = 1 / ETA, {name: torch.zeros_like(leaf) for name, leaf in state.params.items()}, 0.0
    for client in cohort:
        alone, _ = run_round(fedavg(sgd_client(sgd(ETA))), adapter, sequential(), state, [client])
        loss, p = start_loss(adapter, state.params, client), 1.0 if uniform else client.weight
        dw = {name: big_l * (leaf - alone.params[name]) for name, leaf in state.params.items()}
        square = sum(float((leaf**2).sum()) for leaf in dw.values())
        top = {name: leaf + p * loss**q * dw[name] for name, leaf in top.items()}
        bottom += p * (q * loss ** (q - 1) * square + big_l * loss**q)
    wanted = {name: leaf - top[name] / bottom for name, leaf in state.params.items()}
    assert gap(after.params, wanted) < 1e-10
    assert gap(after.params, state.params) > 1e-5


def test_with_q_zero_it_is_fedavg():
    adapter = small_lora()
    algorithm = fedavg(tells_start_loss(sgd_client(sgd(ETA))), aggregate=q_fedavg(0.0, ETA))
    state = initial_state(algorithm, adapter, 3)
    ours, told = run_round(algorithm, adapter, batched(8), state, clients())
    plain, want = run_round(fedavg(sgd_client(sgd(ETA))), adapter, batched(8), state, clients())
    assert gap(ours.params, plain.params) < 1e-12
    for key in ("loss_sum", "target_tokens", "tokens", "steps"):  # the extra passes are no training
        assert told.metrics[key] == pytest.approx(want.metrics[key])


def test_dropout_is_not_in_the_start_loss():
    cohort = clients(2)
    seen = {}
    for dropout in (0.0, 0.5):
        adapter = small_lora(dropout=dropout)
        algorithm = fedavg(tells_start_loss(sgd_client(sgd(ETA))), aggregate=q_fedavg(1.0, ETA))
        aggregate, told = algorithm.aggregate, []

        def lift(params, delta, weight, aggregate=aggregate, told=told):
            told.append(float(delta["told/start_loss"]))
            return aggregate.lift(params, delta, weight)

        spied = fedavg(algorithm.client, aggregate=aggregate._replace(lift=lift))
        run_round(spied, adapter, batched(8), initial_state(spied, adapter, 3), cohort)
        seen[dropout] = told
    assert seen[0.0] == pytest.approx(seen[0.5])


def test_a_client_that_does_not_say_its_loss_is_told():
    algorithm, adapter = fedavg(sgd_client(sgd(ETA)), aggregate=q_fedavg(1.0, ETA)), small_lora()
    with pytest.raises(RunError, match="loss at the start"):
        run_round(algorithm, adapter, batched(8), initial_state(algorithm, adapter, 3), clients())
