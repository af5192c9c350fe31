"""What every kind of adapter does alike: losses and the bound model, given a way to put a tree on.

Shape suffixes: C clients, B examples per client, T tokens, M labelled positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import UserError
from fedloom.models.causal import CausalLM
from fedloom.ops import packing
from fedloom.types import FIXED, Batch, Client, Tree

SEED = "seed"  # optional leaf [C] of a batch: with it dropout is drawn, without it there is none

Bind = Callable[[Tree, Tensor | None], AbstractContextManager[None]]  # tree_C, seed_C -> the tree is on while it lasts
Hold = Callable[[], AbstractContextManager[None]]  # the same, of one tree; may be entered again


class Frame:
    """One frozen causal LM under an adapter; `bind` puts a cohort's tree on it, one at a time.

    A kind is a Frame that knows how to `put` a tree on. What it does of ranks and merging is here for kinds that have
    neither.
    """

    kind = "this adapter"  # as a recipe has it
    in_front = False  # True: what it adds comes before the decoder's blocks, and nothing of it is inside them

    def __init__(self, model: nn.Module, bind: Bind) -> None:
        self.model = model.requires_grad_(False).eval()
        self.causal = CausalLM(model)
        self._put = bind
        self._on: Hold | None = None
        self.recomputes = False  # see `adapters.recompute`
        self.offloads = False  # see `adapters.offload`
        self.leaves: tuple[Tensor, ...] = ()  # of the tree that is on

    @contextlib.contextmanager
    def bind(self, tree_C: Tree, seed_C: Tensor | None = None) -> Iterator[None]:
        self.leaves = tuple(tree_C.values())
        try:
            with self._binding(self.hold(tree_C, seed_C)):
                yield
        finally:
            self.leaves = ()

    @contextlib.contextmanager
    def _binding(self, hold: Hold) -> Iterator[None]:
        if self._on is not None:
            raise RuntimeError("a tree is bound to this adapter already")
        self._on = hold
        try:
            with hold():
                yield
        finally:
            self._on = None

    def hold(self, tree_C: Tree, seed_C: Tensor | None) -> Hold:
        """How to put this tree on, as often as it is called: a block that runs again backward needs it again."""
        return lambda: self._put(tree_C, seed_C)

    def contexts_of_a_second_run(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What surrounds a block's first run, and its second one, in which the tree that is on now is on again."""
        return contextlib.nullcontext(), self._again(None if self.in_front else self._on, packing.current())

    @contextlib.contextmanager
    def _again(self, hold: Hold | None, layout: packing.Layout | None) -> Iterator[None]:
        bound = contextlib.nullcontext() if self.in_front else self._bound_again(hold)
        with bound, packing.on(layout):
            yield

    @contextlib.contextmanager
    def _bound_again(self, hold: Hold | None) -> Iterator[None]:
        if hold is self._on:  # it had nothing on, or backward runs while its tree is still on
            yield
            return
        if hold is None:
            raise RuntimeError("a block without a tree runs again for its gradients while one is bound")
        with self._binding(hold):
            yield

    def loss(self, tree_C: Tree, batch_CBT: Batch) -> Tensor:
        """loss_C: mean over each client's answer tokens, in nats. A client without any has loss 0."""
        nll_M, client_M, count_C = self._nll(tree_C, batch_CBT)
        weight_C = 1 / count_C.clamp(min=1).to(nll_M.dtype)
        return torch.zeros_like(weight_C).index_add(0, client_M, nll_M * weight_C[client_M])

    @torch.no_grad()
    def nll(self, tree_C: Tree, batch_CBT: Batch) -> tuple[Tensor, Tensor]:
        """(sum_C, count_C): summed negative log-likelihood and the number of answer tokens."""
        nll_M, client_M, count_C = self._nll(tree_C, batch_CBT)
        return torch.zeros_like(count_C, dtype=torch.float64).index_add(0, client_M, nll_M.double()), count_C

    def _nll(self, tree_C: Tree, batch_CBT: Batch) -> tuple[Tensor, Tensor, Tensor]:
        c = len(batch_CBT["input_ids"])
        if self.causal.rows.apart(batch_CBT["labels"]):
            alone = [
                self._nll_together(tree, batch) for tree, batch in zip(_each(tree_C), _each(batch_CBT), strict=True)
            ]
            nll_M = torch.cat([nll for nll, _ in alone])
            client_M = torch.cat([client + number for number, (_, client) in enumerate(alone)])
        else:
            nll_M, client_M = self._nll_together(tree_C, batch_CBT)
        return nll_M, client_M, torch.bincount(client_M, minlength=c)

    def _nll_together(self, tree_C: Tree, batch_CBT: Batch) -> tuple[Tensor, Tensor]:
        """(nll_M, client_M) of one pass through the model."""
        ids_CBT, labels_CBT = batch_CBT["input_ids"], batch_CBT["labels"]
        c, b, _ = ids_CBT.shape
        with self.bind(tree_C, batch_CBT.get(SEED)):
            nll_M, row_M = self.causal.nll(ids_CBT.flatten(0, 1), labels_CBT.flatten(0, 1), c)
        return nll_M, row_M // b

    @contextlib.contextmanager
    def bound(self, tree_C: Tree, seed_C: Tensor | None = None) -> Iterator[nn.Module]:
        """Within it the model is the tuned one, for inputs of [C * B, T] with the cohort axis outermost."""
        with self.bind(tree_C, seed_C):
            yield self.model

    # ---- a kind without ranks, which merges nothing -----------------------------------------------------------------

    def narrow(self, tree: Tree, client: Client) -> Tree:
        if client.rank is not None:
            raise UserError(
                f"client {client.id!r} has rank {client.rank}, and {self.kind} has no ranks", code="adapter.rank"
            )
        return tree

    def widen(self, delta: Tree, client: Client) -> Tree:
        return delta

    def sync(self, base: Tree) -> None:
        if base:
            raise UserError(f"{self.kind} merges nothing into the frozen weights", code="adapter.base")

    def accumulate(self, base: Tree, merge: Tree) -> Tree:
        self.sync(merge)
        return base

    def merge(self, tree: Tree) -> None:
        """Add the adapter to the frozen weights, for good: the model without it is then what it was with it."""
        raise UserError(
            f"a {self.kind} adapter has nothing to add to the weights",
            "export the adapter: --format lora writes its PEFT folder",
            "export.kind",
        )


def _each(values_C: Tree) -> list[dict[str, Tensor]]:
    """One client after the other; each leaf's gradient is put together once."""
    parts = {name: leaf.split(1) for name, leaf in values_C.items()}
    return [{name: part[c] for name, part in parts.items()} for c in range(len(next(iter(parts.values()))))]


def adapter_dtype(weight: Any) -> torch.dtype:
    """Adapters are float32 whatever the base has; a float64 base keeps float64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_tree(tree: Tree, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError when `tree` has not these leaves of these shapes; the message lists what differs."""
    problems = [f"missing {name}" for name in wanted if name not in tree]
    problems += [f"unexpected {name}" for name in tree if name not in wanted and not name.startswith(FIXED)]
    problems += [
        f"{name} is {list(tree[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in tree and tuple(tree[name].shape) != shape
    ]
    if problems:
        shown = "\n  - ".join(problems[:6])
        more = f"\n  and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(f"the adapter does not match the model:\n  - {shown}{more}", code="adapter.mismatch")
