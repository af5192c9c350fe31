"""FedAvg's and FedProx's local work.

Shape suffixes: C clients, B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.errors import RunError
from fedloom.ops.graph import no_gradient
from fedloom.ops.loss_scale import Scaling, after_step, finite_C, first_scaling, where_C
from fedloom.ops.names import CONTROL
from fedloom.optimizers import Optimizer, OptimizerState, Schedule, constant
from fedloom.tree import flatten, per_client, sqnorm_C, sub, tmap, unflatten
from fedloom.types import FIXED, Batch, ClientUpdate, LossFn, Site, Tree

OPTIMIZER = "optimizer/"  # of personal leaves


class Local(NamedTuple):
    """State of a cohort between two local steps."""

    params: Tree
    opt: OptimizerState
    anchor: Tree | None  # the broadcast, for FedProx
    round_C: Tensor  # rounds done before this one
    step_C: Tensor  # local steps done
    num_steps_C: Tensor
    scaling: Scaling | None = None  # of the loss, for a base in float16


def everything(name: str) -> bool:
    return True


def sgd_client(
    optimizer: Optimizer,
    *,
    schedule: Schedule = constant,
    prox_mu: float = 0.0,
    max_grad_norm: float | None = None,
    accumulation_steps: int = 1,
    trainable: Callable[[str], bool] = everything,
    keep_optimizer: bool = False,
    loss_scaling: bool = False,
) -> ClientUpdate:
    """Local steps of an optimiser; the upload is what was trained.

    Args:
        optimizer: makes the steps; its state is per client.
        schedule: factor on the learning rate by the number of rounds done, so it runs over the whole run.
        prox_mu: FedProx's mu (Li et al. 2020, Eq. 2): adds mu / 2 ||w - w0||^2 to each client's loss.
        max_grad_norm: clips each client's own gradient, as `torch.nn.utils.clip_grad_norm_` does.
        accumulation_steps: a batch is worked off in so many pieces; the step is that of the whole batch (its mean over
            answer tokens), and the number of optimiser steps stays the same.
        trainable: by parameter name; what is not trained is not sent.
        keep_optimizer: the optimiser's state stays with the client from round to round, as DiLoCo has it; else the
            optimiser starts anew each round.
        loss_scaling: for a base in float16 (`ops.loss_scale`): a client's step whose gradient overflows is counted and
            not made. The scale starts anew each round.
    """

    def is_trained(name: str) -> bool:
        return not name.startswith((FIXED, CONTROL)) and trainable(name)

    def personal(params: Tree) -> Tree:
        if not keep_optimizer:
            return {}
        first = optimizer.init({name: leaf[None] for name, leaf in params.items() if is_trained(name)})
        return {OPTIMIZER + name: leaf[0] for name, leaf in flatten(first).items()}

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Local:
        free = {name: leaf for name, leaf in broadcast_C.items() if is_trained(name)}
        if not free:
            raise RunError("no parameter is trainable at the clients", code="client.nothing_trainable")
        device = next(iter(free.values())).device
        opt = optimizer.init(free)
        if keep_optimizer:
            opt = unflatten(opt, {name.removeprefix(OPTIMIZER): leaf for name, leaf in personal_C.items()})

        def per_site(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return Local(
            broadcast_C,
            opt,
            broadcast_C if prox_mu else None,
            per_site([site.round for site in sites]),
            per_site([0 for _ in sites]),
            per_site([site.num_steps for site in sites]),
            first_scaling(len(sites), device) if loss_scaling else None,
        )

    def step(loss: LossFn, state: Local, batch_CBT: Batch) -> Local:
        free = {name: leaf for name, leaf in state.params.items() if is_trained(name)}
        scaling = state.scaling
        scale_C = None if scaling is None else scaling.scale_C
        grads = gradients(loss, state.params, free, batch_CBT, accumulation_steps, scale_C)
        sound_C = None if scaling is None else finite_C(grads)
        if state.anchor is not None:  # the gradient of mu / 2 ||w - w0||^2, without a graph
            away = sub(free, {name: state.anchor[name] for name in free})
            grads = tmap(lambda g, d: g + prox_mu * d, grads, away)
        if max_grad_norm is not None:
            factor_C = (max_grad_norm / (sqnorm_C(grads).sqrt() + 1e-6)).clamp(max=1.0)
            grads = tmap(lambda g: g * per_client(factor_C, g), grads)
        # half a step in, so that neither warm-up nor decay makes a step of length zero
        lr_scale_C = schedule(state.round_C + (state.step_C + 0.5) / state.num_steps_C)
        moved, opt = optimizer.update(grads, state.opt, free, lr_scale_C)
        if scaling is not None and sound_C is not None:
            moved, opt = where_C(sound_C, (moved, opt), (free, state.opt))
            scaling = after_step(scaling, sound_C)
        return state._replace(params={**state.params, **moved}, opt=opt, step_C=state.step_C + 1, scaling=scaling)

    def finish(broadcast_C: Tree, state: Local) -> tuple[Tree, Tree]:
        return {name: leaf - broadcast_C[name] for name, leaf in state.params.items() if is_trained(name)}, (
            {OPTIMIZER + name: leaf for name, leaf in flatten(state.opt).items()} if keep_optimizer else {}
        )

    return ClientUpdate(init, step, finish, personal)


def gradients(
    loss: LossFn, params: Tree, free: Tree, batch_CBT: Batch, pieces: int = 1, scale_C: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients [C, ...] of each client's own loss by its own parameters.

    With `pieces` > 1 the batch is split along B and the pieces' mean losses are weighted by their answer tokens, so
    that the result is the gradient of the whole batch's mean. With `scale_C` each client's loss is multiplied by its
    own number on the way through the model, and its gradient divided by it.

    Raises:
        RunError: parameters have no gradient, by name (a quantised base can lose the graph without any other sign).
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in free.items()}
    total: dict[str, Tensor] = {}
    whole_C = targets_C(batch_CBT)
    num_rows = batch_CBT["labels"].shape[1]
    size = -(-num_rows // pieces)
    for start in range(0, num_rows, size):
        piece = {
            name: leaf[:, start : start + size] if leaf.ndim >= 2 else leaf  # [C] leaves (seeds) are not split
            for name, leaf in batch_CBT.items()
        }
        loss_C = loss({**params, **leaves}, piece)
        if size < num_rows:
            loss_C = loss_C * (targets_C(piece).to(loss_C.dtype) / whole_C.clamp(min=1))
        if not loss_C.requires_grad:
            raise no_gradient(list(leaves), len(leaves))
        if scale_C is not None:
            loss_C = loss_C * scale_C.to(loss_C.dtype)
        found = torch.autograd.grad(loss_C.sum(), list(leaves.values()), allow_unused=True)
        missing = [name for name, grad in zip(leaves, found, strict=True) if grad is None]
        if missing:
            raise no_gradient(missing, len(leaves))
        for name, grad in zip(leaves, found, strict=True):
            total[name] = total[name] + grad if name in total else grad
    return total if scale_C is None else tmap(lambda g: g / per_client(scale_C, g).to(g.dtype), total)


def targets_C(batch_CBT: Batch) -> Tensor:
    """Number of answer tokens that each client's batch predicts (the first token of a row is never predicted)."""
    return (batch_CBT["labels"][:, :, 1:] != -100).flatten(1).sum(1)
