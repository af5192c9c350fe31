"""The product of LoRA with a cohort axis: y + scale * B A x, one A, B and scale per client.

`plain` is the reference, in torch's own batched products, and what every device can do. `fused` is Triton's, for CUDA
GPUs (`ops/cohort_lora_triton.py`): one kernel forward and three backward where `plain` starts about fifteen, nothing
but y + scale * B A x written. It is used where it is asked for.

Shape suffixes: C clients, N rows per client (examples x tokens), D in-features, O out-features, R rank.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MAX_RANK", "Product", "fused", "plain", "why_not_fused"]

MAX_RANK = 128  # a block of rows times the rank lies in registers

Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(x_CND: Tensor, y_CNO: Tensor, a_CRD: Tensor, b_COR: Tensor, scale_C: Tensor) -> Tensor:
    """y + scale * (x A^T) B^T [C, N, O]. Factors are cast to the rows' type; their gradients come back in their own."""
    a_CRD, b_COR = a_CRD.to(x_CND.dtype), (b_COR * scale_C.view(-1, 1, 1)).to(x_CND.dtype)
    if len(x_CND) == 1:
        return torch.addmm(y_CNO[0], x_CND[0] @ a_CRD[0].T, b_COR[0].T).unsqueeze(0)
    return torch.baddbmm(y_CNO, torch.bmm(x_CND, a_CRD.mT), b_COR.mT)


def fused(x_CND: Tensor, y_CNO: Tensor, a_CRD: Tensor, b_COR: Tensor, scale_C: Tensor) -> Tensor:
    """The same by Triton's kernels; sums are in float32, so half-precision results round once where `plain` does twice.

    What they are not made for (float64, a rank above `MAX_RANK`) goes to `plain`: a choice by shape and type alone.
    """
    if a_CRD.shape[1] > MAX_RANK or x_CND.dtype == torch.float64 or not x_CND.numel():
        return plain(x_CND, y_CNO, a_CRD, b_COR, scale_C)
    from fedloom.ops import cohort_lora_triton

    return cohort_lora_triton.cohort_lora(x_CND, y_CNO, a_CRD, b_COR, scale_C)


def why_not_fused(device: torch.device | str) -> str | None:
    """Why Triton's kernels cannot run on this device, as the end of a sentence; None where they can.

    With TRITON_INTERPRET=1 in the environment Triton's interpreter runs them on a CPU, slowly: that is for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (PyTorch's builds for CUDA on Linux bring it along)"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if torch.device(device).type != "cuda" and not interpreted:
        return f"Triton needs a GPU, and the model is on {torch.device(device).type}"
    return None
