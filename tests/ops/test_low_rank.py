"""Factors stand for the products they should."""

import torch

from fedloom.ops.low_rank import beside, pad_like, slimmed, svd_of_product


def factors(s: int, d: int = 7, o: int = 5, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(s, d, generator=draw, dtype=torch.float64)
    return a, torch.randn(o, s, generator=draw, dtype=torch.float64)


def test_beside_is_a_sum_of_products():
    (a1, b1), (a2, b2) = factors(2), factors(3, seed=1)
    both = beside({"x.merge_A": a1, "x.merge_B": b1}, {"x.merge_A": a2, "x.merge_B": b2, "y.merge_A": a1})
    assert torch.allclose(both["x.merge_B"] @ both["x.merge_A"], b1 @ a1 + b2 @ a2)
    assert both["y.merge_A"] is a1


def test_slimmed_keeps_the_product_and_stops_growing():
    for d, o in ((7, 5), (5, 7)):
        a, b = factors(12, d, o)
        slim = slimmed({"x.merge_A": a, "x.merge_B": b})
        assert torch.allclose(slim["x.merge_B"] @ slim["x.merge_A"], b @ a)
        assert len(slim["x.merge_A"]) == 5
        few_a, few_b = factors(5, d, o)
        kept = slimmed({"x.merge_A": few_a, "x.merge_B": few_b})
        assert kept["x.merge_A"] is few_a


def test_svd_of_a_product_is_the_best_of_its_rank_and_zero_beyond():
    for s in (1, 3, 9):
        a, b = factors(s)
        for rank in (1, 2, 8):
            got_a, got_b = svd_of_product(b, a, rank)
            assert got_a.shape == (rank, 7)
            assert got_b.shape == (5, rank)
            u, values, vh = torch.linalg.svd(b @ a)
            r = min(rank, 5)
            assert torch.allclose(got_b @ got_a, (u[:, :r] * values[:r]) @ vh[:r], atol=1e-10)
    a, b = factors(1)
    twice = svd_of_product(torch.cat([b, b], 1), torch.cat([a, a]), 4)
    assert [float(leaf.abs().max()) for leaf in (twice[0][1:], twice[1][:, 1:])] == [0, 0]


def test_pad_like():
    leaf = torch.ones(2, 3)
    assert pad_like(leaf, torch.zeros(2, 3)) is leaf
    assert pad_like(leaf, torch.zeros(4, 3)).sum() == 6
