"""Rows decoded together, of several clients' models, are what transformers writes for each row alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from fedloom.adapters import (
    bottleneck,
    dora,
    full,
    ia3,
    last_layers,
    lora,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
)
from fedloom.evaluate import decoding, plain
from fedloom.evaluate.decoding import Opening
from fedloom.evaluate.generate import _binder, write_openings
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.slots import Slots, unfit
from fedloom.models import random_base
from fedloom.tree import stack

VOCAB = 64
STOPS = (5, 6, 7)
KV: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**KV),
    "qwen2": transformers.Qwen2Config(**KV),
    "mistral, window 12": transformers.MistralConfig(sliding_window=12, **KV),
    "gemma2, window 10": transformers.Gemma2Config(
        head_dim=8, sliding_window=10, final_logit_softcapping=5.0, query_pre_attn_scalar=8, **KV
    ),
    "phi": transformers.PhiConfig(**KV),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3
    ),
    "neox": transformers.GPTNeoXConfig(**{k: v for k, v in KV.items() if k != "num_key_value_heads"}),
    "opt": transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, init_std=0.3,
        max_position_embeddings=96, word_embed_proj_dim=32,
    ),
    "bloom": transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}  # fmt: skip
KINDS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: lora(model, rank=4, targets="all-linear"),
    "dora": lambda model: dora(model, rank=4),
    "ia3": ia3,
    "bottleneck": bottleneck,
    "prompt_tuning": lambda model: prompt_tuning(model, num_virtual_tokens=3),
    "p_tuning": lambda model: p_tuning(model, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix_tuning": lambda model: prefix_tuning(model, num_virtual_tokens=3),
    "last_layers": lambda model: last_layers(model, layers=1),
    "full": full,
}


def model_of(config: Any) -> Any:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def trees(adapter: Any, number: int, size: float = 0.3) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(number):
        draw = torch.Generator().manual_seed(seed)
        made.append(
            {k: v + size * torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in adapter.init(seed).items()}
        )
    return made


def openings(number: int, seed: int, beginning: int = 0, room: int = 12, **more: Any) -> list[Opening]:
    """Prompts of 1 to 14 tokens after a beginning that all have, with rooms of their own."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(8, VOCAB, (beginning,), generator=torch.Generator().manual_seed(99)).tolist()
    made = []
    for _ in range(number):
        length, own = (int(torch.randint(1, top, (1,), generator=draw)) for top in (15, room + 1))
        made.append(Opening([*first, *torch.randint(8, VOCAB, (length,), generator=draw).tolist()], own, **more))
    return made


def as_text(rows: Any) -> list[str]:
    return [" ".join(f"t{token}" for token in row) for row in rows]


def both(adapter: Any, number: int, asked: list[list[Opening]], slots: int, **more: Any) -> tuple[Any, Any]:
    bind = _binder(adapter, stack(trees(adapter, number)))
    with bind([0]) as model:
        assert decoding.misfit(model) is None
    fast = decoding.write(bind, asked, slots=slots, stops=STOPS, texts=as_text, **more)
    return fast, plain.write(bind, asked, slots=1, stops=STOPS, texts=as_text)


def sound(fast: Any, alone: Any) -> None:
    assert fast == alone
    flat = [tuple(ids) for own in fast for ids in own]
    assert len(set(flat)) > len(flat) // 2  # models and prompts do differ
    assert any(len(ids) > 3 for ids in flat)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_writes_what_each_row_alone_gets(name: str) -> None:
    adapter = lora(model_of(MODELS[name]), rank=4, targets="all-linear")
    asked = [openings(4, 1, room=16), openings(2, 2, room=16)]
    sound(*both(adapter, 2, asked, slots=4))


@pytest.mark.parametrize(
    ("kind", "model"),
    [*((kind, "llama") for kind in KINDS), ("prompt_tuning", "gpt2"), ("prefix_tuning", "gpt2"), ("full", "gpt2")],
)
def test_every_adapter_kind(kind: str, model: str) -> None:
    adapter = KINDS[kind](model_of(MODELS[model]))
    sound(*both(adapter, 3, [openings(3, 1, room=8), [], openings(2, 3, room=8)], slots=4))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "lora"),
        ("mistral, window 12", "prompt_tuning"),
        ("gemma2, window 10", "lora"),
        ("gemma2, window 10", "prompt_tuning"),
        ("gpt2", "prefix_tuning"),
    ],
)
def test_a_common_beginning_is_run_once(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = KINDS[kind](model_of(MODELS[name]))
    read = 0
    first = decoding._first_logits

    def counted(model: Any, ids_NT: Tensor, *more: Any) -> Tensor:
        nonlocal read
        read += ids_NT.numel()
        return first(model, ids_NT, *more)

    asked = [openings(3, 1, beginning=20), openings(2, 2, beginning=20)]
    monkeypatch.setattr(decoding, "_first_logits", counted)
    fast, alone = both(adapter, 2, asked, slots=4)
    sound(fast, alone)
    assert read < sum(len(one.ids) for own in asked for one in own)


@pytest.mark.parametrize(("slots", "stride"), [(1, None), (3, 1), (4, 5), (64, 3)])
def test_neither_slots_nor_strides_change_an_answer(slots: int, stride: int | None) -> None:
    adapter = KINDS["lora"](model_of(MODELS["llama"]))
    drawn = Sampling(1.3, top_p=0.9, top_k=20)
    asked = [
        openings(3, 1) + openings(2, 2, sampling=Sampling(0.8, seed=4)),
        openings(2, 3, stop=("t9", "t1")) + openings(1, 5, sampling=drawn, stop=("t2",)),
        openings(1, 4, room=16),
    ]
    sound(*both(adapter, 3, asked, slots=slots, stride=stride))


def test_the_grid_shrinks_to_what_is_still_written(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = KINDS["lora"](model_of(MODELS["llama"]))
    asked = [[Opening([9, 10 + n], 2) for n in range(8)], [Opening([9, 10], 40)]]
    sizes: list[int] = []
    step = decoding._next_logits

    def counted(model: Any, token_N: Tensor, *more: Any) -> Tensor:
        sizes.append(len(token_N))
        return step(model, token_N, *more)

    monkeypatch.setattr(decoding, "_next_logits", counted)
    bind = _binder(adapter, stack(trees(adapter, 2)))
    [many, [long]] = decoding.write(bind, asked, slots=8, stops=(), texts=as_text)
    assert len(long) == 40 and all(len(ids) == 2 for ids in many)
    assert sizes[0] == 8  # four slots each
    assert sizes[5:] == [1] * len(sizes[5:]) and len(sizes) >= 39


def test_columns_that_no_row_needs_are_dropped() -> None:
    """Hundreds of short answers through a few slots, on a model with few positions: the cache must not run along."""
    adapter = KINDS["lora"](model_of(MODELS["gpt2"]))
    asked = [[Opening([9, 10 + n % 40], 1 + n % 7) for n in range(60)]]
    bind = _binder(adapter, stack(trees(adapter, 1)))
    writer = decoding._Writer(bind, asked, 4, STOPS, as_text, None, None, None)
    widest = 0
    shrink = writer._steps

    def watched() -> None:
        nonlocal widest
        shrink()
        widest = max(widest, writer.cache.length if writer.cache is not None else 0)

    writer._steps = watched  # type: ignore[method-assign]
    with torch.no_grad(), writer.models:
        writer.run()
    assert widest < 24
    assert writer.written == plain.write(bind, asked, slots=60, stops=STOPS, texts=as_text)


def test_a_row_that_has_ended_takes_no_position_that_there_is_not() -> None:
    adapter = KINDS["lora"](model_of(MODELS["gpt2"]))
    asked = [[Opening([9] * 90, 6), *(Opening([9, 10 + n], 20) for n in range(4))]]
    bind = _binder(adapter, stack(trees(adapter, 1)))
    fast = decoding.write(bind, asked, slots=5, stops=(VOCAB - 1,), texts=as_text)
    assert fast == plain.write(bind, asked, slots=5, stops=(VOCAB - 1,), texts=as_text)
    assert [len(ids) for ids in fast[0]] == [6, 20, 20, 20, 20]


def test_slots_keep_what_is_masked_finite() -> None:
    config = MODELS["llama"]
    cache = Slots(config)
    cache.update(torch.full((1, 2, 3, 4), torch.inf), torch.ones(1, 2, 3, 4), 0)
    cache.update(torch.full((1, 2, 3, 4), torch.inf), torch.ones(1, 2, 3, 4), 1)
    moved = cache.moved([0], [1], 2, 5, 4, [])
    assert moved.layers[0].values[0].abs().sum() == 0 and moved.layers[0].keys.shape == (2, 2, 9, 4)
    assert torch.equal(moved.layers[1].values[1, 0, :, 0], torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0, 0]))


def test_a_model_that_keeps_something_else_is_written_by_transformers(caplog: pytest.LogCaptureFixture) -> None:
    assert unfit(transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)) is not None
    assert unfit(MODELS["gemma2, window 10"]) is None
    base = random_base(hidden_size=32, num_layers=2, num_heads=4, vocab_size=300, dtype=torch.float64, seed=5)
    adapter = lora(base.model, rank=4, targets="all-linear")
    asked = [openings(3, 1), openings(3, 2)]
    tree_C = stack(trees(adapter, 2))
    fast = write_openings(adapter, tree_C, asked, base.tokenizer, batch_size=4)
    with caplog.at_level(logging.WARNING, "fedloom"):
        assert not caplog.records
        forward = base.model.forward

        def strange(**given: Any) -> Any:  # as code that takes its own cache only
            kept = given.get("past_key_values")
            if kept is not None and type(kept) is not DynamicCache:
                raise TypeError("what is this?")
            return forward(**given)

        base.model.forward = strange
        decoding._known.pop(base.model)
        for _ in range(2):
            assert write_openings(adapter, tree_C, asked, base.tokenizer, batch_size=4) == fast
    assert [record.message.count("what is this?") for record in caplog.records] == [1]


def test_a_cache_that_is_not_what_it_seems_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(MODELS["llama"])
    right = Slots.moved

    def wrong(self: Slots, *given: Any, **more: Any) -> Slots:
        moved = right(self, *given, **more)
        moved.layers[1].keys.neg_()
        return moved

    monkeypatch.setattr(Slots, "moved", wrong)
    assert "differ" in str(decoding.misfit(model))
