"""Attention as matrix products against torch's own, and inside a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.models import random_base
from fedloom.ops import attention
from fedloom.ops.attention import causal_attention, use_fast_attention


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    n, h, t, d = shape
    made = [torch.randn(n, t, h, d, generator=draw, dtype=torch.float64) for _ in range(4)]
    return [x.to(dtype).transpose(1, 2) for x in made]  # as a model has them: heads are a view


def both(shape: tuple[int, ...], dtype: torch.dtype, own: bool) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    q, k, v, up = inputs(shape, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if own:
        out = causal_attention(*leaves, scale=0.3)
    else:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3)
    return [out.detach(), *torch.autograd.grad(out, leaves, up)]


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("piece", [1, 300, 10**9])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 1, 2, 4), (3, 2, 17, 4)])
def test_it_equals_torchs_own_in_float64(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], piece: int, kept: int
) -> None:
    monkeypatch.setattr(attention, "PIECE_ELEMENTS", piece)
    monkeypatch.setattr(attention, "KEPT_LENGTH", kept)
    for mine, theirs in zip(both(shape, torch.float64, True), both(shape, torch.float64, False), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_torchs_own() -> None:
    shape = (2, 4, 65, 16)
    exact = both(shape, torch.float64, False)
    own, other = both(shape, torch.bfloat16, True), both(shape, torch.bfloat16, False)
    for truth, mine, theirs in zip(exact, own, other, strict=True):
        error = [float((x.double() - truth).norm() / truth.norm()) for x in (mine, theirs)]
        assert error[0] < max(2 * error[1], 1e-2)


def test_without_gradients_nothing_is_kept() -> None:
    q, k, v, _ = inputs((1, 2, 9, 4), torch.float64)
    with torch.no_grad():
        out = causal_attention(q, k, v, 0.3)
    assert not out.requires_grad
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))


def small(dtype: torch.dtype) -> Any:
    return random_base(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=300, dtype=dtype).model


def test_a_model_uses_it_only_in_bfloat16_and_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_fast_attention(small(torch.float32)) is False
    model = small(torch.bfloat16)
    assert use_fast_attention(model) is True
    assert model.config._attn_implementation == attention.NAME
    calls = []
    real = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *args: calls.append(1) or real(*args))
    ids = torch.randint(4, 300, (3, 11), generator=torch.Generator().manual_seed(0))
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    with torch.no_grad():
        model(input_ids=ids)
    assert not calls  # torch's own is faster forward
    model(input_ids=ids)
    assert len(calls) == 2  # layers


def test_a_model_with_it_gives_the_same_logits_and_gradients() -> None:
    ids = torch.randint(4, 300, (3, 33), generator=torch.Generator().manual_seed(0))

    def run(dtype: torch.dtype, fast: bool) -> tuple[Tensor, Tensor]:
        model = small(dtype)
        assert use_fast_attention(model) is fast
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        out = model(input_ids=ids)
        [grad] = torch.autograd.grad(F.cross_entropy(out.logits.float().flatten(0, 1), ids.flatten()), [weight])
        return out.logits.detach().double(), grad.double()

    truth, own = run(torch.float32, False), run(torch.bfloat16, True)
    for want, got in zip(truth, own, strict=True):
        assert float((want - got).norm() / want.norm()) < 3e-2


def test_padding_masks_and_a_cache_go_to_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = small(torch.bfloat16), small(torch.bfloat16)
    assert use_fast_attention(fast)
    monkeypatch.setattr(attention, "causal_attention", lambda *args: pytest.fail("a mask was left out"))
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "use_cache": True}
    fast.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    assert torch.equal(
        fast(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits
    )
    with torch.no_grad():
        assert torch.equal(fast.generate(ids, **settings), plain.generate(ids, **settings))


def test_it_does_not_travel_with_a_saved_model(tmp_path: Any) -> None:
    model = small(torch.bfloat16)
    assert use_fast_attention(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
