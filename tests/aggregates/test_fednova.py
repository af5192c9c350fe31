"""FedNova against the paper's formulas: a_i written out per optimiser, ragged step counts, unequal weights."""

from __future__ import annotations

import pytest
import torch
from tests.small import clients, fedavg, gap, small_lora

from fedloom.aggregates import fednova
from fedloom.clients import fednova_client, sgd_client
from fedloom.compress import quantize, zstd
from fedloom.errors import RunError
from fedloom.ops.names import WORK
from fedloom.optimizers import adam, decay, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.types import Algorithm

ETA, RHO, MU = 0.2, 0.9, 0.7


def ones(tau):
    return [1.0] * tau


def momentum(tau):
    """Section 3.1: a_i = [1 - rho^tau, 1 - rho^(tau - 1), ..., 1 - rho] / (1 - rho)."""
    return [(1 - RHO ** (tau - j)) / (1 - RHO) for j in range(tau)]


def prox(tau):
    """Section 3.1: a_i = [(1 - alpha)^(tau - 1), ..., (1 - alpha), 1] with alpha = eta mu."""
    return [(1 - ETA * MU) ** (tau - 1 - j) for j in range(tau)]


FORMS = {
    "sgd": (lambda **more: fednova_client(sgd(ETA), **more), lambda **more: sgd_client(sgd(ETA), **more), ones),
    "momentum": (
        lambda **more: fednova_client(sgd(ETA, momentum=RHO), **more),
        lambda **more: sgd_client(sgd(ETA, momentum=RHO), **more),
        momentum,
    ),
    "prox": (
        lambda **more: fednova_client(sgd(ETA), prox_mu=MU, **more),
        lambda **more: sgd_client(sgd(ETA), prox_mu=MU, **more),
        prox,
    ),
    "adam": (lambda **more: fednova_client(adam(ETA), **more), lambda **more: sgd_client(adam(ETA), **more), ones),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1, 8])
def test_it_is_the_papers_formula_with_ragged_steps(form, width):
    ours, plain, a = FORMS[form]
    cohort, adapter = clients(), small_lora()
    assert len({len(client.batches) for client in cohort}) > 1
    algorithm = fedavg(ours(), aggregate=fednova())
    state = initial_state(algorithm, adapter, 3)
    after, _ = run_round(algorithm, adapter, batched(width), state, cohort)

    whole = sum(client.weight for client in cohort)
    tau_eff, step = 0.0, {name: torch.zeros_like(leaf) for name, leaf in state.params.items()}
    for client in cohort:  # d_i = G_i a_i / ||a_i||_1, and -eta G_i a_i is the client's delta
        alone, _ = run_round(fedavg(plain()), adapter, sequential(), state, [client])
        norm, p = sum(a(len(client.batches))), client.weight / whole
        tau_eff += p * norm
        step = {name: leaf + p * (alone.params[name] - state.params[name]) / norm for name, leaf in step.items()}
    wanted = {name: leaf + tau_eff * step[name] for name, leaf in state.params.items()}
    assert gap(after.params, wanted) < (1e-6 if form == "adam" else 1e-12)  # Adam's epsilon
    averaged, _ = run_round(fedavg(plain()), adapter, sequential(), state, cohort)
    assert gap(after.params, averaged.params) > 1e-4


def test_with_equal_work_it_is_the_mean():
    cohort = [client._replace(batches=client.batches[:1]) for client in clients()]
    adapter = small_lora()
    for settings in ({}, {"schedule": decay("cosine", 3)}):
        algorithm = fedavg(fednova_client(sgd(ETA, momentum=RHO), **settings), aggregate=fednova())
        state = initial_state(algorithm, adapter, 3)
        ours, _ = run_round(algorithm, adapter, batched(8), state, cohort)
        plain, _ = run_round(fedavg(sgd_client(sgd(ETA), **settings)), adapter, batched(8), state, cohort)
        assert gap(ours.params, plain.params) < 1e-12


def test_a_schedule_within_the_round_counts_as_work():
    """a_j is in proportion to the learning rate of step j, as the paper has it for decaying rates."""
    adapter, schedule = small_lora(), decay("linear", 1)
    algorithm = fedavg(fednova_client(sgd(ETA), schedule=schedule), aggregate=fednova())
    state = initial_state(algorithm, adapter, 3)
    told = {}
    aggregate = algorithm.aggregate

    def lift(params, delta, weight):
        told[weight] = float(delta[WORK])
        return aggregate.lift(params, delta, weight)

    spied = Algorithm(algorithm.client, aggregate._replace(lift=lift), algorithm.server)
    run_round(spied, adapter, batched(8), state, clients())
    for client in clients():
        tau = len(client.batches)
        rates = [float(schedule(torch.tensor([(j + 0.5) / tau], dtype=torch.float64))) for j in range(tau)]
        assert told[client.weight] == pytest.approx(ETA * sum(rates), rel=1e-12)


def test_the_number_is_not_compressed_and_not_a_parameter():
    adapter = small_lora()
    algorithm = fedavg(fednova_client(sgd(ETA)), aggregate=fednova(), compress=(quantize(8), zstd()))
    state = initial_state(algorithm, adapter, 3)
    after, _ = run_round(algorithm, adapter, batched(8), state, clients())
    exact, _ = run_round(fedavg(fednova_client(sgd(ETA)), aggregate=fednova()), adapter, batched(8), state, clients())
    assert after.params.keys() == state.params.keys()
    assert 0 < gap(after.params, exact.params) < 0.02 * gap(exact.params, state.params)


def test_a_client_that_does_not_say_its_work_is_told():
    algorithm, adapter = fedavg(sgd_client(sgd(ETA)), aggregate=fednova()), small_lora()
    with pytest.raises(RunError, match="how much work"):
        run_round(algorithm, adapter, batched(8), initial_state(algorithm, adapter, 3), clients())
