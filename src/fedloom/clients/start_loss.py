"""q-FedAvg's clients (Li et al. 2020): any local work, and the loss that the round began with.

Shape suffixes: C clients, B examples, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom.clients.sgd import targets_C
from fedloom.ops.names import START_LOSS
from fedloom.types import Batch, ClientUpdate, LossFn, Site, Tree


class Started(NamedTuple):
    work: Any
    start: Tree  # what the client was sent
    sum_C: Tensor
    count_C: Tensor


def tells_start_loss(inner: ClientUpdate) -> ClientUpdate:
    """The client tells F_k(w^t), the mean over the answer tokens that it trains on in the round, before any step.

    It costs one more forward pass per step. With whole epochs it is the loss on all of the client's rows.
    """

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Started:
        device = next(iter(broadcast_C.values())).device
        nothing = torch.zeros(len(sites), dtype=torch.float64, device=device)
        return Started(inner.init(broadcast_C, personal_C, sites), broadcast_C, nothing, nothing)

    def step(loss: LossFn, state: Started, batch_CBT: Batch) -> Started:
        plain = {name: leaf for name, leaf in batch_CBT.items() if name != "seed"}  # without dropout
        count_C = targets_C(batch_CBT).double()
        with torch.no_grad():  # and not counted as training, so not through what watches the training loss
            start_C = inspect.unwrap(loss)(state.start, plain).double()
        work = inner.step(loss, state.work, batch_CBT)
        return state._replace(work=work, sum_C=state.sum_C + start_C * count_C, count_C=state.count_C + count_C)

    def finish(broadcast_C: Tree, state: Started) -> tuple[Tree, Tree]:
        delta_C, own_C = inner.finish(broadcast_C, state.work)
        return {**delta_C, START_LOSS: state.sum_C / state.count_C.clamp(min=1)}, own_C

    return inner._replace(init=init, step=step, finish=finish)
