"""Triton kernels of LoRA with a cohort axis; the reference is `ops/cohort_lora.plain`.

Forward and the gradient of x are one and the same kernel, rows through a narrow waist: x -> x A^T -> (x A^T) B^T, added
to y; and backward dy -> dy B -> (dy B) A. The waist [N, R] stays in registers between the two products; it is written
once, for the gradients of the factors, which the other kernel sums over each client's rows. No atomic sums: the same
inputs give the same bits.

Products are on tensor cores in the rows' type, sums in float32. Float32 rows are multiplied in full float32 unless
torch's own products are allowed TF32.

Shape suffixes: C clients, N rows per client, K features going in, M features coming out (D and O, or O and D),
R rank, D in-features, O out-features.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ROWS, BLOCK_COLUMNS = 32, 64
SUM_ROWS, SUM_COLUMNS = 32, 64
PROGRAMS_PER_CORE = 2  # so many blocks of a kernel for each of a GPU's multiprocessors before x is read once only


def cohort_lora(x_CND: Tensor, y_CNO: Tensor, a_CRD: Tensor, b_COR: Tensor, scale_C: Tensor) -> Tensor:
    """y + scale * (x A^T) B^T, [C, N, O] in y's type; see `ops/cohort_lora.fused` for what it takes."""
    out: Tensor = _CohortLora.apply(x_CND, y_CNO, a_CRD, b_COR, scale_C)  # type: ignore[no-untyped-call]
    return out


class _CohortLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_CND: Tensor, y_CNO: Tensor, a_CRD: Tensor, b_COR: Tensor, scale_C: Tensor) -> Tensor:
        needed = ctx.needs_input_grad
        out_CNO, waist_CNR = through(x_CND, a_CRD, b_COR.mT, scale_C, y_CNO, y_CNO.dtype, needed[3] or needed[4])
        ctx.dtype = x_CND.dtype
        if any(needed):
            # x is needed for the gradient of A alone
            ctx.save_for_backward(x_CND if needed[2] else None, waist_CNR, a_CRD, b_COR, scale_C)
        return out_CNO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_CNO: Tensor) -> tuple[Tensor | None, ...]:
        x_CND, waist_CNR, a_CRD, b_COR, scale_C = ctx.saved_tensors
        needs_x, needs_y, needs_a, needs_b, needs_scale = ctx.needs_input_grad
        dx = da = db = dscale = back_CNR = None
        if needs_x or needs_a or needs_scale:
            span = a_CRD if needs_x else a_CRD[..., :0]
            dx, back_CNR = through(dy_CNO, b_COR.mT, span, scale_C, None, ctx.dtype, needs_a or needs_scale)
        if back_CNR is not None and needs_a:
            da = summed(back_CNR, x_CND, scale_C, torch.empty_like(a_CRD))
        if needs_b:
            db = summed(waist_CNR, dy_CNO, scale_C, torch.empty_like(b_COR).mT).mT
        if back_CNR is not None and needs_scale:
            dscale = (back_CNR.float() * waist_CNR.float()).sum((1, 2)).to(scale_C.dtype)
        return dx if needs_x else None, dy_CNO if needs_y else None, da, db, dscale


def through(
    x_CNK: Tensor,
    in_CRK: Tensor,
    out_CRM: Tensor,
    scale_C: Tensor,
    add_CNM: Tensor | None,
    dtype: torch.dtype,
    waist: bool,
) -> tuple[Tensor, Tensor | None]:
    """(add + scale * (x in^T) out [C, N, M] in `dtype`, x in^T [C, N, R] in x's type where `waist` asks for it)."""
    c, n, k = x_CNK.shape
    r, m = out_CRM.shape[1:]
    made_CNM = x_CNK.new_empty(c, n, m, dtype=dtype)
    waist_CNR = x_CNK.new_empty(c, n, r) if waist else None
    row_blocks = triton.cdiv(n, BLOCK_ROWS)
    span = _span(m, c * row_blocks, x_CNK.device)
    kept = made_CNM if waist_CNR is None else waist_CNR
    add = made_CNM if add_CNM is None else add_CNM
    with _on(x_CNK):
        _through[(row_blocks, triton.cdiv(m, span) or 1, c)](
            x_CNK, in_CRK, out_CRM, scale_C, add, kept, made_CNM,
            n, k, m, r, span,
            *x_CNK.stride(), *in_CRK.stride(), *out_CRM.stride(), scale_C.stride(0), *add.stride(), *kept.stride(),
            *made_CNM.stride(),
            ADD=add_CNM is not None, KEEP=waist, RANK=_padded(r), ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS,
            PRECISION=_precision(), DOT=_dot_type(x_CNK),
        )  # fmt: skip
    return made_CNM, waist_CNR


def summed(waist_CNR: Tensor, x_CNK: Tensor, scale_C: Tensor, out_CRK: Tensor) -> Tensor:
    """out := scale * waist^T x, summed over each client's rows, in `out`'s type and layout."""
    c, n, k = x_CNK.shape
    with _on(x_CNK):
        _summed[(triton.cdiv(k, SUM_COLUMNS), c)](
            waist_CNR, x_CNK, scale_C, out_CRK,
            n, k, waist_CNR.shape[2],
            *waist_CNR.stride(), *x_CNK.stride(), scale_C.stride(0), *out_CRK.stride(),
            RANK=_padded(waist_CNR.shape[2]), ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, PRECISION=_precision(),
            DOT=_dot_type(x_CNK),
        )  # fmt: skip
    return out_CRK


@triton.jit
def _through(
    x, w_in, w_out, scale, add, kept, made,
    n, k, m, r, span,
    x_c, x_n, x_k, in_c, in_r, in_k, out_c, out_r, out_m, scale_c, add_c, add_n, add_m, kept_c, kept_n, kept_r,
    made_c, made_n, made_m,
    ADD: tl.constexpr, KEEP: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of one client's rows; the out-features are shared out among programs, `span` each."""
    client = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = rows[:, None] < n
    ranks = tl.arange(0, RANK)
    columns = tl.arange(0, COLUMNS)
    x_rows = x + client * x_c + rows[:, None] * x_n
    in_ranks = w_in + client * in_c + ranks[None, :] * in_r
    waist = tl.full((ROWS, RANK), 0.0, tl.float32)
    for start in range(0, k, COLUMNS):
        at = start + columns
        x_block = tl.load(x_rows + at[None, :] * x_k, mask=real & (at[None, :] < k), other=0.0)
        w_block = tl.load(in_ranks + at[:, None] * in_k, mask=(at[:, None] < k) & (ranks[None, :] < r), other=0.0)
        w_block = w_block.to(x_block.dtype).to(DOT)
        waist = tl.dot(x_block.to(DOT), w_block, waist, input_precision=PRECISION)
    low = waist.to(x.dtype.element_ty)
    if KEEP:  # noqa: SIM102
        if tl.program_id(1) == 0:
            kept_at = kept + client * kept_c + rows[:, None] * kept_n + ranks[None, :] * kept_r
            tl.store(kept_at, low, mask=real & (ranks[None, :] < r))
    factor = tl.load(scale + client * scale_c).to(tl.float32)
    out_ranks = w_out + client * out_c + ranks[:, None] * out_r
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, m), COLUMNS):
        at = start + columns
        w_block = tl.load(out_ranks + at[None, :] * out_m, mask=(at[None, :] < m) & (ranks[:, None] < r), other=0.0)
        w_block = w_block.to(low.dtype).to(DOT)
        block = factor * tl.dot(low.to(DOT), w_block, input_precision=PRECISION)
        here = real & (at[None, :] < m)
        if ADD:
            added = tl.load(add + client * add_c + rows[:, None] * add_n + at[None, :] * add_m, mask=here, other=0.0)
            block += added.to(tl.float32)
        made_at = made + client * made_c + rows[:, None] * made_n + at[None, :] * made_m
        tl.store(made_at, block.to(made.dtype.element_ty), mask=here)


@triton.jit
def _summed(
    waist, x, scale, out,
    n, k, r,
    waist_c, waist_n, waist_r, x_c, x_n, x_k, scale_c, out_c, out_r, out_k,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """A block of one client's columns, over all of its rows."""
    client = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, RANK)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full((RANK, COLUMNS), 0.0, tl.float32)
    for start in range(0, n, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        waist_at = waist + client * waist_c + rows[None, :] * waist_n + ranks[:, None] * waist_r
        w_block = tl.load(waist_at, mask=(rows[None, :] < n) & (ranks[:, None] < r), other=0.0)
        x_at = x + client * x_c + rows[:, None] * x_n + at[None, :] * x_k
        x_block = tl.load(x_at, mask=(rows[:, None] < n) & (at[None, :] < k), other=0.0)
        total = tl.dot(w_block.to(DOT), x_block.to(DOT), total, input_precision=PRECISION)
    total *= tl.load(scale + client * scale_c).to(tl.float32)
    out_at = out + client * out_c + ranks[:, None] * out_r + at[None, :] * out_k
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(ranks[:, None] < r) & (at[None, :] < k))


def _padded(rank: int) -> int:
    """Tensor cores multiply at least 16 by 16."""
    return max(16, int(triton.next_power_of_2(rank)))


def _span(m: int, programs: int, device: torch.device) -> int:
    """Out-features per program: all of them, so that x is read once, unless that leaves a GPU's processors idle."""
    if device.type != "cuda":
        return m or 1
    wanted = PROGRAMS_PER_CORE * torch.cuda.get_device_properties(device).multi_processor_count
    parts = max(1, min(triton.cdiv(wanted, programs), triton.cdiv(m, BLOCK_COLUMNS)))
    return BLOCK_COLUMNS * triton.cdiv(triton.cdiv(m, parts), BLOCK_COLUMNS) or 1


def _precision() -> str:
    """What torch's own float32 products may be, said in the old way or the new one."""
    own = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = own == "tf32" if own is not None else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _dot_type(x: Tensor) -> Any:
    """What products multiply: the rows' type. Triton's interpreter has none for bfloat16 (it multiplies the bits as
    integers), so there the same rounded numbers are multiplied as float32, as tensor cores do."""
    if x.dtype == torch.bfloat16:
        return tl.float32 if x.device.type == "cpu" else tl.bfloat16
    return tl.float16 if x.dtype == torch.float16 else tl.float32


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
