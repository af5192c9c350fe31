"""Directions: the same numbers wherever they are made, and standard normal."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from fedloom.errors import RunError
from fedloom.ops import directions as module
from fedloom.ops.directions import LARGEST, LEVELS, directions, levels

CPU = torch.device("cpu")


def splitmix(state: int) -> int:
    """Steele et al. 2014, as published: with unbounded integers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def plain(key: int, position: int) -> float:
    word = splitmix(key + (position // 4) * 0x9E3779B97F4A7C15)
    bits = (word >> (16 * (position % 4))) & 0xFFFF
    signed = bits - 0x10000 if bits >= 0x8000 else bits
    return float(levels(CPU, torch.float32)[signed + LEVELS // 2])


@pytest.mark.parametrize("key", [0, 7, (1 << 63) - 1])
def test_numbers_are_those_of_the_published_mixer(key: int) -> None:
    got = directions([key], 5, 9, CPU, torch.float32)[0]
    assert got.tolist() == [plain(key, position) for position in range(5, 14)]
    far = (1 << 40) + 3
    assert directions([key], far, 2, CPU, torch.float32)[0].tolist() == [plain(key, far), plain(key, far + 1)]


def test_a_part_is_the_part_of_the_whole_and_every_machine_draws_the_same() -> None:
    whole = directions([11, 12], 0, 1000, CPU, torch.float32)
    for start, count in ((0, 1000), (3, 500), (4, 1), (999, 1), (123, 456)):
        assert torch.equal(directions([11, 12], start, count, CPU, torch.float32), whole[:, start : start + count])
    assert torch.equal(directions([12], 0, 1000, CPU, torch.float64)[0].float(), whole[1])
    assert zlib.crc32(whole.numpy().tobytes()) == 0xA4629F5B, "other numbers than those of the machines so far"


def test_levels_are_standard_normal_and_a_machine_with_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = levels(CPU, torch.float64)
    assert len(table) == LEVELS
    assert torch.equal(table, -table.flip(0))
    assert bool((table[1:] > table[:-1]).all())
    assert float((table**2).mean()) == pytest.approx(1.0, abs=1e-7)
    assert float((table**4).mean()) == pytest.approx(3.0, abs=2e-3)
    assert float(table.max()) < LARGEST
    below = torch.special.ndtr(table)  # the distribution function at each level is its share of the numbers
    assert float((below - (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS).abs().max()) < 1e-5
    monkeypatch.setattr(module, "LEVELS_CRC", 1)
    levels.cache_clear()
    with pytest.raises(RunError, match="computes other normal numbers"):
        directions([1], 0, 4, CPU, torch.float32)


def test_directions_are_unlike_one_another() -> None:
    """Moments and correlations of 8 x 2^17 numbers, each within 5 standard errors: independent normal numbers fail one
    of these 47 with a chance of less than 3e-5. The keys are fixed, so it is the same each time."""
    n = 1 << 17
    z = directions(list(range(8)), 0, n, CPU, torch.float64)  # neighbouring keys, the hardest case
    error = 5 / math.sqrt(n)
    assert float(z.mean(1).abs().max()) < error
    assert float((z.square().mean(1) - 1).abs().max()) < error * math.sqrt(2)
    products = z @ z.T / n
    assert float((products - torch.diag(products.diag())).abs().max()) < error
    for lag in (1, 4, 1 << 10):
        assert abs(float((z[0, lag:] * z[0, :-lag]).mean())) < error
