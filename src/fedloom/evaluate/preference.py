"""How a model ranks pairs of answers, as sums, so that clients and batches add.

Metrics: `loss_sum` over `target_tokens` pairs, as `fedloom.evaluate.loss` has it (its mean is then per pair), and of
the pairs whose loss is finite

    pairs                 how many
    reward_chosen_sum     implicit rewards beta * log pi/ref of the chosen answers
    reward_rejected_sum   and of the rejected ones
    preferred_sum         pairs whose chosen answer has the higher reward; a tie counts half, so that a model which
                          is its own reference has 0.5, which is chance

Shape suffixes: C clients, B pairs per client, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedloom.evaluate.loss import passes
from fedloom.types import Adapter, Batch, Client, Evaluation, Metrics, Tree

__all__ = ["FIGURES", "preference_evaluation", "preference_figures"]

FIGURES = ("preference_accuracy", "reward_chosen", "reward_rejected", "reward_margin")


def preference_evaluation(name: str, open: Callable[[str], Sequence[Batch]]) -> Evaluation:
    """Rewards and loss of each client's model on the batches of pairs that `open(client id)` gives.

    The adapter is one with rewards (`fedloom.adapters.dpo`).
    """

    def run(adapter: Adapter, tree_C: Tree, clients: Sequence[Client]) -> list[Metrics]:
        judge: Any = adapter
        keys = ("loss_sum", "target_tokens", "nonfinite", "pairs", "reward_chosen_sum", "reward_rejected_sum")
        sums = [dict.fromkeys((*keys, "preferred_sum"), 0.0) for _ in clients]
        for here, some, batch_CBT in passes(tree_C, [open(client.id) for client in clients]):
            found = judge.rewards(some, batch_CBT)
            for row, c in enumerate(here):
                _count(sums[c], *(leaf[row] for leaf in found))
        return list(sums)

    return Evaluation(name, run)


def _count(sums: dict[str, float], chosen_B: Tensor, rejected_B: Tensor, loss_B: Tensor, real_B: Tensor) -> None:
    chosen, rejected, losses = (leaf[real_B].tolist() for leaf in (chosen_B, rejected_B, loss_B))
    for high, low, loss in zip(chosen, rejected, losses, strict=True):
        if not math.isfinite(loss):
            sums["nonfinite"] += 1
            continue
        sums["loss_sum"] += loss
        sums["target_tokens"] += 1
        sums["pairs"] += 1
        sums["reward_chosen_sum"] += high
        sums["reward_rejected_sum"] += low
        sums["preferred_sum"] += 1.0 if high > low else 0.5 if high == low else 0.0


def preference_figures(metrics: Metrics) -> Mapping[str, float]:
    """Means over pairs, by the names of `FIGURES`; empty where no pair was looked at."""
    pairs = metrics.get("pairs", 0.0)
    if not pairs:
        return {}
    chosen, rejected = metrics["reward_chosen_sum"] / pairs, metrics["reward_rejected_sum"] / pairs
    return dict(zip(FIGURES, (metrics["preferred_sum"] / pairs, chosen, rejected, chosen - rejected), strict=True))
