"""Log-likelihoods of continuations: batches and shared rows give what one forward pass per continuation gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedloom.adapters.lora import lora
from fedloom.errors import UserError
from fedloom.evaluate.loglikelihood import Continuation, loglikelihoods
from fedloom.models.causal import CausalLM


def by_hand(model: Any, one: Continuation) -> tuple[float, bool]:
    """One row, no padding, all logits."""
    ids = [*one.before, *one.tokens]
    with torch.no_grad():
        z_TV = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(len(one.before) - 1, len(ids) - 1)
    return sum(float(z_TV[p, ids[p + 1]]) for p in places), all(int(z_TV[p].argmax()) == ids[p + 1] for p in places)


def continuations(number: int, seed: int = 0) -> list[Continuation]:
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(3, 64) for _ in range(draw.randint(1, most))]

    return [Continuation(ids(20), ids(4)) for _ in range(number)]


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_batch_gives_what_each_gives_alone(request: pytest.FixtureRequest, kind: str, batch_size: int) -> None:
    model = request.getfixturevalue(kind)().eval()
    asked = continuations(17)
    found = loglikelihoods(CausalLM(model), asked, batch_size=batch_size)
    for one, got in zip(asked, found, strict=True):
        nats, greedy = by_hand(model, one)
        assert got.nats == pytest.approx(nats, abs=1e-4)
        assert got.greedy == greedy


def test_order_changes_nothing(tiny_llama: Callable[..., Any]) -> None:
    causal = CausalLM(tiny_llama(dtype=torch.float64))
    asked = continuations(20)
    plain = loglikelihoods(causal, asked, batch_size=4)
    turned = loglikelihoods(causal, asked[::-1], batch_size=7)[::-1]
    assert [one.nats for one in turned] == pytest.approx([one.nats for one in plain], abs=1e-9)


def rows_run(model: Any, asked: Sequence[Continuation], batch_size: int = 64) -> int:
    rows = 0

    def count(done: int, total: int) -> None:
        nonlocal rows
        rows = total

    loglikelihoods(CausalLM(model), asked, batch_size=batch_size, on_rows=count)
    return rows


def test_choices_of_one_token_share_a_row_and_a_beginning_is_not_run_by_itself(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama()
    letters = [Continuation([5, 6, 7], [token]) for token in (10, 11, 12, 13)]
    words = [Continuation([5, 6, 7], [20, 21]), Continuation([5, 6], [7, 10]), Continuation([9], [8])]
    assert rows_run(model, letters) == 1
    assert rows_run(model, [*letters, *words]) == 2  # 5 6 7 20, and 9
    found = loglikelihoods(CausalLM(model), [*letters, *words], batch_size=8)
    for one, got in zip([*letters, *words], found, strict=True):
        assert got.nats == pytest.approx(by_hand(model, one)[0], abs=1e-4)


def test_the_likeliest_continuation_is_told(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(dtype=torch.float64)
    before, best = [5, 6, 7], []
    with torch.no_grad():
        for _ in range(3):
            best.append(int(model(input_ids=torch.tensor([before + best])).logits[0, -1].argmax()))
    other = [best[0], (best[1] + 1) % 60, best[2]]
    asked = [Continuation(before, best), Continuation(before, other)]
    found = loglikelihoods(CausalLM(model), asked, batch_size=2)
    assert [one.greedy for one in found] == [True, False]


def test_a_model_whose_head_cannot_be_taken_apart_is_used_whole(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    whole = CausalLM(model)
    whole._head = None
    assert whole.head is None
    asked = continuations(9)
    got = [one.nats for one in loglikelihoods(whole, asked, batch_size=4)]
    assert got == pytest.approx([by_hand(model, one)[0] for one in asked], abs=1e-4)


def test_the_bound_adapter_is_what_is_measured(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(dtype=torch.float64)
    adapter = lora(model, rank=4, targets="all-linear")
    tree = {name: leaf + 0.3 for name, leaf in adapter.init(0).items()}
    asked = continuations(6)
    plain = loglikelihoods(adapter.causal, asked, batch_size=3)
    with adapter.bound({name: leaf[None] for name, leaf in tree.items()}):
        tuned = loglikelihoods(adapter.causal, asked, batch_size=3)
        wanted = [by_hand(model, one)[0] for one in asked]
    assert [one.nats for one in tuned] == pytest.approx(wanted, abs=1e-6)
    assert all(abs(a.nats - b.nats) > 1e-3 for a, b in zip(plain, tuned, strict=True))


def test_what_has_no_tokens_is_refused(tiny_llama: Callable[..., Any]) -> None:
    causal = CausalLM(tiny_llama())
    for wrong in (Continuation([], [1]), Continuation([1], [])):
        with pytest.raises(UserError, match="no tokens"):
            loglikelihoods(causal, [wrong], batch_size=1)
    with pytest.raises(UserError, match="batch_size is 0"):
        loglikelihoods(causal, [Continuation([1], [1])], batch_size=0)
    assert loglikelihoods(causal, [], batch_size=1) == []
