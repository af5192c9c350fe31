"""Log-likelihoods of continuations: batches and shared rows give what one forward pass per continuation gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedloom.adapters import lora, prefix_tuning, prompt_tuning
from fedloom.errors import UserError
from fedloom.evaluate import decoding
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


def alike(seed: int = 0) -> list[Continuation]:
    """Two subjects with solved examples of their own before each question, questions with four answers, and others."""
    draw = random.Random(seed)

    def ids(number: int) -> list[int]:
        return [draw.randrange(3, 64) for _ in range(number)]

    found = []
    for examples in (ids(40), ids(50)):
        found += [Continuation([*examples, *ids(draw.randint(1, 9))], ids(draw.randint(1, 3))) for _ in range(3)]
    for _ in range(2):
        question = ids(34)
        found += [Continuation(question, ids(draw.randint(2, 6))) for _ in range(4)]
    found += continuations(3)
    draw.shuffle(found)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(
    ("kind", "adapter_of"),
    [
        ("tiny_llama", lambda model: lora(model, rank=2)),
        ("tiny_llama", lambda model: prompt_tuning(model, num_virtual_tokens=3)),
        ("tiny_gpt2", lambda model: prefix_tuning(model, num_virtual_tokens=3)),
    ],
)
def test_what_begins_alike_is_run_once(
    request: pytest.FixtureRequest, kind: str, adapter_of: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(kind)(dtype=torch.float64).eval()
    adapter = adapter_of(model)
    tree = {k: leaf[None] + 0.2 for k, leaf in adapter.init(0).items()}
    asked = alike()
    tokens = 0
    at, fill = CausalLM.at, decoding.fill

    def read(self: CausalLM, ids: torch.Tensor, *more: Any) -> Any:
        nonlocal tokens
        tokens += ids.numel()
        return at(self, ids, *more)

    def opened(model: Any, ids: torch.Tensor, cache: Any) -> None:
        nonlocal tokens
        tokens += ids.numel()
        fill(model, ids, cache)

    with adapter.bound(tree) as bound:
        assert decoding.misfit(bound) is None
        wanted = [by_hand(bound, one) for one in asked]
        monkeypatch.setattr(CausalLM, "at", read)
        monkeypatch.setattr(decoding, "fill", opened)
        found = loglikelihoods(CausalLM(bound), asked, batch_size=batch_size)
    assert [one.nats for one in found] == pytest.approx([nats for nats, _ in wanted], abs=1e-9)
    assert [one.greedy for one in found] == [greedy for _, greedy in wanted]
    if batch_size == 1:
        assert tokens < 0.6 * sum(len(one.before) + len(one.tokens) - 1 for one in asked)


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
