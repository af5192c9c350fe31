"""Cross-entropy through a frozen output head, in chunks, so that the logits are never whole in memory.

Shape suffixes: N labelled positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time; larger chunks only cost memory


class Head(NamedTuple):
    """What a causal LM does between its last hidden state and its logits."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0  # Cohere's logit_scale, Granite's 1 / logits_scaling
    softcap: float | None = None  # Gemma 2's final_logit_softcapping


def logits(hidden_ND: Tensor, head: Head) -> Tensor:
    """Logits [N, V] in float32 (float64 stays)."""
    z_NV = F.linear(hidden_ND, head.weight_VD, head.bias_V)
    z_NV = z_NV if z_NV.dtype == torch.float64 else z_NV.float()
    if head.scale != 1.0:
        z_NV = z_NV * head.scale
    if head.softcap is not None:
        z_NV = head.softcap * torch.tanh(z_NV / head.softcap)
    return z_NV


def nll_plain(hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
    """Negative log-likelihood [N] in nats, with all logits in memory: the reference."""
    return F.cross_entropy(logits(hidden_ND, head), labels_N, reduction="none")


def nll_chunked(hidden_ND: Tensor, labels_N: Tensor, head: Head, chunk_rows: int | None = None) -> Tensor:
    """The same as `nll_plain`, chunk by chunk; the gradient for the hidden state is made in the forward pass.

    The head is frozen, so each row's gradient is that row's own scalar times a vector known in the forward pass:
    nothing is computed twice, and [chunk, V] is all that is ever held.
    """
    rows = chunk_rows or max(64, CHUNK_BYTES // (4 * head.weight_VD.shape[0]))
    out: Tensor = _ChunkedNll.apply(hidden_ND, labels_N, head, rows)  # type: ignore[no-untyped-call]
    return out


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, labels_N: Tensor, head: Head, rows: int) -> Tensor:
        needs_grad = hidden_ND.requires_grad
        nll_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        if hidden_ND.dtype == torch.float64:
            nll_N = nll_N.double()
        grad_ND = torch.empty_like(hidden_ND) if needs_grad else None
        for start in range(0, len(labels_N), rows):
            piece = slice(start, start + rows)
            labels = labels_N[piece, None]
            z = F.linear(hidden_ND[piece], head.weight_VD, head.bias_V)
            z = z if z.dtype == torch.float64 else z.float()
            if head.scale != 1.0:
                z = z * head.scale
            slope = None
            if head.softcap is not None:
                z = torch.tanh(z / head.softcap)
                slope = 1 - z * z
                z = z * head.softcap
            lse = z.logsumexp(1, keepdim=True)
            nll_N[piece] = (lse - z.gather(1, labels))[:, 0]
            if grad_ND is not None:
                z.sub_(lse).exp_()  # softmax, in place of the logits
                z.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=z.dtype))
                if slope is not None:
                    z.mul_(slope)
                if head.scale != 1.0:
                    z.mul_(head.scale)
                grad_ND[piece] = z.to(hidden_ND.dtype) @ head.weight_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_N[:, None].to(grad_ND.dtype), None, None, None
