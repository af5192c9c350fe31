"""Sizes that products are made of: few, not much larger than asked, and only where few shapes pay."""

from __future__ import annotations

import pytest
import torch

from fedloom.ops.shapes import rounded

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_sizes_with_little_padding(dtype):
    sizes = [rounded(size, CPU, dtype) for size in range(1, 4097)]
    assert all(size <= got for size, got in enumerate(sizes, 1))
    assert max((got - size) / size for size, got in enumerate(sizes, 1) if size > 64) < 1 / 8
    assert len(set(sizes[512:1024])) == 8
    assert len(set(sizes)) < 64
    assert [rounded(got, CPU, dtype) for got in sizes] == sizes
    assert sizes == sorted(sizes)
    assert rounded(0, CPU, dtype) == 0
    assert rounded(1, CPU, dtype) == 1  # a token at a time


def test_nothing_is_added_where_shapes_cost_nothing():
    for dtype, device in [(torch.float32, CPU), (torch.float64, CPU), (torch.bfloat16, torch.device("meta"))]:
        assert [rounded(size, device, dtype) for size in (3, 77, 1001)] == [3, 77, 1001]
