"""Direct preference optimisation (Rafailov et al. 2023) over any adapter: another loss over the same tree.

For a prompt x with a chosen answer y_w and a rejected one y_l, equation (7) of the paper is

    L = -log sigmoid( beta * (log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)) )

The reference is the same frozen model with nothing on it, so there is no second model in memory: one more forward pass
per batch, without a graph. Where an aggregate merges into the frozen weights (FLoRA, FedEx-LoRA), the reference stays
what the model was before round 1: the merged part is taken off for its pass and put back.

A client sends what its adapter sends: nothing of this file travels. In federated form: OpenFedLLM (Ye et al. 2024).

Shape suffixes: C clients, B pairs per client, T tokens, N rows (C x 2B), M labelled positions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom.adapters.frame import SEED
from fedloom.errors import UserError, suggest
from fedloom.ops.names import CONTROL, apart
from fedloom.types import Adapter, Batch, Client, Tree

__all__ = ["Dpo", "Rewards", "dpo"]

LossType = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"]  # TRL's names
LOSS_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo")
SMOOTHED = ("sigmoid", "sigmoid_norm")  # those that label smoothing is defined for
IGNORED = -100


class Rewards(NamedTuple):
    """What a model thinks of pairs: implicit rewards beta * log pi/ref, and the loss. Padding rows are 0."""

    chosen_CB: Tensor
    rejected_CB: Tensor
    loss_CB: Tensor
    real_CB: Tensor  # bool: rows that are pairs, not padding


def dpo(adapter: Adapter, *, beta: float = 0.1, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> Dpo:
    """The adapter with a loss on pairs in place of its loss on answers; all else is the adapter's own.

    Args:
        adapter: of any kind. Its base, with nothing on it, is the reference.
        beta: how strongly the model is held to the reference (IPO's tau).
        loss_type: `sigmoid` is the paper's; `sigmoid_norm` the same on log-likelihoods per token, which long answers
            cannot win by length; `hinge` is SLiC's (Zhao et al. 2023); `ipo` is Azar et al. 2023, equation (17), per
            token as its authors compute it.
        label_smoothing: the share of pairs assumed to be the wrong way round (conservative DPO, Mitchell 2023).

    Raises:
        UserError: a setting is out of range, label smoothing is asked of a loss that has none, or the adapter works on
            the base's own weights.
    """
    problems = []
    if loss_type not in LOSS_TYPES:
        problems.append(f"loss_type {loss_type!r} is none of {', '.join(LOSS_TYPES)}{suggest(loss_type, LOSS_TYPES)}")
    if not beta > 0:
        problems.append(f"beta is {beta}, must be above 0")
    if not 0 <= label_smoothing < 0.5:
        problems.append(f"label_smoothing is {label_smoothing}, must be at least 0 and below 0.5")
    if label_smoothing and loss_type in LOSS_TYPES and loss_type not in SMOOTHED:
        problems.append(f"label_smoothing is {label_smoothing}, but {loss_type} has none")
    if getattr(adapter, "in_place", False):
        problems.append("this adapter moves the only copy of the weights, so the model without it is no reference")
    if problems:
        raise UserError("; ".join(problems), code="adapter.dpo")
    return Dpo(adapter, beta, loss_type, label_smoothing)


class Dpo:
    """The adapter; see `dpo`. What a kind has besides the protocol is the inner one's."""

    def __init__(self, inner: Adapter, beta: float, loss_type: str, label_smoothing: float) -> None:
        self.inner = inner
        self.model = inner.model
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, label_smoothing
        self._merged: Tree = {}

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there before __init__: no recursion while it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def init(self, seed: int) -> Tree:
        return self.inner.init(seed)

    def narrow(self, tree: Tree, client: Client) -> Tree:
        return self.inner.narrow(tree, client)

    def widen(self, delta: Tree, client: Client) -> Tree:
        return self.inner.widen(delta, client)

    def bound(self, tree_C: Tree, seed_C: Tensor | None = None) -> AbstractContextManager[nn.Module]:
        return self.inner.bound(tree_C, seed_C)

    def sync(self, base: Tree) -> None:
        self.inner.sync(base)
        self._merged = base

    def accumulate(self, base: Tree, merge: Tree) -> Tree:
        return self.inner.accumulate(base, merge)

    def export(self, tree: Tree, path: Path) -> None:
        self.inner.export(tree, path)

    # ---- the loss --------------------------------------------------------------------------------------------------

    def loss(self, tree_C: Tree, batch_CBT: Batch) -> Tensor:
        """loss_C: mean over each client's pairs. A client without any has loss 0."""
        found = self._rewards(tree_C, batch_CBT)
        return found.loss_CB.sum(1) / found.real_CB.sum(1).clamp(min=1)

    @torch.no_grad()
    def nll(self, tree_C: Tree, batch_CBT: Batch) -> tuple[Tensor, Tensor]:
        """(sum_C, count_C) of this loss and of pairs; of a batch of single answers, what the adapter itself says."""
        if "rejected_ids" not in batch_CBT:
            return self.inner.nll(tree_C, batch_CBT)
        found = self._rewards(tree_C, batch_CBT)
        return found.loss_CB.double().sum(1), found.real_CB.sum(1)

    @torch.no_grad()
    def rewards(self, tree_C: Tree, batch_CBT: Batch) -> Rewards:
        """Rewards and losses pair by pair. Control variates beside the parameters change nothing."""
        return self._rewards(apart(tree_C, CONTROL)[1], batch_CBT)

    def _rewards(self, tree_C: Tree, batch_CBT: Batch) -> Rewards:
        if "rejected_ids" not in batch_CBT:
            raise UserError("this loss compares two answers, and the batch holds single ones", code="adapter.dpo")
        c, b, _ = batch_CBT["input_ids"].shape
        ids_NT = torch.cat([batch_CBT["input_ids"], batch_CBT["rejected_ids"]], 1).flatten(0, 1)
        mask_NT = torch.cat([batch_CBT["chosen_mask"], batch_CBT["rejected_mask"]], 1).flatten(0, 1)
        labels_NT = ids_NT.masked_fill(mask_NT == 0, IGNORED)
        # The reference comes first: its pass may take merged weights off, and no graph must have seen them by then.
        reference_CN = self._reference(ids_NT, labels_NT, c).view(c, 2 * b)
        with self.inner.bound(tree_C, batch_CBT.get(SEED)):
            policy_CN = self._likelihoods(ids_NT, labels_NT, c).view(c, 2 * b)
        ratio_CN = policy_CN - reference_CN
        tokens_CN = (labels_NT[:, 1:] != IGNORED).sum(1).view(c, 2 * b)
        real_CB = (tokens_CN[:, :b] > 0) & (tokens_CN[:, b:] > 0)
        loss_CB = torch.where(real_CB, self._losses(ratio_CN, tokens_CN), 0.0)
        return Rewards(self.beta * ratio_CN[:, :b], self.beta * ratio_CN[:, b:], loss_CB, real_CB)

    def _losses(self, ratio_CN: Tensor, tokens_CN: Tensor) -> Tensor:
        """The loss of each pair [C, B], from log pi/ref of all chosen and then all rejected answers [C, 2B]."""
        if self.loss_type in ("sigmoid_norm", "ipo"):
            ratio_CN = ratio_CN / tokens_CN.clamp(min=1)
        chosen_CB, rejected_CB = ratio_CN.chunk(2, 1)
        margin_CB = chosen_CB - rejected_CB
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * margin_CB)
        if self.loss_type == "ipo":
            return (margin_CB - 1 / (2 * self.beta)) ** 2
        share = self.label_smoothing
        right_CB, wrong_CB = F.logsigmoid(self.beta * margin_CB), F.logsigmoid(-self.beta * margin_CB)
        return -(1 - share) * right_CB - share * wrong_CB

    @torch.no_grad()
    def _reference(self, ids_NT: Tensor, labels_NT: Tensor, clients: int) -> Tensor:
        """Log-likelihoods [N] under the base as it was before round 1."""
        merged = self._merged
        if not merged:
            return self._likelihoods(ids_NT, labels_NT, clients)
        self.inner.sync({})
        try:
            return self._likelihoods(ids_NT, labels_NT, clients)
        finally:
            self.inner.sync(merged)

    def _likelihoods(self, ids_NT: Tensor, labels_NT: Tensor, clients: int) -> Tensor:
        """log-likelihood [N] of each row's answer under the model as it is now: the sum over its tokens."""
        causal: Any = self.causal
        nll_M, row_M = causal.nll(ids_NT, labels_NT, clients)
        # doubles: two sums of hundreds of nats are subtracted, and what is left is what counts
        return torch.zeros(len(ids_NT), dtype=torch.float64, device=nll_M.device).index_add(0, row_M, -nll_M.double())
