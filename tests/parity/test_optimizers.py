"""Our optimisers against `torch.optim`, and a cohort against each client alone."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom.optimizers import adagrad, adam, adamw, decay, sgd, yogi
from fedloom.servers import fed_adagrad, fed_adam, fed_avgm, fed_yogi
from fedloom.types import Proposal

PAIRS = {
    "sgd": (sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (
        sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adam": (adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "adamw": (
        adamw(0.01, beta1=0.8, beta2=0.95, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.3),
    ),
    "adagrad": (adagrad(0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
}
ONE = torch.ones(1, dtype=torch.float64)


def gradients(step: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch(name):
    ours, make = PAIRS[name]
    start = gradients(99)
    theirs = torch.nn.Parameter(start.clone())
    reference = make([theirs])
    params, state = {"w": start[None]}, ours.init({"w": start[None]})
    for step in range(6):
        theirs.grad = gradients(step)
        reference.step()
        params, state = ours.update({"w": gradients(step)[None]}, state, params, ONE)
    assert float((params["w"][0] - theirs).abs().max()) < 1e-12
    assert float((params["w"][0] - start).abs().max()) > 1e-3


@pytest.mark.parametrize("make", [*[pair[0] for pair in PAIRS.values()], yogi(0.01)])
def test_a_cohort_equals_each_client_alone_with_its_own_learning_rate(make):
    scale_C = torch.tensor([1.0, 0.3], dtype=torch.float64)
    both = {"w": torch.stack([gradients(50), gradients(51)])}
    params, state = both, make.init(both)
    for step in range(4):
        grads = {"w": torch.stack([gradients(step), gradients(10 + step)])}
        params, state = make.update(grads, state, params, scale_C)
    for i in range(2):
        alone = {"w": both["w"][i : i + 1]}
        own = make.init(alone)
        for step in range(4):
            alone, own = make.update({"w": gradients(10 * i + step)[None]}, own, alone, scale_C[i : i + 1])
        assert float((alone["w"][0] - params["w"][i]).abs().max()) < 1e-14


def test_yogi_moves_its_second_moment_by_the_sign():
    update = yogi(0.1, beta2=0.9, initial_second=1.0, beta1=0.0, epsilon=0.0, bias_correction=False)
    params = {"w": torch.tensor([[0.0, 0.0]], dtype=torch.float64)}
    grads = {"w": torch.tensor([[2.0, 0.5]], dtype=torch.float64)}
    _, state = update.update(grads, update.init(params), params, ONE)
    assert state.second["w"].tolist() == [[1 + 0.1 * 4, 1 - 0.1 * 0.25]]


def test_fedopt_servers_follow_algorithm_2_of_reddi_et_al():
    """By hand: delta = proposal - params; m, v without bias correction; v starts at tau squared."""
    params = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    deltas = [torch.tensor([0.5, -0.1], dtype=torch.float64), torch.tensor([-0.2, 0.3], dtype=torch.float64)]
    eta, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3

    def by_hand(rule, beta1):
        x, m, v = params["w"].clone(), torch.zeros(2), torch.full((2,), tau**2, dtype=torch.float64)
        for d in deltas:
            m = beta1 * m + (1 - beta1) * d
            v = rule(v, d * d)
            x = x + eta * m / (v.sqrt() + tau)
        return x

    rules = {
        "adam": (fed_adam(eta, beta1=b1, beta2=b2, tau=tau), lambda v, q: b2 * v + (1 - b2) * q, b1),
        "yogi": (fed_yogi(eta, beta1=b1, beta2=b2, tau=tau), lambda v, q: v - (1 - b2) * q * torch.sign(v - q), b1),
        "adagrad": (fed_adagrad(eta, tau=tau), lambda v, q: v + q, 0.0),
    }
    for server, rule, beta1 in rules.values():
        now, state = params, server.init(params)
        for d in deltas:
            now, state = server.apply(now, Proposal({"w": now["w"] + d}), state)
        assert float((now["w"] - by_hand(rule, beta1)).abs().max()) < 1e-12


def test_fedavgm_is_server_momentum_and_without_it_fedavg():
    params, proposal = {"w": torch.tensor([1.0])}, Proposal({"w": torch.tensor([3.0])})
    plain = fed_avgm(1.0, momentum=0.0)
    assert plain.apply(params, proposal, plain.init(params))[0]["w"].item() == 3.0
    heavy = fed_avgm(1.0, momentum=0.5)
    now, state = heavy.apply(params, proposal, heavy.init(params))
    now, state = heavy.apply(now, Proposal({"w": now["w"]}), state)  # no pull: half the last move goes on
    assert now["w"].item() == 4.0


def test_schedules_run_over_rounds():
    at = torch.tensor([0.0, 0.5, 1.0, 3.0, 5.0, 9.0], dtype=torch.float64)
    assert decay("constant", 5)(at).tolist() == [1.0] * 6
    assert decay("linear", 5, min_lr_ratio=0.1)(at).tolist() == pytest.approx([1, 0.91, 0.82, 0.46, 0.1, 0.1])
    cosine = decay("cosine", 5, warmup_rounds=1)(at).tolist()
    assert cosine == pytest.approx([0, 0.5, 1, (1 + math.cos(math.pi / 2)) / 2, 0, 0])
