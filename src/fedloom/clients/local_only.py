"""Training alone: the arm that federated fine-tuning is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedloom.ops.names import CONTROL
from fedloom.types import FIXED, Batch, ClientUpdate, LossFn, Site, Tree


def local_only(inner: ClientUpdate) -> ClientUpdate:
    """Each client goes on from its own parameters and sends a zero update: `inner`, never averaged.

    The work of a round is the same as in the federated run (same steps, same schedule, a new optimiser each round).
    """

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Any:
        return inner.init({**broadcast_C, **personal_C}, {}, sites)

    def step(loss: LossFn, state: Any, batch_CBT: Batch) -> Any:
        return inner.step(loss, state, batch_CBT)

    def finish(broadcast_C: Tree, state: Any) -> tuple[Tree, Tree]:
        delta_C, _ = inner.finish(broadcast_C, state)  # from the common start, so it is the whole way so far
        own = {name: broadcast_C[name] + leaf for name, leaf in delta_C.items()}
        return {name: torch.zeros_like(leaf) for name, leaf in delta_C.items()}, own

    def personal(params: Tree) -> Tree:
        return {name: leaf for name, leaf in params.items() if not name.startswith((FIXED, CONTROL))}

    return ClientUpdate(
        init,
        step,
        finish,
        personal,
        model=lambda params, own: {**params, **own},
        cohort_axis=inner.cohort_axis,
    )
