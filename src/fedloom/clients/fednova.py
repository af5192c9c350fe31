"""FedNova's clients (Wang et al. 2020): FedAvg's or FedProx's local work, and how much of it there was.

Shape suffixes: C clients in the cohort axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom.clients.sgd import sgd_client
from fedloom.ops.names import WORK
from fedloom.optimizers import Optimizer
from fedloom.types import ClientUpdate, Tree

PROBE = "probe"


class Probed(NamedTuple):
    """An optimiser's state, with one number more among its parameters."""

    opt: Any
    place: Tree  # of the probe, [C]; it begins at 0


def fednova_client(optimizer: Optimizer, *, prox_mu: float = 0.0, **settings: Any) -> ClientUpdate:
    """`sgd_client` that tells eta ||a||_1 of its round: the weights a that its local gradients have in its update.

    The paper gives a by optimiser: all ones for SGD, (1 - rho^(tau - j)) / (1 - rho) with momentum rho, and
    (1 - eta mu)^(tau - 1 - j) with FedProx's term. Here a number beside the parameters goes through the same optimiser
    and the same schedule with the gradient 1 in every step, so that it ends at -eta ||a||_1: that is each of these
    forms, and their mixtures, since such optimisers are linear in their gradients. Adam's steps are not; there the
    number is that of the steps, weighed by the schedule, to which Adam's own rule comes with a constant gradient.
    """
    inner = sgd_client(probed(optimizer, prox_mu), prox_mu=prox_mu, **settings)

    def finish(broadcast_C: Tree, state: Any) -> tuple[Tree, Tree]:
        delta_C, own_C = inner.finish(broadcast_C, state)
        return {**delta_C, WORK: -state.opt.place[PROBE]}, own_C

    return inner._replace(finish=finish)


def probed(inner: Optimizer, prox_mu: float) -> Optimizer:
    """`inner` with the probe among its parameters."""

    def init(params: Tree) -> Probed:
        first = next(iter(params.values()))
        place: dict[str, Tensor] = {PROBE: torch.zeros(len(first), dtype=torch.float64, device=first.device)}
        return Probed(inner.init({**params, **place}), place)

    def update(grads: Tree, state: Probed, params: Tree, lr_scale_C: Tensor) -> tuple[Tree, Probed]:
        pull = {PROBE: 1 + prox_mu * state.place[PROBE]}
        moved, opt = inner.update({**grads, **pull}, state.opt, {**params, **state.place}, lr_scale_C)
        place = {PROBE: moved[PROBE]}
        return {name: leaf for name, leaf in moved.items() if name != PROBE}, Probed(opt, place)

    return Optimizer(init, update)
