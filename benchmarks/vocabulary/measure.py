"""Loss and gradient through an output head, once, in a process of its own: prints a line of JSON.

python -m benchmarks.vocabulary.measure VOCABULARY WAY
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from benchmarks.preparation.measure import memory

from fedloom.ops.cross_entropy import Head, nll_chunked, nll_plain
from fedloom.ops.host import tune_host

ROWS, HIDDEN = 1024, 256


def hugging_face(hidden_ND: torch.Tensor, labels_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    z_1NV = F.linear(hidden_ND, weight_VD)[None]
    loss: torch.Tensor = ForCausalLMLoss(z_1NV, None, len(weight_VD), shift_labels=labels_N[None])
    return loss


def main(vocabulary: int, way: str) -> None:
    tune_host(1)
    draw = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(vocabulary, HIDDEN, generator=draw) / HIDDEN**0.5
    hidden_ND = torch.randn(ROWS, HIDDEN, generator=draw).requires_grad_()
    labels_N = torch.randint(vocabulary, (ROWS,), generator=draw)
    ways = {
        "chunked": lambda: nll_chunked(hidden_ND, labels_N, Head(weight_VD)).mean(),
        "whole": lambda: nll_plain(hidden_ND, labels_N, Head(weight_VD)).mean(),
        "hf": lambda: hugging_face(hidden_ND, labels_N, weight_VD),
    }
    hugging_face(hidden_ND[:2], labels_N[:2] % 8, weight_VD[:8]).backward()  # what loads on first use has loaded
    del hidden_ND.grad
    before, start = memory("VmRSS"), time.process_time()
    loss = ways[way]()
    loss.backward()
    seconds = time.process_time() - start
    assert hidden_ND.grad is not None
    found = {
        "cpu_seconds": seconds,
        "more_bytes": max(0, memory("VmHWM") - before),
        "loss": float(loss),
        "gradient": float(hidden_ND.grad.norm()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
