"""RoLoRA (Chen et al. 2024): the two factors in turn, so that averaging one of them is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.types import Batch, ClientUpdate, LossFn, Site, Tree


def alternate(*updates: ClientUpdate) -> ClientUpdate:
    """Round r is `updates[r mod n]`. RoLoRA is (train B, A frozen), (train A, B frozen), in that order: B begins at
    zero, where A has no gradient. Within a round one factor is the same for all, so the mean of the other is the mean
    of the products; only the trained one is sent.
    """

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Any:
        turn = sites[0].round % len(updates)
        return turn, updates[turn].init(broadcast_C, personal_C, sites)

    def step(loss: LossFn, state: Any, batch_CBT: Batch) -> Any:
        turn, work = state
        return turn, updates[turn].step(loss, work, batch_CBT)

    def finish(broadcast_C: Tree, state: Any) -> tuple[Tree, Tree]:
        turn, work = state
        done: tuple[Tree, Tree] = updates[turn].finish(broadcast_C, work)
        return done

    return ClientUpdate(init, step, finish, cohort_axis=all(update.cohort_axis for update in updates))
