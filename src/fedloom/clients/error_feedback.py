"""Error feedback (Seide et al. 2014; Karimireddy et al. 2019, Algorithm 1): what compression left out is sent later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedloom.ops.names import TOLD, apart
from fedloom.tree import client_of, stack
from fedloom.types import FIXED, Batch, ClientUpdate, LossFn, Site, Transform, Tree

ERROR = "error/"  # of personal leaves


def error_feedback(inner: ClientUpdate, compress: Sequence[Transform]) -> ClientUpdate:
    """The client adds to its update what earlier messages left out of theirs, and remembers what this one leaves out.

    e <- (delta + e) - decode(encode(delta + e)), as personal state. `compress` must be the composition's own
    transforms: they are tried here to know what the server will see, and give the same message when it is made.
    """

    def split(personal: Tree) -> tuple[Tree, Tree]:
        own = {name: leaf for name, leaf in personal.items() if not name.startswith(ERROR)}
        return own, {name.removeprefix(ERROR): leaf for name, leaf in personal.items() if name.startswith(ERROR)}

    def personal(params: Tree) -> Tree:
        errors = {ERROR + name: torch.zeros_like(leaf) for name, leaf in params.items() if not name.startswith(FIXED)}
        return {**inner.personal(params), **errors}

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Any:
        own_C, error_C = split(personal_C)
        return inner.init(broadcast_C, own_C, sites), error_C, tuple(sites)

    def step(loss: LossFn, state: Any, batch_CBT: Batch) -> Any:
        work, error_C, sites = state
        return inner.step(loss, work, batch_CBT), error_C, sites

    def finish(broadcast_C: Tree, state: Any) -> tuple[Tree, Tree]:
        work, error_C, sites = state
        delta_C, own_C = inner.finish(broadcast_C, work)
        told_C, delta_C = apart(delta_C, TOLD)
        meant_C = {name: leaf + error_C[name] for name, leaf in delta_C.items()}
        seen = []
        for i, site in enumerate(sites):
            message: Tree = client_of(meant_C, i)
            for transform in compress:
                message = transform.encode(message, site)
            for transform in reversed(compress):
                message = transform.decode(message, site)
            seen.append(message)
        seen_C = stack(seen)
        left_C = {name: leaf - seen_C[name].to(leaf) for name, leaf in meant_C.items()}
        errors_C = {ERROR + name: left_C.get(name, leaf) for name, leaf in error_C.items()}
        return {**meant_C, **told_C}, {**own_C, **errors_C}

    return ClientUpdate(
        init,
        step,
        finish,
        personal,
        model=lambda params, mine: inner.model(params, split(mine)[0]),
        cohort_axis=inner.cohort_axis,
    )
