"""Causal attention in bfloat16 on a CPU, as matrix products.

torch's own kernel for it runs at a tenth of the speed of its bfloat16 matrix products, and its backward pass is slower
than in float32. Two batched products and a softmax, with a backward pass of four more, are 2 to 4 times faster at the
lengths fine-tuning has. The reference is `torch.nn.functional.scaled_dot_product_attention`, which stays in use for all
else: other types and devices, masks, one token at a time.

Shape suffixes: N rows, H heads, P = N * H, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAME", "causal_attention", "use_fast_attention"]

NAME = "fedloom_cpu"  # transformers' name for it, in `config._attn_implementation`
PIECE_ELEMENTS = 2**21  # of the [P, T, T] weights at a time: 4 MiB, so that they stay in the cache
KEPT_LENGTH = 8  # weights are kept for the backward pass up to so many head sizes of length, beyond that made again


def causal_attention(q_NHTD: Tensor, k_NHTD: Tensor, v_NHTD: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T, causal) v: [N, H, T, D] of one dtype, no dropout."""
    out: Tensor = _Causal.apply(q_NHTD, k_NHTD, v_NHTD, scale)  # type: ignore[no-untyped-call]
    return out


def use_fast_attention(model: nn.Module) -> bool:
    """Let a Hugging Face model on a CPU in bfloat16 use it; False, and nothing changed, for every other model."""
    holder: Any = model
    weight = next(model.parameters(), None)
    if weight is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    if not holder._can_set_attn_implementation():
        return False
    _register()
    holder.set_attn_implementation(NAME)
    return True


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHTD: Tensor, k_NHTD: Tensor, v_NHTD: Tensor, scale: float) -> Tensor:
        n, h, t, d = q_NHTD.shape
        q, k, v = (x.reshape(n * h, t, d) for x in (q_NHTD, k_NHTD, v_NHTD))
        needs_grad = any(ctx.needs_input_grad[:3])
        keep = needs_grad and t <= KEPT_LENGTH * d
        future_TT = _future(t, q)
        out_NTHD = q.new_empty(n * h, t, d)
        kept = []
        for piece in _pieces(n * h, t):
            weights_PTT = _weights(q[piece], k[piece], future_TT, scale)
            torch.bmm(weights_PTT, v[piece], out=out_NTHD[piece])
            if keep:
                kept.append(weights_PTT)
        if needs_grad:
            ctx.save_for_backward(q, k, v, *kept)
            ctx.shape, ctx.scale = (n, h, t, d), scale
        return out_NTHD.view(n, h, t, d)

    @staticmethod
    def backward(ctx: Any, grad_NHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        n, h, t, d = ctx.shape
        grad = grad_NHTD.reshape(n * h, t, d)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        future_TT = None if kept else _future(t, q)
        for number, piece in enumerate(_pieces(n * h, t)):
            w_PTT = kept[number] if future_TT is None else _weights(q[piece], k[piece], future_TT, ctx.scale)
            torch.bmm(w_PTT.mT, grad[piece], out=dv[piece])
            dw_PTT = torch.bmm(grad[piece], v[piece].mT)
            dz_PTT = torch._softmax_backward_data(dw_PTT, w_PTT, -1, w_PTT.dtype).mul_(ctx.scale)
            torch.bmm(dz_PTT, k[piece], out=dq[piece])
            torch.bmm(dz_PTT.mT, q[piece], out=dk[piece])
        return dq.view(n, h, t, d), dk.view(n, h, t, d), dv.view(n, h, t, d), None


def _weights(q_PTD: Tensor, k_PTD: Tensor, future_TT: Tensor, scale: float) -> Tensor:
    return torch.softmax(torch.baddbmm(future_TT, q_PTD, k_PTD.mT, alpha=scale), -1)


def _future(t: int, like: Tensor) -> Tensor:
    """[T, T]: minus infinity where a key comes after its query, else 0."""
    return like.new_full((t, t), float("-inf")).triu_(1)


def _pieces(p: int, t: int) -> list[slice]:
    size = max(1, PIECE_ELEMENTS // (t * t))
    return [slice(start, start + size) for start in range(0, p, size)]


def _register() -> None:
    """Tell transformers of it; once is enough, and again does no harm."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        fast = (
            attention_mask is None
            and causal
            and not dropout
            and any(x.requires_grad for x in (query, key, value))  # torch's own is faster forward, 2 x with AMX
            and query.dtype == torch.bfloat16
            and query.device.type == "cpu"
            and 1 < query.shape[2] == key.shape[2]
            and query.shape[3] == value.shape[3]
            and more.get("position_bias") is None
            and more.get("softcap") is None
            and more.get("cache") is None
            and not more.get("output_attentions")
        )
        if not fast:
            found: tuple[Tensor, None] = sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **more,
            )
            return found
        groups = query.shape[1] // key.shape[1]
        scale = scaling if scaling is not None else float(query.shape[3] ** -0.5)
        out_NHTD = causal_attention(query, repeat_kv(key, groups), repeat_kv(value, groups), scale)
        return out_NHTD.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
