"""Drawing the next token, from numbers that are drawn elsewhere.

Shape suffixes: N rows, V vocabulary, K tokens that may be drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.evaluate.sampling import Sampling

__all__ = ["drawn"]


def drawn(scores_NV: Tensor, sampling: Sampling, u_N: Tensor) -> Tensor:
    """The token of each row at which the sum of probabilities, the likeliest first, passes u of [0, 1).

    Temperature, top-k and top-p in this order, as in Hugging Face's `generate`: top-p keeps the fewest likeliest tokens
    whose probabilities sum up to at least p.
    """
    size = scores_NV.shape[1]
    k = min(sampling.top_k or size, size)
    z_NK, token_NK = scores_NV.topk(k) if k < size else scores_NV.sort(dim=1, descending=True, stable=True)
    z_NK, token_NK = z_NK.cpu().double() / sampling.temperature, token_NK.cpu()
    share_NK = z_NK.softmax(1)
    before_NK = share_NK.cumsum(1) - share_NK
    share_NK = share_NK.masked_fill(before_NK >= sampling.top_p, 0.0)
    share_NK[:, 0] = share_NK[:, 0].clamp(min=torch.finfo(torch.float64).tiny)  # never no token at all
    passed_NK = share_NK.cumsum(1) <= u_N[:, None] * share_NK.sum(1, keepdim=True)
    last_N = (share_NK > 0).sum(1) - 1
    return token_NK.gather(1, torch.minimum(passed_NK.sum(1), last_N)[:, None])[:, 0]
