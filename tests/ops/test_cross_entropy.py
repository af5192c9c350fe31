"""The chunked cross-entropy equals the plain one, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from fedloom.ops.cross_entropy import Head, nll_chunked, nll_plain


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_chunked_equals_plain(dtype, bias, scale, softcap):
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 8, generator=draw, dtype=torch.float64).to(dtype)
    labels = torch.randint(21, (13,), generator=draw)
    head = Head(
        torch.randn(21, 8, generator=draw, dtype=torch.float64).to(dtype),
        torch.randn(21, generator=draw, dtype=torch.float64).to(dtype) if bias else None,
        scale,
        softcap,
    )
    upstream = torch.rand(13, generator=draw)
    out = []
    for run in (nll_plain, lambda *a: nll_chunked(*a, chunk_rows=5)):
        x = hidden.clone().requires_grad_()
        nll = run(x, labels, head)
        (nll * upstream.to(nll.dtype)).sum().backward()
        out.append((nll.detach().double(), x.grad.double()))
    value, gradient = {
        torch.float64: (1e-12, 1e-12),
        torch.float32: (1e-5, 1e-5),
        torch.bfloat16: (1e-5, 3e-2),
        torch.float16: (1e-5, 4e-3),
    }[dtype]
    assert float((out[0][0] - out[1][0]).abs().max()) < value * 10
    scale_of_grad = float(out[0][1].abs().max())
    assert float((out[0][1] - out[1][1]).abs().max()) < gradient * scale_of_grad
    assert scale_of_grad > 0.1


def test_nothing_is_kept_for_backward_without_a_graph():
    head = Head(torch.randn(5, 4))
    nll = nll_chunked(torch.randn(3, 4), torch.tensor([0, 4, 2]), head)
    assert not nll.requires_grad
    assert nll_chunked(torch.randn(0, 4), torch.empty(0, dtype=torch.long), head).shape == (0,)


@pytest.mark.parametrize("chunk_rows", [5, 20])  # made again in the backward pass, or kept
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_trained_head_gets_the_gradients_of_the_plain_one(dtype, bias, softcap, chunk_rows):
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(13, 8, generator=draw, dtype=torch.float64).to(dtype)
    labels = torch.randint(21, (13,), generator=draw)
    weight = torch.randn(21, 8, generator=draw, dtype=torch.float64).to(dtype)
    add = torch.randn(21, generator=draw, dtype=torch.float64).to(dtype) if bias else None
    upstream = torch.rand(13, generator=draw)
    out = []
    for run in (nll_plain, lambda *a: nll_chunked(*a, chunk_rows=chunk_rows)):
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight, add) if leaf is not None]
        nll = run(leaves[0], labels, Head(leaves[1], leaves[2] if bias else None, 0.5, softcap))
        grads = torch.autograd.grad((nll * upstream.to(nll.dtype)).sum(), leaves)
        out.append([nll.detach(), *grads])
    assert len(out[0]) == 3 + bias
    for a, b in zip(*out, strict=True):
        close = 1e-11 if dtype == torch.float64 else 3e-2
        assert float((a.double() - b.double()).abs().max()) < close * float(a.double().abs().max())
