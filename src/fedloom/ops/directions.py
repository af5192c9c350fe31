"""Random directions for zeroth-order updates: the same bits on every machine, device and number of threads.

A direction is a vector of standard normal numbers that a 63-bit key stands for. `torch.randn` will not do: its normals
differ in the last bits between processors, and a part of a vector cannot be had without what comes before it. Here
every number comes from its own position alone: a counter is mixed by integer arithmetic (SplitMix64, Steele et al.
2014), which has no rounding, and 16 bits of it pick one of 65,536 levels of the normal distribution (the inverse of its
distribution function at the middle of each of as many equal shares, scaled to variance 1). So z is symmetric, its mean
is 0 and its variance 1, and its largest value is 4.325.

Shape suffixes: S directions, N numbers of each, W 64-bit words (four numbers in each).
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from fedloom.errors import RunError

__all__ = ["LARGEST", "LEVELS", "directions", "levels"]

LEVELS = 1 << 16
LARGEST = 4.33  # no number of a direction is larger
LEVELS_CRC = 0x9A4E1B18  # of the float32 levels: a machine whose logarithm differs would walk in other directions
_PER_WORD = 4
_GOLDEN, _MIX_1, _MIX_2 = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHIFTS = ((30, _MIX_1), (27, _MIX_2), (31, None))


def directions(keys: Sequence[int], start: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """z_SN: numbers `start` to `start + count` of each key's direction."""
    first, last = start // _PER_WORD, -(-(start + count) // _PER_WORD)
    x_SW = torch.tensor(keys, dtype=torch.int64).to(device)[:, None] + _counters(last - first, device)
    x_SW += _wrapped(first * _GOLDEN)
    shifted_SW = torch.empty_like(x_SW)
    for shift, factor in _SHIFTS:
        torch.bitwise_right_shift(x_SW, shift, out=shifted_SW)
        x_SW.bitwise_xor_(shifted_SW.bitwise_and_((1 << (64 - shift)) - 1))  # a logical shift
        if factor is not None:
            x_SW.mul_(factor)
    place = x_SW.view(torch.int16)[:, start - first * _PER_WORD :][:, :count].to(torch.int32).add_(LEVELS // 2)
    return levels(device, dtype).index_select(0, place.flatten()).view(len(keys), count)


@functools.lru_cache(maxsize=8)
def levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The 65,536 values, rising; float32 in any dtype, so that all dtypes have the same directions.

    Raises:
        RunError: this machine computes other values.
    """
    half = [NormalDist().inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS // 2)]
    scale = (sum(value * value for value in half) * 2 / LEVELS) ** -0.5
    low = [value * scale for value in half]
    table = torch.tensor(low + [-value for value in reversed(low)], dtype=torch.float32)
    if zlib.crc32(table.numpy().tobytes()) != LEVELS_CRC or sys.byteorder != "little":
        raise RunError(
            "this machine computes other normal numbers than its fellows would, so its weights would not be theirs",
            code="directions.machine",
        )
    return table.to(dtype).to(device)


@functools.lru_cache(maxsize=8)
def _counters(words: int, device: torch.device) -> Tensor:
    """Multiples of the golden ratio, modulo 2^64."""
    return torch.arange(words, dtype=torch.int64, device=device) * _GOLDEN


def _wrapped(value: int) -> int:
    """Modulo 2^64, as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
