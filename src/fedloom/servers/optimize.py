"""FedOpt (Reddi et al. 2021): any optimiser on the pseudo-gradient `params - proposal`.

The server acts on an explicit copy of the global parameters that no client's training has touched.
"""

from __future__ import annotations

import torch

from fedloom.ops.names import CONTROL, apart
from fedloom.optimizers import Optimizer, adagrad, adam, sgd, yogi
from fedloom.tree import sub
from fedloom.types import Proposal, ServerState, ServerUpdate, Tree


def optimize(optimizer: Optimizer) -> ServerUpdate:
    """Use a client optimiser at the server: the trees get a cohort axis of one.

    Control variates are no parameters: they are taken as they are proposed.
    """

    def cohort_of_one(tree: Tree) -> Tree:
        return {name: leaf[None] for name, leaf in apart(tree, CONTROL)[1].items()}

    def apply(params: Tree, proposal: Proposal, state: ServerState) -> tuple[Tree, ServerState]:
        pseudo_gradient = cohort_of_one(sub(params, proposal.params))
        device = next(iter(params.values())).device
        lr_scale_C = torch.ones(1, dtype=torch.float64, device=device)
        moved, state = optimizer.update(pseudo_gradient, state, cohort_of_one(params), lr_scale_C)
        control, _ = apart(proposal.params, CONTROL)
        return {**{name: leaf[0] for name, leaf in moved.items()}, **control}, state

    return ServerUpdate(init=lambda params: optimizer.init(cohort_of_one(params)), apply=apply)


def fed_avgm(learning_rate: float = 1.0, *, momentum: float = 0.9) -> ServerUpdate:
    """FedAvgM (Hsu et al. 2019): server momentum; with momentum 0 and learning rate 1 it is FedAvg."""
    return optimize(sgd(learning_rate, momentum=momentum))


def nesterov(learning_rate: float = 0.7, *, momentum: float = 0.9) -> ServerUpdate:
    """Nesterov momentum at the server: DiLoCo's outer step (Douillard et al. 2023, Algorithm 1, line 14)."""
    return optimize(sgd(learning_rate, momentum=momentum, nesterov=True))


def fed_adam(
    learning_rate: float = 1e-2,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    initial_second: float | None = None,
) -> ServerUpdate:
    """FedAdam (Reddi et al. 2021, Algorithm 2): no bias correction.

    Args:
        initial_second: where the second moment starts; None is tau squared, the least that the paper allows.
    """
    return optimize(
        adam(
            learning_rate,
            beta1=beta1,
            beta2=beta2,
            epsilon=tau,
            bias_correction=False,
            initial_second=_start(initial_second, tau),
        )
    )


def fed_yogi(
    learning_rate: float = 1e-2,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    initial_second: float | None = None,
) -> ServerUpdate:
    """FedYogi (Reddi et al. 2021, Algorithm 2); see `fed_adam`."""
    return optimize(
        yogi(
            learning_rate,
            beta1=beta1,
            beta2=beta2,
            epsilon=tau,
            bias_correction=False,
            initial_second=_start(initial_second, tau),
        )
    )


def fed_adagrad(
    learning_rate: float = 1e-2, *, beta1: float = 0.0, tau: float = 1e-3, initial_second: float | None = None
) -> ServerUpdate:
    """FedAdagrad (Reddi et al. 2021, Algorithm 2); see `fed_adam`."""
    return optimize(adagrad(learning_rate, beta1=beta1, epsilon=tau, initial_second=_start(initial_second, tau)))


def _start(initial_second: float | None, tau: float) -> float:
    return tau * tau if initial_second is None else initial_second
