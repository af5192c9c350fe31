"""Cross-entropy through an output head, in chunks, so that the logits are never whole in memory.

Shape suffixes: N labelled positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.ops.shapes import rounded

# In float16 a probability below 6e-8 would be 0, and a large vocabulary has many of them: gradients of logits are
# larger by this much there. Products with the head's weights stay below float16's largest number up to weights of 127.
FLOAT16_LIFT = 256.0
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
    """The same as `nll_plain`, chunk by chunk: [chunk, V] is all that is ever held.

    Under a frozen head each row's gradient is that row's own scalar times a vector known in the forward pass, so it is
    made there and nothing is computed twice. The gradient for a head that is trained itself needs the logits again:
    they are kept where they are one chunk, else made a second time.
    """
    rows = chunk_rows or max(64, CHUNK_BYTES // (4 * head.weight_VD.shape[0]))
    asked = len(labels_N)
    size = asked // rows * rows + min(rows, rounded(asked % rows, hidden_ND.device, hidden_ND.dtype))
    if size > asked:  # few shapes; nobody looks at the losses of what is added
        hidden_ND, labels_N = F.pad(hidden_ND, (0, 0, 0, size - asked)), F.pad(labels_N, (0, size - asked))
    trained = head.weight_VD.requires_grad or (head.bias_V is not None and head.bias_V.requires_grad)
    out: Tensor
    if trained and torch.is_grad_enabled():
        out = _TrainedNll.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head.weight_VD, head.bias_V, labels_N, head.scale, head.softcap, rows
        )
    else:
        out = _ChunkedNll.apply(hidden_ND, labels_N, head, rows)  # type: ignore[no-untyped-call]
    return out[:asked]


def _piece(hidden_ND: Tensor, labels_N: Tensor, head: Head, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Of some rows: the losses [N], and `_lift` times their gradients [N, V] by what hidden state times head gives."""
    labels = labels_N[:, None]
    z = F.linear(hidden_ND, head.weight_VD, head.bias_V)
    z = z if z.dtype == torch.float64 else z.float()
    if head.scale != 1.0:
        z = z * head.scale
    slope = None
    if head.softcap is not None:
        z = torch.tanh(z / head.softcap)
        slope = 1 - z * z
        z = z * head.softcap
    lse = z.logsumexp(1, keepdim=True)
    nll_N = (lse - z.gather(1, labels))[:, 0]
    if not needs_grad:
        return nll_N, None
    z.sub_(lse).exp_()  # softmax, in place of the logits
    z.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=z.dtype))
    if slope is not None:
        z.mul_(slope)
    if head.scale != 1.0:
        z.mul_(head.scale)
    lift = _lift(hidden_ND)
    return nll_N, (z if lift == 1.0 else z.mul_(lift)).to(hidden_ND.dtype)


def _lift(like: Tensor) -> float:
    return FLOAT16_LIFT if like.dtype == torch.float16 else 1.0


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, labels_N: Tensor, head: Head, rows: int) -> Tensor:
        needs_grad = hidden_ND.requires_grad
        nll_N = _losses_like(hidden_ND, labels_N)
        grad_ND = torch.empty_like(hidden_ND) if needs_grad else None
        for start in range(0, len(labels_N), rows):
            piece = slice(start, start + rows)
            nll_N[piece], dz_NV = _piece(hidden_ND[piece], labels_N[piece], head, needs_grad)
            if grad_ND is not None and dz_NV is not None:
                grad_ND[piece] = dz_NV @ head.weight_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        if grad_ND.dtype == torch.float16:  # a scaled loss has factors beyond float16's largest number
            return (grad_ND * (grad_N[:, None].float() / FLOAT16_LIFT)).to(grad_ND.dtype), None, None, None
        return grad_ND * grad_N[:, None].to(grad_ND.dtype), None, None, None


class _TrainedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scale: float,
        softcap: float | None,
        rows: int,
    ) -> Tensor:
        head = Head(weight_VD, bias_V, scale, softcap)
        nll_N = _losses_like(hidden_ND, labels_N)
        ctx.kept, ctx.rows, ctx.how = None, rows, (scale, softcap)
        for start in range(0, len(labels_N), rows):
            piece = slice(start, start + rows)
            nll_N[piece], dz_NV = _piece(hidden_ND[piece], labels_N[piece], head, len(labels_N) <= rows)
            ctx.kept = dz_NV
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        head = Head(weight_VD, bias_V, *ctx.how)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)  # sums over chunks are not rounded in between
        dw_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        db_V = torch.zeros_like(bias_V, dtype=wide) if ctx.needs_input_grad[2] else None
        dh_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels_N), ctx.rows):
            piece = slice(start, start + ctx.rows)
            dz_NV = ctx.kept
            if dz_NV is None:
                _, dz_NV = _piece(hidden_ND[piece], labels_N[piece], head, True)
            assert dz_NV is not None
            if dz_NV.dtype == torch.float16:
                dz_NV = (dz_NV * (grad_N[piece, None].float() / FLOAT16_LIFT)).to(dz_NV.dtype)
            else:
                dz_NV = dz_NV * grad_N[piece, None].to(dz_NV.dtype)
            if dh_ND is not None:
                dh_ND[piece] = dz_NV @ weight_VD
            if dw_VD is not None:
                dw_VD += dz_NV.mT @ hidden_ND[piece]
            if db_V is not None:
                db_V += dz_NV.sum(0)
        ctx.kept = None
        dw = None if dw_VD is None else dw_VD.to(weight_VD.dtype)
        return dh_ND, dw, None if db_V is None else db_V.to(weight_VD.dtype), None, None, None, None


def _losses_like(hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    return torch.empty(len(labels_N), dtype=dtype, device=hidden_ND.device)
