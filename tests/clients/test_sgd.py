"""The local work itself, against a plain loop with autograd: FedProx's term and the schedule over rounds."""

from __future__ import annotations

import dataclasses

import torch
from tests.small import batch, clients, fedavg, gap, small_lora

from fedloom.clients import sgd_client
from fedloom.optimizers import decay, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import sequential
from fedloom.types import State, Tree

LR = 0.2


def by_hand(adapter, start: Tree, batches, learning_rates, mu: float) -> Tree:
    """SGD on loss + mu / 2 ||w - w0||^2, written out with autograd."""
    params = dict(start)
    for data, lr in zip(batches, learning_rates, strict=True):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        loss = adapter.loss(
            {name: leaf[None] for name, leaf in leaves.items()}, {name: leaf[None] for name, leaf in data.items()}
        ).sum()
        far = sum(((leaves[name] - start[name]) ** 2).sum() for name in leaves)
        grads = torch.autograd.grad(loss + mu / 2 * far, list(leaves.values()))
        params = {name: leaf - lr * grad for (name, leaf), grad in zip(params.items(), grads, strict=True)}
    return params


def started(algorithm, adapter) -> State:
    """A state in which B is not zero."""
    draw = torch.Generator().manual_seed(1)
    state = initial_state(algorithm, adapter, 3)
    noise = {k: 0.1 * torch.randn(x.shape, generator=draw, dtype=x.dtype) for k, x in state.params.items()}
    return dataclasses.replace(state, params={k: x + noise[k] for k, x in state.params.items()})


def test_fedprox_is_the_gradient_of_its_objective():
    adapter = small_lora()
    algorithm = fedavg(sgd_client(sgd(LR), prox_mu=0.7))
    state = started(algorithm, adapter)
    client = clients()[3]._replace(batches=tuple(batch(i) for i in range(4)))
    after, _ = run_round(algorithm, adapter, sequential(), state, [client])
    want = by_hand(adapter, state.params, client.batches, [LR] * 4, mu=0.7)
    assert gap(after.params, want) < 1e-12
    assert gap(after.params, by_hand(adapter, state.params, client.batches, [LR] * 4, mu=0.0)) > 1e-5


def test_the_schedule_goes_on_where_the_last_round_ended():
    adapter = small_lora()
    schedule = decay("linear", 4, min_lr_ratio=0.2)
    algorithm = fedavg(sgd_client(sgd(LR), schedule=schedule))
    client = clients()[3]._replace(batches=tuple(batch(i) for i in range(2)))
    for round in range(4):
        state = dataclasses.replace(started(algorithm, adapter), round=round)
        after, _ = run_round(algorithm, adapter, sequential(), state, [client])
        # half a step in: rounds 0.25, 0.75, 1.25, ... of 4, from 1 down to 0.2
        rates = [LR * (1 - 0.8 * (round + (step + 0.5) / 2) / 4) for step in range(2)]
        assert gap(after.params, by_hand(adapter, state.params, client.batches, rates, mu=0.0)) < 1e-12
