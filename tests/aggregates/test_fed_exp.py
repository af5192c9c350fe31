"""FedExP against Algorithm 1 of the paper, with every client's change measured apart."""

from __future__ import annotations

import pytest
import torch
from tests.small import clients, fedavg, gap, small_lora

from fedloom.aggregates import fed_exp
from fedloom.clients import sgd_client
from fedloom.errors import UserError
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.servers import fed_avgm


@pytest.mark.parametrize(("epsilon", "longer"), [(1e-6, True), (1e6, False)])
@pytest.mark.parametrize("uniform", [True, False])
def test_it_is_algorithm_1(epsilon, longer, uniform):
    cohort, adapter = clients(), small_lora()
    plain = fedavg(sgd_client(sgd(0.5)), uniform_weight=uniform)
    algorithm = fedavg(sgd_client(sgd(0.5)), aggregate=fed_exp(epsilon=epsilon), uniform_weight=uniform)
    state = initial_state(algorithm, adapter, 3)
    state, _ = run_round(plain, adapter, batched(3), state, cohort)  # B is not zero from here on
    after, _ = run_round(algorithm, adapter, batched(3), state, cohort)
    mean, _ = run_round(plain, adapter, batched(3), state, cohort)

    weights = torch.tensor([1.0 if uniform else client.weight for client in cohort], dtype=torch.float64)
    squares = []
    for client in cohort:
        alone, _ = run_round(plain, adapter, sequential(), state, [client])
        squares.append(sum(float((alone.params[name] - leaf).square().sum()) for name, leaf in state.params.items()))
    whole = sum(float((mean.params[name] - leaf).square().sum()) for name, leaf in state.params.items())
    mean_square = float(weights @ torch.tensor(squares, dtype=torch.float64) / weights.sum())
    step = max(1.0, mean_square / (2 * (whole + epsilon)))
    assert (step > 1) == longer
    wanted = {name: leaf + step * (mean.params[name] - leaf) for name, leaf in state.params.items()}
    assert gap(after.params, wanted) < 1e-9


def test_a_server_with_a_rate_of_its_own_is_refused():
    with pytest.raises(UserError, match="length of the server's step itself"):
        fedavg(aggregate=fed_exp(), server=fed_avgm(1.0, momentum=0.9))
