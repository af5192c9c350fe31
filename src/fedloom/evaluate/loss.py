"""The loss of a model on held-out examples, as sums, so that clients and batches add.

The mean is per answer token, never per batch, and a loss that is not a number never makes a model look better: what is
not finite is counted, and a mean over it is infinite.

Shape suffixes: C clients, B examples per client, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.errors import RunError
from fedloom.tree import is_shared
from fedloom.types import Adapter, Batch, Client, Evaluation, Metrics, Tree

__all__ = [
    "add_metrics",
    "loss_evaluation",
    "mean_loss",
    "passes",
    "perplexity",
    "require_finite",
    "stack_batches",
    "together",
]

IGNORED = -100  # a label that carries no loss
PASS_TOKENS = 8192  # padded tokens in one pass of a model that all clients have


def loss_evaluation(name: str, open: Callable[[str], Sequence[Batch]]) -> Evaluation:
    """Summed loss of each client's model on the batches that `open(client id)` gives.

    Metrics: `loss_sum` (nats) and `target_tokens` over the finite part, `nonfinite` (answer tokens of batches whose
    loss is not finite). They add; `mean_loss` reads them.
    """

    def run(adapter: Adapter, tree_C: Tree, clients: Sequence[Client]) -> list[Metrics]:
        sums = [{"loss_sum": 0.0, "target_tokens": 0.0, "nonfinite": 0.0} for _ in clients]
        for here, some, batch_CBT in passes(tree_C, [open(client.id) for client in clients]):
            sum_C, count_C = adapter.nll(some, batch_CBT)
            for c, total, count in zip(here, sum_C.tolist(), count_C.tolist(), strict=True):
                if math.isfinite(total):
                    sums[c]["loss_sum"] += total
                    sums[c]["target_tokens"] += count
                else:
                    sums[c]["nonfinite"] += max(count, 1)
        return list(sums)

    return Evaluation(name, run)


def passes(tree_C: Tree, opened: Sequence[Sequence[Batch]]) -> Iterator[tuple[list[int], Tree, dict[str, Tensor]]]:
    """What goes through the model together: whose batch each is, their models, and the batches as one [C, B, T].

    Where each client has a model of its own, the first batches of all go together, then the second ones. One model that
    all have takes batches of about the same shape together, whoever's they are, up to `PASS_TOKENS`; a client may then
    be there several times.
    """
    device = next(iter(tree_C.values())).device
    if len(opened) > 1 and is_shared(tree_C):
        for some in together([[_shape(batches, i) for i in range(len(batches))] for batches in opened]):
            batch_CBT = stack_batches([opened[c][i] for c, i in some], device)
            shared = {name: leaf[:1].expand(len(some), *leaf.shape[1:]) for name, leaf in tree_C.items()}
            yield [c for c, _ in some], shared, batch_CBT
        return
    for index in range(max(map(len, opened), default=0)):
        here = [c for c, batches in enumerate(opened) if index < len(batches)]
        mine = tree_C if len(here) == len(opened) else {name: leaf[here] for name, leaf in tree_C.items()}
        yield here, mine, stack_batches([opened[c][index] for c in here], device)


def together(shapes: Sequence[Sequence[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
    """Which batches of one model go together, by the (B, T) of each client's: (client, number of its batch)."""
    order = [(*shape, c, i) for c, own in enumerate(shapes) for i, shape in enumerate(own)]
    order.sort(key=lambda one: (-one[0], -one[1], one[2:]))
    while order:
        number, longest, (rows, *_) = 0, 0, order[0]
        for fewer, tokens, *_ in order:
            size = (number + 1) * rows * max(longest, tokens)
            if number and (size > PASS_TOKENS or fewer < 0.75 * rows):
                break
            number, longest = number + 1, max(longest, tokens)
        some, order = order[:number], order[number:]
        yield [(c, i) for _, _, c, i in some]


def _shape(batches: Sequence[Batch], index: int) -> tuple[int, int]:
    """(B, T) of a batch, without making it where that is known."""
    known = getattr(batches, "shapes", None)
    rows, tokens = known[index] if known is not None else batches[index]["input_ids"].shape
    return int(rows), int(tokens)


def stack_batches(batches: Sequence[Batch], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Clients' batches [B, T] as one [C, B, T]; what is added carries no label and stands behind every real token."""
    rows = max(batch["input_ids"].shape[0] for batch in batches)
    tokens = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(batch: Batch, key: str) -> Tensor:
        b, t = batch[key].shape
        return F.pad(batch[key], (0, tokens - t, 0, rows - b), value=IGNORED if key == "labels" else 0)

    matrices = [key for key, leaf in batches[0].items() if leaf.ndim == 2]  # not the lengths
    return {key: torch.stack([padded(batch, key) for batch in batches]).to(device) for key in matrices}


def mean_loss(metrics: Metrics) -> float:
    """Nats per answer token: infinite when any part was not finite, NaN when there was no answer token at all."""
    if metrics.get("nonfinite", 0.0):
        return math.inf
    tokens = metrics.get("target_tokens", 0.0)
    return metrics.get("loss_sum", 0.0) / tokens if tokens else math.nan


def perplexity(metrics: Metrics) -> float:
    """exp of the mean loss; infinite where that overflows."""
    mean = mean_loss(metrics)
    return math.exp(mean) if mean < 700 else mean if math.isnan(mean) else math.inf


def add_metrics(rows: Iterable[Metrics]) -> dict[str, float]:
    """Key by key; a key that only some have counts as 0 elsewhere."""
    total: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            total[key] = total.get(key, 0.0) + value
    return total


def require_finite(per_client: Mapping[str, Metrics], what: str, *, limit: float = 0.0) -> None:
    """Stop when more than the share `limit` of the answer tokens have no finite loss.

    Raises:
        RunError: it is so; the message names the clients.
    """
    total = add_metrics(per_client.values())
    bad = total.get("nonfinite", 0.0)
    everything = bad + total.get("target_tokens", 0.0)
    if not bad or bad / everything <= limit:
        return
    names = [client for client, row in per_client.items() if row.get("nonfinite", 0.0)]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise RunError(
        f"{what}: the loss of {bad:,.0f} of {everything:,.0f} answer tokens is not a finite number (clients: {shown})",
        hint="a lower client.learning_rate, client.max_grad_norm: 1.0 or dtype: float32 are the usual cures",
        code="loss.nonfinite",
    )
