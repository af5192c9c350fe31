"""DiLoCo against torch's own optimisers: AdamW that lives on at each worker, Nesterov SGD outside."""

from __future__ import annotations

import torch
from tests.small import clients, fedavg, gap, small_lora

from fedloom.clients import sgd_client
from fedloom.optimizers import adamw
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched
from fedloom.servers import nesterov


def test_it_is_algorithm_1_with_torchs_optimisers():
    cohort, adapter = clients(3), small_lora()
    inner = sgd_client(adamw(1e-2, weight_decay=0.1), keep_optimizer=True)
    algorithm = fedavg(inner, server=nesterov(), uniform_weight=True)
    state = initial_state(algorithm, adapter, 3)
    theta = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in state.params.items()}
    outer = torch.optim.SGD(theta.values(), lr=0.7, momentum=0.9, nesterov=True)
    workers = {client.id: {name: torch.nn.Parameter(leaf.clone()) for name, leaf in theta.items()} for client in cohort}
    own = {i: torch.optim.AdamW(tree.values(), lr=1e-2, weight_decay=0.1) for i, tree in workers.items()}
    for _ in range(3):
        state, _ = run_round(algorithm, adapter, batched(2), state, cohort)
        for client in cohort:
            for name, leaf in workers[client.id].items():
                leaf.data = theta[name].detach().clone()
            for batch in client.batches:
                own[client.id].zero_grad()
                tree_C = {name: leaf[None] for name, leaf in workers[client.id].items()}
                adapter.loss(tree_C, {name: leaf[None] for name, leaf in batch.items()}).sum().backward()
                own[client.id].step()
        for name, leaf in theta.items():
            leaf.grad = sum(leaf.detach() - tree[name].detach() for tree in workers.values()) / len(workers)
        outer.step()
    assert gap(state.params, {name: leaf.detach() for name, leaf in theta.items()}) < 1e-9
    fresh = fedavg(sgd_client(adamw(1e-2, weight_decay=0.1)), server=nesterov(), uniform_weight=True)
    other = initial_state(fresh, adapter, 3)
    for _ in range(3):
        other, _ = run_round(fresh, adapter, batched(2), other, cohort)
    assert gap(other.params, state.params) > 1e-4, "nothing was remembered"
