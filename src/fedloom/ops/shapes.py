"""Few shapes for products in half precision on a CPU.

oneDNN makes code for each new shape of a matrix product in bfloat16 or float16: several milliseconds, ten times what
the product itself takes, and a megabyte. Batches of text have another length at every step, so sizes are rounded up to
one of few. Products in float32 go another way and cost the same at any shape; on a GPU nothing is made anew either.
"""

from __future__ import annotations

import torch

__all__ = ["HALF", "makes_code", "rounded"]

HALF = (torch.bfloat16, torch.float16)
PER_OCTAVE = 8  # sizes between a power of two and the next: at most an eighth is padding, 4 % on average
LEAST_STEP = 8


def makes_code(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of a new shape costs more there than one of a shape that was there before."""
    return device.type == "cpu" and dtype in HALF


def rounded(size: int, device: torch.device, dtype: torch.dtype) -> int:
    """The size to make of `size` positions: one of few, where few shapes pay."""
    if size <= 1 or not makes_code(device, dtype):
        return size
    step = max(LEAST_STEP, (1 << (size - 1).bit_length()) // (2 * PER_OCTAVE))
    return -(-size // step) * step
