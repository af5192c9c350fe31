"""FedOpt (Reddi et al. 2021): any optimiser on the pseudo-gradient `params - proposal`.

The server acts on an explicit copy of the global parameters that no client's training has touched.
"""

from __future__ import annotations

import torch

from fedloom.optimizers import Optimizer, adagrad, adam, sgd, yogi
from fedloom.tree import sub
from fedloom.types import Proposal, ServerState, ServerUpdate, Tree


def optimize(optimizer: Optimizer) -> ServerUpdate:
    """Use a client optimiser at the server: the trees get a cohort axis of one."""

    def cohort_of_one(tree: Tree) -> Tree:
        return {name: leaf[None] for name, leaf in tree.items()}

    def apply(params: Tree, proposal: Proposal, state: ServerState) -> tuple[Tree, ServerState]:
        pseudo_gradient = cohort_of_one(sub(params, proposal.params))
        device = next(iter(params.values())).device
        lr_scale_C = torch.ones(1, dtype=torch.float64, device=device)
        moved, state = optimizer.update(pseudo_gradient, state, cohort_of_one(params), lr_scale_C)
        return {name: leaf[0] for name, leaf in moved.items()}, state

    return ServerUpdate(init=lambda params: optimizer.init(cohort_of_one(params)), apply=apply)


def fed_avgm(learning_rate: float = 1.0, *, momentum: float = 0.9) -> ServerUpdate:
    """FedAvgM (Hsu et al. 2019): server momentum; with momentum 0 and learning rate 1 it is FedAvg."""
    return optimize(sgd(learning_rate, momentum=momentum))


def fed_adam(
    learning_rate: float = 1e-2, *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> ServerUpdate:
    """FedAdam (Reddi et al. 2021, Algorithm 2): no bias correction, the second moment starts at tau squared."""
    return optimize(
        adam(learning_rate, beta1=beta1, beta2=beta2, epsilon=tau, bias_correction=False, initial_second=tau * tau)
    )


def fed_yogi(
    learning_rate: float = 1e-2, *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> ServerUpdate:
    """FedYogi (Reddi et al. 2021, Algorithm 2)."""
    return optimize(
        yogi(learning_rate, beta1=beta1, beta2=beta2, epsilon=tau, bias_correction=False, initial_second=tau * tau)
    )


def fed_adagrad(learning_rate: float = 1e-2, *, beta1: float = 0.0, tau: float = 1e-3) -> ServerUpdate:
    """FedAdagrad (Reddi et al. 2021, Algorithm 2)."""
    return optimize(adagrad(learning_rate, beta1=beta1, epsilon=tau, initial_second=tau * tau))
