"""A real pretrained model and real answers: loading, writing, judging."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.adapters.lora import lora
from fedloom.data.rows import read
from fedloom.evaluate.generate import decode, generate, generate_one
from fedloom.evaluate.scores import auto_score, final_number, same_final_number
from fedloom.models import Base, load_base
from fedloom.tree import stack

RealPath = Callable[[str], Path]


@pytest.fixture(scope="module")
def stories(real_path: RealPath) -> Base:
    return load_base(str(real_path("models/stories260K")), dtype="float32")


def test_a_real_model_loads_with_its_own_weights(stories: Base, real_path: RealPath) -> None:
    reference = AutoModelForCausalLM.from_pretrained(real_path("models/stories260K"), dtype=torch.float32)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    with torch.no_grad():
        assert torch.equal(stories.model(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert stories.num_parameters == 260_032
    assert stories.tokenizer.pad_token_id != stories.tokenizer.eos_token_id


def test_it_tells_a_story_the_same_alone_in_a_batch_and_through_an_empty_adapter(
    stories: Base, real_path: RealPath
) -> None:
    folder = real_path("models/stories260K")
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    starts = ["Once upon a time", "Lily and Tom went to the park. They", "The dog"]
    asked = [tokenizer(text)["input_ids"] for text in starts]
    want = []
    for ids in asked:
        with torch.no_grad():
            written = reference.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
        want.append(tokenizer.decode(written, skip_special_tokens=True))
    adapter = lora(stories.model, rank=4)
    [answers] = generate(adapter, stack([adapter.init(0)]), [asked], stories.tokenizer, max_new_tokens=30, batch_size=3)
    assert decode(stories.tokenizer, answers) == want
    assert generate_one(adapter, adapter.init(0), asked[0], stories.tokenizer, max_new_tokens=30) == want[0]
    assert "there was a" in want[0]
    adapter.detach()


@pytest.mark.parametrize("part", ["train", "test"])
def test_all_answers_of_gsm8k_score_one_under_the_parser(real_path: RealPath, part: str) -> None:
    path = real_path(f"data/gsm8k/{part}.jsonl")
    rows = read(str(path)).rows
    raw = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert len(rows) == len(raw) == {"train": 7473, "test": 1319}[part]
    assert auto_score(None, rows) == "final_number"
    for row, answer in zip(rows, raw, strict=True):
        gold = answer.rpartition("####")[2].strip()
        assert final_number(answer) == final_number(row["output"]) == Decimal(gold.replace(",", ""))
        assert same_final_number(row, row["output"]) == 1.0
        assert same_final_number(row, f"So it is {gold}") == 1.0
        assert same_final_number(row, f"The answer is {final_number(gold) + 1}.") == 0.0  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["full", "last_layers", "bottleneck"])
def test_weights_and_new_parts_of_a_real_model_are_trained_for_a_cohort_as_for_each_client(
    kind: str, real_path: RealPath, tmp_path: Path
) -> None:
    from fedloom.adapters import bottleneck, full, last_layers

    base = load_base(str(real_path("models/stories260K")), dtype="float32")
    adapter = {"full": full, "last_layers": last_layers, "bottleneck": bottleneck}[kind](base.model)
    ids = base.tokenizer(["Once upon a time there was a small dog.", "Lily went to the park with her red ball."])
    rows = [torch.tensor([one[:10]]) for one in ids["input_ids"]]
    batch = {name: torch.stack(rows) for name in ("input_ids", "labels")}
    start = adapter.init(0)
    draw = torch.Generator().manual_seed(0)
    trees = [{k: x + 1e-3 * torch.randn(x.shape, generator=draw) for k, x in start.items()} for _ in rows]
    leaves = {k: x.requires_grad_() for k, x in stack(trees).items()}
    loss_C = adapter.loss(leaves, batch)
    grads = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    for c, tree in enumerate(trees):
        own = {name: leaf[None].requires_grad_() for name, leaf in tree.items()}
        loss = adapter.loss(own, {name: leaf[c : c + 1] for name, leaf in batch.items()})
        assert loss.item() == pytest.approx(loss_C[c].item(), rel=1e-5)
        for one, got in zip(torch.autograd.grad(loss.sum(), list(own.values())), grads, strict=True):
            assert float((one[0] - got[c]).norm()) <= 1e-4 * float(one.norm()) + 1e-7
    if kind != "bottleneck":
        adapter.export(trees[0], tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        with torch.no_grad(), adapter.bound({name: leaf[None] for name, leaf in trees[0].items()}) as tuned:
            assert torch.equal(tuned(input_ids=rows[0]).logits, again(input_ids=rows[0]).logits)
