"""SCAFFOLD (Karimireddy et al. 2020, Algorithm 1 with option II): every local step is corrected for its client's drift.

Shape suffixes: C clients, B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom.clients.sgd import everything, sgd_client
from fedloom.errors import RunError, UserError
from fedloom.ops.names import CONTROL, apart
from fedloom.optimizers import Optimizer
from fedloom.tree import add, per_client, sub
from fedloom.types import FIXED, Adapter, Batch, Client, ClientUpdate, LossFn, Site, Tree


class Remembered(NamedTuple):
    """An optimiser's state, and the sum of the gradients that it was given."""

    opt: Any
    total: Tree
    steps_C: Tensor


def scaffold_client(optimizer: Optimizer, **settings: Any) -> ClientUpdate:
    """`sgd_client` on the gradients g(y) - c_i + c; the client keeps c_i, the server c.

    After K steps c_i <- c_i - c + (x - y) / (K eta). With SGD, (x - y) / (K eta) is the mean of the gradients that the
    optimiser was given, and that mean is what is taken here: the same number, and one that still stands for a gradient
    where steps have a schedule, momentum or Adam's scale. (With Adam's own steps in it c would not be one, and adding
    it to gradients would mean nothing.)

    A client is sent x and c, and sends the change of both: twice the bytes of FedAvg either way. c travels under
    `control/`, which the adapter has to have (`with_control`); c_i is personal state, zero at first.
    """
    inner = sgd_client(remembering(optimizer), **settings)

    def named(tree: Tree) -> dict[str, Tensor]:
        return {name.removeprefix(CONTROL): leaf for name, leaf in tree.items()}

    def personal(params: Tree) -> Tree:
        return {name: torch.zeros_like(leaf) for name, leaf in apart(params, CONTROL)[0].items()}

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Any:
        server_C, params_C = apart(broadcast_C, CONTROL)
        if not server_C:
            raise RunError("the server sent no control variates", hint="with_control(adapter)", code="client.control")
        return inner.init(params_C, {}, sites), named(sub(server_C, personal_C))

    def step(loss: LossFn, state: Any, batch_CBT: Batch) -> Any:
        work, shift_C = state

        def corrected(tree_C: Tree, batch_CBT: Batch) -> Tensor:  # its gradient is g(y) - c_i + c
            loss_C = loss(tree_C, batch_CBT)
            along_C = [(tree_C[name] * shift).flatten(1).sum(1) for name, shift in shift_C.items()]
            return loss_C + torch.stack(along_C).sum(0).to(loss_C.dtype)

        return inner.step(corrected, work, batch_CBT), shift_C

    def finish(broadcast_C: Tree, state: Any) -> tuple[Tree, Tree]:
        work, shift_C = state
        server_C, params_C = apart(broadcast_C, CONTROL)
        delta_C, _ = inner.finish(params_C, work)
        seen: Remembered = work.opt
        steps_C = seen.steps_C.clamp(min=1)
        mean_C = {CONTROL + name: leaf / per_client(steps_C, leaf).to(leaf.dtype) for name, leaf in seen.total.items()}
        change_C = sub(mean_C, server_C)
        before_C = sub(server_C, {CONTROL + name: leaf for name, leaf in shift_C.items()})
        return {**delta_C, **change_C}, add(before_C, change_C)

    return ClientUpdate(init, step, finish, personal)


def remembering(inner: Optimizer) -> Optimizer:
    """`inner`, with the sum of its gradients."""

    def init(params: Tree) -> Remembered:
        first = next(iter(params.values()))
        steps_C = torch.zeros(len(first), dtype=torch.float64, device=first.device)
        return Remembered(inner.init(params), {name: torch.zeros_like(leaf) for name, leaf in params.items()}, steps_C)

    def update(grads: Tree, state: Remembered, params: Tree, lr_scale_C: Tensor) -> tuple[Tree, Remembered]:
        moved, opt = inner.update(grads, state.opt, params, lr_scale_C)
        return moved, Remembered(opt, add(state.total, grads), state.steps_C + 1)

    return Optimizer(init, update)


def with_control(inner: Adapter, trained: Callable[[str], bool] = everything) -> Adapter:
    """`inner`, whose trees have control variates beside what is trained; they are zero at first.

    They are sent like parameters, and neither change what the model does nor are exported.
    """
    return _Controlled(inner, trained)


class _Controlled:
    def __init__(self, inner: Adapter, trained: Callable[[str], bool]) -> None:
        self.inner, self.trained, self.model = inner, trained, inner.model

    def __getattr__(self, name: str) -> Any:  # what a kind of adapter has besides what all have
        return getattr(self.inner, name)

    def init(self, seed: int) -> Tree:
        params = self.inner.init(seed)
        names = [name for name in params if self.trained(name) and not name.startswith(FIXED)]
        return {**params, **{CONTROL + name: torch.zeros_like(params[name]) for name in names}}

    def narrow(self, tree: Tree, client: Client) -> Tree:
        if client.rank is not None:
            raise UserError(f"client {client.id!r} has a rank of its own, for which there are no control variates")
        control, params = apart(tree, CONTROL)
        return {**self.inner.narrow(params, client), **control}

    def widen(self, delta: Tree, client: Client) -> Tree:
        control, moved = apart(delta, CONTROL)
        return {**self.inner.widen(moved, client), **control}

    def loss(self, tree_C: Tree, batch_CBT: Batch) -> Tensor:
        return self.inner.loss(apart(tree_C, CONTROL)[1], batch_CBT)

    def nll(self, tree_C: Tree, batch_CBT: Batch) -> tuple[Tensor, Tensor]:
        return self.inner.nll(apart(tree_C, CONTROL)[1], batch_CBT)

    def bound(self, tree_C: Tree, seed_C: Tensor | None = None) -> AbstractContextManager[nn.Module]:
        return self.inner.bound(apart(tree_C, CONTROL)[1], seed_C)

    def sync(self, base: Tree) -> None:
        self.inner.sync(base)

    def accumulate(self, base: Tree, merge: Tree) -> Tree:
        return self.inner.accumulate(base, merge)

    def export(self, tree: Tree, path: Path) -> None:
        self.inner.export(apart(tree, CONTROL)[1], path)
