"""The frozen blocks of the base in shards: each process of a team holds a part of every block's weights (FSDP2).

A block is put together right before it runs and taken apart right after, forward and backward, by collectives that all
processes take part in. So they must run the same passes, and they have different work: batches of other numbers,
evaluations of other clients, answers of other lengths. They keep step by a word before each pass: everyone says what
its next pass is (forward alone, or forward and backward), and all make a pass of that kind, who has none such at the
moment or is through with its part makes one of a single token for nothing. Nobody has to know how many there will be.

Embeddings, norms outside the blocks and the output head stay whole: the head's weights are read outside of its layer
(`models.causal`). What is trained is small, and whole everywhere.

A pass that breaks off half way (out of memory) leaves the others in the middle of a block, so it ends the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from fedloom.models.causal import body_of
from fedloom.runtimes.team import Team
from fedloom.types import Adapter, Batch, Client, Tree

__all__ = ["Shards", "local_bytes", "shard"]

IDLE, FORWARD, BOTH = 0, 1, 2  # what a process's next pass is; of different ones the highest is next


class Shards:
    """A model of which this process holds a part, and its place in step with the others."""

    def __init__(self, team: Team, adapter: Adapter, params: Tree) -> None:
        self.team, self.adapter = team, adapter
        self.body = body_of(adapter.model)
        tree = adapter.narrow(params, Client("", ()))
        self.tree_C = {name: leaf.detach().clone()[None] for name, leaf in tree.items()}
        self.filling = self._trains = False
        own: Any = adapter
        self._loss, own.loss = own.loss, self.loss
        own.in_step = True  # a pass that did not fit cannot be tried again
        self.passes = self.fillers = 0  # of this process, since the start
        self.body.register_forward_pre_hook(self._before)

    def loss(self, tree_C: Tree, batch_CBT: Batch) -> Tensor:
        """The adapter's own; whether a backward pass will follow is told by what has gradients."""
        self._trains = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree_C.values())
        try:
            found: Tensor = self._loss(tree_C, batch_CBT)
        finally:
            self._trains = False
        return found

    def _before(self, body: nn.Module, args: Any) -> None:
        if self.filling:
            return
        mine = BOTH if self._trains and torch.is_grad_enabled() else FORWARD
        while (turn := max(self.team.numbers(mine))) != mine:
            self._fill(turn)
        self.passes += 1

    def drain(self) -> None:
        """Keep step with the others until all are through with their parts."""
        while (turn := max(self.team.numbers(IDLE))) != IDLE:
            self._fill(turn)

    def _fill(self, turn: int) -> None:
        self.filling = True
        self.fillers += 1
        try:
            device = next(iter(self.tree_C.values())).device
            ids_CBT = torch.zeros(1, 1, 2, dtype=torch.int64, device=device)
            if turn == FORWARD:
                with torch.no_grad():
                    self.body(input_ids=ids_CBT[0], use_cache=False)
                return
            with torch.enable_grad():
                leaves = {name: _free(leaf) for name, leaf in self.tree_C.items()}
                loss_C = self._loss(leaves, {"input_ids": ids_CBT, "labels": ids_CBT})
                trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
                torch.autograd.grad(0 * loss_C.sum(), trained, allow_unused=True)
        finally:
            self.filling = False


def _free(leaf: Tensor) -> Tensor:
    return leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf


def shard(team: Team, adapter: Adapter, params: Tree, blocks: Iterable[nn.Module], *, offload: bool = False) -> Shards:
    """Keep a part of each block here, and give the rest back; every process must do so at the same point.

    Args:
        params: what is trained, before round 1.
        offload: the part waits in the host's memory, pinned where there is a GPU, and goes there while a block runs.
    """
    waits = CPUOffloadPolicy(pin_memory=team.device.type == "cuda") if offload else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=team.mesh, reshard_after_forward=True, offload_policy=waits)
    return Shards(team, adapter, params)


def local_bytes(model: nn.Module) -> int:
    """Of the parameters that lie in this process."""
    total = 0
    for leaf in model.parameters():
        here: Any = leaf.to_local() if hasattr(leaf, "to_local") else leaf
        total += here.numel() * here.element_size()
    return total
