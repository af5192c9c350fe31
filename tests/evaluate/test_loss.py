"""Held-out loss as sums that add, over clients and ragged batches; what is not finite never helps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedloom.adapters.lora import lora
from fedloom.errors import RunError
from fedloom.evaluate.loss import add_metrics, loss_evaluation, mean_loss, perplexity, require_finite, stack_batches
from fedloom.models import Base, random_base
from fedloom.tree import stack
from fedloom.types import Batch, Client, Tree


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base(hidden_size=16, num_layers=2, num_heads=2, vocab_size=300, seed=1, dtype=torch.float64)


def batch(rows: int, tokens: int, seed: int, prompt: int = 2) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 300, (rows, tokens), generator=draw)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def trees(adapter: Any, number: int) -> list[Tree]:
    """Different adapters that do something."""
    made = []
    for seed in range(number):
        draw = torch.Generator().manual_seed(seed)
        made.append(
            {k: v + 0.3 * torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in adapter.init(seed).items()}
        )
    return made


def by_hand(adapter: Any, tree: Tree, batches: list[Batch]) -> tuple[float, float]:
    total, count = 0.0, 0.0
    with torch.no_grad(), adapter.bound(stack([tree])) as model:
        for one in batches:
            for ids, labels in zip(one["input_ids"], one["labels"], strict=True):
                z = model(input_ids=ids[None]).logits[0, :-1]
                total += F.cross_entropy(z, labels[1:], ignore_index=-100, reduction="sum").item()
                count += float((labels[1:] != -100).sum())
    return total, count


def test_ragged_clients_in_one_pass_equal_each_alone(base: Base) -> None:
    adapter = lora(base.model, rank=2)
    data = {
        "a": [batch(3, 9, 1), batch(2, 5, 2), batch(1, 12, 3)],
        "b": [batch(1, 4, 4)],
        "c": [batch(2, 7, 5), batch(4, 6, 6)],
        "none": [],
    }
    clients = [Client(name, ()) for name in data]
    own = trees(adapter, len(clients))
    found = loss_evaluation("loss", data.__getitem__).run(adapter, stack(own), clients)
    adapter_rows = dict(zip(data, found, strict=True))
    for tree, name in zip(own, data, strict=True):
        total, count = by_hand(adapter, tree, data[name])
        assert adapter_rows[name]["target_tokens"] == count
        assert adapter_rows[name]["loss_sum"] == pytest.approx(total, rel=1e-9)
        assert adapter_rows[name]["nonfinite"] == 0
    assert math.isnan(mean_loss(adapter_rows["none"]))
    adapter.detach()


def test_one_model_that_all_have_takes_all_clients_rows_in_few_passes(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = lora(base.model, rank=2)
    data = {
        "a": [batch(3, 9, 1), batch(2, 5, 2), batch(1, 12, 3)],
        "b": [batch(1, 4, 4)],
        "none": [],
        "c": [batch(2, 7, 5), batch(4, 6, 6)],
    }
    clients = [Client(name, ()) for name in data]
    [tree] = trees(adapter, 1)
    sizes: list[tuple[int, ...]] = []
    nll = adapter.nll

    def counted(tree_C: Tree, batch_CBT: Batch) -> Any:
        sizes.append(tuple(batch_CBT["input_ids"].shape))
        return nll(tree_C, batch_CBT)

    monkeypatch.setattr(adapter, "nll", counted)
    monkeypatch.setattr("fedloom.evaluate.loss.PASS_TOKENS", 54)
    found = loss_evaluation("loss", data.__getitem__).run(adapter, stack([tree] * 4), clients)
    for name, row in zip(data, found, strict=True):
        total, count = by_hand(adapter, tree, data[name])
        assert (row["target_tokens"], row["nonfinite"]) == (count, 0)
        assert row["loss_sum"] == pytest.approx(total, rel=1e-9)
    # alike in rows, the longest first, and no more than 54 padded tokens in a pass
    assert sizes == [(1, 4, 6), (1, 3, 9), (2, 2, 7), (2, 1, 12)]
    sizes.clear()
    monkeypatch.setattr("fedloom.evaluate.loss.PASS_TOKENS", 8192)
    again = loss_evaluation("loss", data.__getitem__).run(adapter, stack([tree] * 4), clients)
    assert sizes == [(2, 4, 9), (2, 2, 7), (2, 1, 12)]
    assert [row["loss_sum"] for row in again] == [pytest.approx(row["loss_sum"], rel=1e-9) for row in found]
    adapter.detach()


def test_sums_of_clients_add_to_the_mean_over_tokens() -> None:
    long, short = {"loss_sum": 90.0, "target_tokens": 90.0}, {"loss_sum": 30.0, "target_tokens": 10.0}
    assert mean_loss(add_metrics([long, short])) == pytest.approx(1.2)  # not (1 + 3) / 2


def test_padding_changes_nothing_and_carries_no_label() -> None:
    stacked = stack_batches([batch(2, 3, 1), batch(1, 5, 2)])
    assert stacked["input_ids"].shape == stacked["labels"].shape == (2, 2, 5)
    assert (stacked["labels"][0, :, 3:] == -100).all()
    assert (stacked["labels"][1, 1] == -100).all()


class Broken:
    """An adapter whose second batch has no finite loss for the first client."""

    def __init__(self) -> None:
        self.calls = 0

    def nll(self, tree_C: Tree, batch_CBT: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        sums = torch.tensor([1000.0, 10.0], dtype=torch.float64)
        if self.calls == 2:
            sums[0] = math.nan
        return sums, torch.tensor([10, 10])


def test_a_loss_that_is_no_number_is_counted_and_never_lowers_the_mean() -> None:
    two = [batch(1, 4, 1), batch(1, 4, 2)]
    rows = loss_evaluation("loss", lambda client: two).run(
        Broken(),
        {"x": torch.zeros(2, 1)},
        [Client("bad", ()), Client("good", ())],  # type: ignore[arg-type]
    )
    assert rows[0] == {"loss_sum": 1000.0, "target_tokens": 10.0, "nonfinite": 10.0}
    assert rows[1] == {"loss_sum": 20.0, "target_tokens": 20.0, "nonfinite": 0.0}
    assert mean_loss(rows[0]) == math.inf
    assert mean_loss(add_metrics(rows)) == math.inf
    assert perplexity(rows[0]) == math.inf
    with pytest.raises(RunError, match=r"round 3: .* 10 of 40 .*clients: bad"):
        require_finite({"bad": rows[0], "good": rows[1]}, "round 3")
    require_finite({"bad": rows[0], "good": rows[1]}, "round 3", limit=0.5)
    require_finite({"good": rows[1]}, "round 3")


def test_perplexity() -> None:
    assert perplexity({"loss_sum": 2.0, "target_tokens": 1.0}) == pytest.approx(math.e**2)
    assert perplexity({"loss_sum": 1e6, "target_tokens": 1.0}) == math.inf
    assert math.isnan(perplexity({}))
