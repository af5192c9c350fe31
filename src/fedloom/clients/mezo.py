"""Zeroth-order local work on any adapter: FedMeZO (Ling et al. 2024, Algorithm 1), which is MeZO (Malladi et al. 2023)
at the clients.

Two forward passes and no backward one: no graph is ever kept, so a step takes the memory of inference and that of the
adapter's direction.

Shape suffixes: C clients, B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.clients.sgd import everything, targets_C
from fedloom.errors import RunError
from fedloom.ops.directions import directions
from fedloom.optimizers import Optimizer, OptimizerState, Schedule, constant
from fedloom.seeds import seed_of
from fedloom.tree import per_client, tmap
from fedloom.types import FIXED, Batch, ClientUpdate, LossFn, Site, Tree


class Local(NamedTuple):
    """State of a cohort between two local steps."""

    params: Tree
    opt: OptimizerState
    sites: tuple[Site, ...]
    step: int  # local steps done


def mezo_client(
    optimizer: Optimizer,
    *,
    epsilon: float = 1e-3,
    schedule: Schedule = constant,
    accumulation_steps: int = 1,
    trainable: Callable[[str], bool] = everything,
) -> ClientUpdate:
    """Local steps along random directions; the upload is the change of the adapter, as with `sgd_client`.

    Each step draws z ~ N(0, I) for each client and takes g z for the gradient (MeZO, Definition 1, one direction), with
    g = (L(w + epsilon z) - L(w - epsilon z)) / (2 epsilon), both losses on the same batch. Each client of a cohort has
    its own z, from its own seed, so the axis changes nothing.

    Args:
        optimizer: takes g z as it would the gradient; MeZO's is plain SGD.
        epsilon: how far the two losses lie from where the client is.
        schedule, accumulation_steps, trainable: as for `sgd_client`.
    """

    def is_trained(name: str) -> bool:
        return not name.startswith(FIXED) and trainable(name)

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Local:
        free = {name: leaf for name, leaf in broadcast_C.items() if is_trained(name)}
        if not free:
            raise RunError("no parameter is trainable at the clients", code="client.nothing_trainable")
        return Local(broadcast_C, optimizer.init(free), tuple(sites), 0)

    @torch.no_grad()
    def step(loss: LossFn, state: Local, batch_CBT: Batch) -> Local:
        free = {name: leaf for name, leaf in state.params.items() if is_trained(name)}
        c = next(iter(free.values())).shape[0]
        sites = state.sites[:c]  # the still active ones
        z = direction_of(free, [seed_of(s.seed, s.round, s.client, f"mezo/{state.step}") for s in sites])

        def at(distance: float) -> Tensor:
            moved = tmap(lambda w, along: w + distance * along, free, z)
            return value(loss, {**state.params, **moved}, batch_CBT, accumulation_steps)

        g_C = (at(epsilon) - at(-epsilon)) / (2 * epsilon)
        grads = tmap(lambda along: along * per_client(g_C, along).to(along.dtype), z)
        done_C = torch.tensor([s.round + (state.step + 0.5) / s.num_steps for s in sites], dtype=torch.float64)
        lr_scale_C = schedule(done_C.to(g_C.device))
        moved, opt = optimizer.update(grads, state.opt, free, lr_scale_C)
        return state._replace(params={**state.params, **moved}, opt=opt, step=state.step + 1)

    def finish(broadcast_C: Tree, state: Local) -> tuple[Tree, Tree]:
        return {name: leaf - broadcast_C[name] for name, leaf in state.params.items() if is_trained(name)}, {}

    return ClientUpdate(init, step, finish)


def direction_of(tree_C: Tree, keys: Sequence[int]) -> dict[str, Tensor]:
    """z ~ N(0, I) in the shape of the tree, from a key for each client; the same on every machine.

    Leaves have their parts in the order of their names: that of a tree that came as a message is another.
    """
    first = next(iter(tree_C.values()))
    names = sorted(tree_C)
    sizes = [tree_C[name][0].numel() for name in names]
    parts_CN = directions(keys, 0, sum(sizes), first.device, first.dtype).split(sizes, 1)
    z = {name: part.view_as(tree_C[name]) for name, part in zip(names, parts_CN, strict=True)}
    return {name: z[name].to(leaf.dtype) for name, leaf in tree_C.items()}


def value(loss: LossFn, params: Tree, batch_CBT: Batch, pieces: int = 1) -> Tensor:
    """loss_C without a graph; with `pieces` > 1 the batch goes through in so many parts, as in `sgd.gradients`."""
    num_rows = batch_CBT["labels"].shape[1]
    size = -(-num_rows // pieces)
    if size >= num_rows:
        return loss(params, batch_CBT).detach()
    whole_C = targets_C(batch_CBT).clamp(min=1)
    total_C = torch.zeros(len(whole_C), dtype=torch.float64, device=whole_C.device)
    for start in range(0, num_rows, size):
        piece = {
            name: leaf[:, start : start + size] if leaf.ndim >= 2 else leaf  # [C] leaves (seeds) are not split
            for name, leaf in batch_CBT.items()
        }
        total_C += loss(params, piece).detach().double() * (targets_C(piece).double() / whole_C)
    return total_C
