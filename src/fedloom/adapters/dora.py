"""DoRA (Liu et al. 2024) with a cohort axis: y = m / n * (W + scale * B A) x + b, with n the norms of W + scale * B A.

W + scale * B A gives the direction and m, trained, the magnitude of each row (Eq. 5). The gradient takes n for a
constant (Section 4.3). m begins as the norms of W, so before training the model is as it was. A client sends the
changes of its A, B and m.

Shape suffixes: C clients, N examples times tokens, D in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.frame import adapter_dtype
from fedloom.adapters.lora import Bias, Bound, Lora, Variant
from fedloom.adapters.targets import find_targets
from fedloom.errors import UserError
from fedloom.ops.ranks import Ranks
from fedloom.types import NOTHING

MAGNITUDE = "lora_magnitude_vector"  # [O], PEFT's name in its files, too


def dora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "auto",
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] = NOTHING,
    alpha_pattern: Mapping[str, float] = NOTHING,
    bias: Bias = "none",
    base_name: str = "",
) -> Lora:
    """LoRA of the weights' direction, and a trained magnitude per output of each layer; arguments as of `lora`.

    Raises:
        UserError: as `lora`, or a layer's weight is quantised: its norms are needed.
    """
    sites = find_targets(model, targets)
    packed = [name for name, layer in sites.items() if not _weight(layer).is_floating_point()]
    if packed:
        raise UserError(
            f"dora needs the norms of the weights, and {packed[0]} is quantised",
            "adapter.kind: lora, or a base in bfloat16",
            "adapter.dora",
        )
    return Lora(
        model, Ranks(rank, alpha, use_rslora, rank_pattern, alpha_pattern), dropout, sites, bias, base_name, DORA
    )


def square_norms(layer: nn.Module) -> Tensor:
    """Squared norms [O] of the rows of W."""
    weight = _weight(layer)
    dim = 0 if isinstance(layer, Conv1D) else 1
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=dim, dtype=adapter_dtype(weight))
    return norms.square()


@torch.no_grad()
def tuned_norms(bound: Bound) -> Tensor:
    """Norms [C, O] of the rows of W + s B A, without forming it: |w|^2 + 2 s b (A w) + s^2 b (A A') b'."""
    a_CRD, b_COR = bound.A_CRD, bound.B_COR * bound.scale_C.view(-1, 1, 1)
    weight = _weight(bound.layer)
    w_DO = weight if isinstance(bound.layer, Conv1D) else weight.T
    aw_CRO = (a_CRD.to(weight.dtype) @ w_DO).to(b_COR.dtype)
    square_CO = square_norms(bound.layer) + (b_COR * (2 * aw_CRO.mT + b_COR @ (a_CRD @ a_CRD.mT))).sum(2)
    return square_CO.clamp(min=0).sqrt()


def cohort_dora(x: Tensor, y: Tensor, bound: Bound) -> Tensor:
    """m / n * (W x + s B A x) + b, given y = W x + b; with dropout, both products see what is left of x."""
    c = bound.A_CRD.shape[0]
    x_CND, y_CNO = x.reshape(c, -1, x.shape[-1]), y.reshape(c, -1, y.shape[-1])
    m_CO, n_CO = bound.more[MAGNITUDE], tuned_norms(bound)
    gain_C1O = (m_CO / n_CO.masked_fill(n_CO == 0, 1.0))[:, None]  # a row of zeros has no direction and stays one
    layer: Any = bound.layer
    bias = layer.bias
    if bound.drop is not None:
        x_CND = bound.drop(x_CND)
        plain_CNO = layer.forward(x_CND)  # past the hooks
        plain_CNO = plain_CNO if bias is None else plain_CNO - bias
    else:
        plain_CNO = y_CNO if bias is None else y_CNO - bias
    a_CRD, b_COR = bound.A_CRD.to(x.dtype), (bound.B_COR * bound.scale_C.view(-1, 1, 1)).to(x.dtype)
    ba_CNO = torch.bmm(torch.bmm(x_CND, a_CRD.mT), b_COR.mT)
    out_CNO: Tensor = y_CNO + (gain_C1O - 1).to(y.dtype) * plain_CNO + gain_C1O.to(y.dtype) * ba_CNO
    return out_CNO.view_as(y)


def _merged(w_OD: Tensor, ba_OD: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    whole_OD = w_OD + ba_OD
    n_O1 = whole_OD.norm(dim=1, keepdim=True)
    gain_O1: Tensor = leaves[MAGNITUDE].double()[:, None] / n_O1.masked_fill(n_O1 == 0, 1.0)
    return gain_O1 * whole_OD


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


DORA = Variant(
    "dora",
    cohort_dora,
    (MAGNITUDE,),
    lambda layer: {MAGNITUDE: square_norms(layer).sqrt()},
    _merged,
    {"use_dora": True},
    merges=False,
)
