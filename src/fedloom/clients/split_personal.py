"""Keep a part of the adapter at home: FedSA-LoRA (Guo et al. 2025); with other names, FedPer's sharing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedloom.ops.names import TOLD
from fedloom.types import FIXED, Batch, ClientUpdate, LossFn, Site, Tree


def split_personal(inner: ClientUpdate, shared: Callable[[str], bool]) -> ClientUpdate:
    """Everything is trained together; only what `shared` names is sent and averaged, the rest goes on at each client.

    FedSA-LoRA (Guo et al. 2025, Algorithm 1) shares A, which learns what clients have in common, and keeps B. The model
    of a client is the common part with its own, and that is what its evaluation uses.

    Args:
        inner: the local work.
        shared: by parameter name.
    """

    def personal(params: Tree) -> Tree:
        return {name: leaf for name, leaf in params.items() if not name.startswith(FIXED) and not shared(name)}

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Any:
        return inner.init({**broadcast_C, **personal_C}, {}, sites), personal_C

    def step(loss: LossFn, state: Any, batch_CBT: Batch) -> Any:
        work, kept_C = state
        return inner.step(loss, work, batch_CBT), kept_C

    def finish(broadcast_C: Tree, state: Any) -> tuple[Tree, Tree]:
        work, kept_C = state
        delta_C, _ = inner.finish({**broadcast_C, **kept_C}, work)
        own_C = {name: leaf + delta_C[name] if name in delta_C else leaf for name, leaf in kept_C.items()}
        return {name: leaf for name, leaf in delta_C.items() if shared(name) or name.startswith(TOLD)}, own_C

    return ClientUpdate(
        init,
        step,
        finish,
        personal,
        model=lambda params, own: {**params, **own},
        cohort_axis=inner.cohort_axis,
    )
