"""Writing answers: a batch of several clients' prompts gives what each prompt gives alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fedloom.adapters.lora import lora
from fedloom.errors import UserError
from fedloom.evaluate.generate import Sampling, decode, generate, generate_one
from fedloom.evaluate.scores import Scored, score_evaluation
from fedloom.models import Base, random_base
from fedloom.tree import stack
from fedloom.types import Client, Tree


@pytest.fixture(scope="module")
def base() -> Base:
    # float64: a sum in another order must not change which token is the most likely one.
    return random_base(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=300, max_positions=64, dtype=torch.float64
    )


@pytest.fixture(scope="module")
def adapter(base: Base) -> Any:
    return lora(base.model, rank=4, targets="all-linear")


def trees(adapter: Any, number: int, size: float = 0.5) -> list[Tree]:
    made = []
    for seed in range(number):
        draw = torch.Generator().manual_seed(seed)
        made.append(
            {k: v + size * torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in adapter.init(seed).items()}
        )
    return made


def prompts(number: int, seed: int, longest: int = 12) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=draw).tolist()
    return [torch.randint(4, 300, (length,), generator=draw).tolist() for length in lengths]


def by_hand(adapter: Any, tree: Tree, prompt: list[int], stops: set[int], max_new_tokens: int) -> list[int]:
    """Greedy, one prompt, no cache, no padding."""
    ids = list(prompt)
    with torch.no_grad(), adapter.bound(stack([tree])) as model:
        for _ in range(max_new_tokens):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_cohort_writes_what_each_client_writes_alone(base: Base, adapter: Any, batch_size: int) -> None:
    own = trees(adapter, 3)
    asked = [prompts(5, 1), prompts(2, 2), prompts(7, 3)]
    answers = generate(adapter, stack(own), asked, base.tokenizer, max_new_tokens=6, batch_size=batch_size)
    for tree, mine, written in zip(own, asked, answers, strict=True):
        assert written == [by_hand(adapter, tree, p, {base.tokenizer.eos_token_id}, 6) for p in mine]
    assert len({str(a) for own_answers in answers for a in own_answers}) > 5  # the models do differ


def test_a_client_without_prompts_is_carried_along(base: Base, adapter: Any) -> None:
    own = trees(adapter, 2)
    [mine, nothing] = generate(adapter, stack(own), [prompts(3, 1), []], base.tokenizer, max_new_tokens=4, batch_size=8)
    assert nothing == []
    assert mine == [by_hand(adapter, own[0], p, {base.tokenizer.eos_token_id}, 4) for p in prompts(3, 1)]
    assert generate(adapter, stack(own), [[], []], base.tokenizer, max_new_tokens=4, batch_size=8) == [[], []]


def test_an_answer_ends_before_the_stop_token(base: Base, adapter: Any) -> None:
    [tree] = trees(adapter, 1)
    asked = prompts(6, 4)
    free = [by_hand(adapter, tree, p, set(), 8) for p in asked]
    stop = free[0][3]
    base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, stop]
    try:
        [answers] = generate(adapter, stack([tree]), [asked], base.tokenizer, max_new_tokens=8, batch_size=6)
    finally:
        base.model.generation_config.eos_token_id = base.tokenizer.eos_token_id
    assert answers[0] == free[0][: free[0].index(stop)]
    assert all(stop not in answer for answer in answers)
    assert [len(a) for a in answers] == [f.index(stop) if stop in f else 8 for f in free]


def test_the_models_own_generation_settings_change_nothing_and_stay(base: Base, adapter: Any) -> None:
    [tree] = trees(adapter, 1)
    plain = generate(adapter, stack([tree]), [prompts(4, 5)], base.tokenizer, max_new_tokens=8, batch_size=4)
    config = base.model.generation_config
    config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=5)
    try:
        again = generate(adapter, stack([tree]), [prompts(4, 5)], base.tokenizer, max_new_tokens=8, batch_size=4)
        assert base.model.generation_config is config
        assert config.temperature == 5.0
    finally:
        config.update(do_sample=False, temperature=1.0, repetition_penalty=1.0, min_new_tokens=None)
    assert again == plain
    assert base.model.config.use_cache is False


def test_an_error_leaves_the_models_settings_as_they_were(base: Base, adapter: Any) -> None:
    config = base.model.generation_config
    with pytest.raises(IndexError):
        generate(adapter, stack(trees(adapter, 1)), [[[99999]]], base.tokenizer, max_new_tokens=2, batch_size=1)
    assert base.model.generation_config is config


def test_a_long_prompt_gets_the_room_there_is(base: Base, adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
    [tree] = trees(adapter, 1)
    asked = [[5] * 61, [6] * 64]
    with caplog.at_level(logging.WARNING, "fedloom"):
        [answers] = generate(adapter, stack([tree]), [asked], base.tokenizer, max_new_tokens=8, batch_size=1)
    assert len(answers[0]) == 3
    assert answers[1] == []
    assert "61 tokens leaves room for 3" in caplog.text


@pytest.mark.parametrize(("max_new_tokens", "batch_size"), [(0, 1), (1, 0)])
def test_limits_below_one_are_refused(base: Base, adapter: Any, max_new_tokens: int, batch_size: int) -> None:
    with pytest.raises(UserError, match="1 or more"):
        generate(
            adapter,
            stack(trees(adapter, 1)),
            [[[5]]],
            base.tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )


def test_an_empty_prompt_is_refused(base: Base, adapter: Any) -> None:
    with pytest.raises(UserError, match="no tokens"):
        generate(adapter, stack(trees(adapter, 1)), [[[]]], base.tokenizer, max_new_tokens=1, batch_size=1)


def test_sampling_depends_on_its_seed_only(base: Base, adapter: Any) -> None:
    [tree] = trees(adapter, 1, size=0.1)

    def draw(seed: int) -> str:
        return generate_one(adapter, tree, [5, 6], base.tokenizer, max_new_tokens=12, sampling=Sampling(1.0, seed=seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert draw(7) == first
    assert len({draw(seed) for seed in range(8)}) > 4


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_sampling_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_streamed_pieces_make_up_the_answer(base: Base, adapter: Any) -> None:
    [tree] = trees(adapter, 1)
    pieces: list[str] = []
    whole = generate_one(adapter, tree, [5, 6, 7], base.tokenizer, max_new_tokens=10, on_text=pieces.append)
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert whole == decode(base.tokenizer, [by_hand(adapter, tree, [5, 6, 7], {base.tokenizer.eos_token_id}, 10)])[0]


def test_scores_are_sums_over_each_clients_rows(base: Base, adapter: Any) -> None:
    rows = [
        {"kind": "alpaca", "instruction": f"say {n}", "input": "", "output": "x", "category": "c"} for n in range(4)
    ]
    asked: dict[str, list[dict[str, Any]]] = {"a": rows[:3], "b": rows[3:]}
    seen: list[Scored] = []

    def judge(row: dict[str, Any], completion: str) -> float:
        return 1.0 if row is rows[0] or row is rows[3] else 0.5

    evaluation = score_evaluation(
        "score",
        asked.__getitem__,
        judge,
        base.tokenizer,
        max_new_tokens=2,
        batch_size=4,
        chat_template="alpaca",
        on_scored=seen.append,
    )
    wide = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, max_positions=512)
    roomy = lora(wide.model, rank=2)
    found = evaluation.run(roomy, stack(trees(roomy, 2)), [Client("a", ()), Client("b", ())])
    assert list(found) == [{"score_sum": 2.0, "scored": 3.0}, {"score_sum": 1.0, "scored": 1.0}]
    assert [(one.client, one.score) for one in seen] == [("a", 1.0), ("a", 0.5), ("a", 0.5), ("b", 1.0)]


def test_a_limit_takes_the_first_rows_of_each_client() -> None:
    rows = [{"kind": "alpaca", "instruction": f"say {n}", "input": "", "output": "x"} for n in range(4)]
    seen: list[Scored] = []
    base = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, max_positions=512)
    roomy = lora(base.model, rank=2)
    evaluation = score_evaluation(
        "score",
        lambda client: rows if client == "a" else rows[:1],
        "exact",
        base.tokenizer,
        max_new_tokens=1,
        batch_size=4,
        limit=2,
        on_scored=seen.append,
    )
    found = evaluation.run(roomy, stack(trees(roomy, 2)), [Client("a", ()), Client("b", ())])
    assert [metrics["scored"] for metrics in found] == [2.0, 1.0]
    assert [one.row["instruction"] for one in seen] == ["say 0", "say 1", "say 0"]
