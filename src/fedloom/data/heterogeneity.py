"""How unlike each other clients are: each one's distribution against that of all rows together, the pool.

Two distances, both 0 for the same distribution and 1 for two that have nothing in common:

    js   Jensen-Shannon divergence to base 2: the entropy of the mean of both less the mean of their entropies
    tv   total variation: half the sum of the absolute differences, the share of rows that would have to move

Small clients are unlike the pool by luck alone, so what an even deal of the same sizes would have is given beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedloom.seeds import seed_of

__all__ = ["LENGTH_BINS", "distances", "length_counts"]

LENGTH_BINS = 10  # by the pool's own deciles, so that the figures do not depend on the unit
_MOST_CELLS = 20_000_000  # clients x keys of the figures that need the whole table
_DEALS = 200  # of single clients, at least, for the figures of an even deal
_MOST_DEALS = 1000  # and at most

Counts = Mapping[str, int]  # key -> rows of one client


def distances(clients: Sequence[Counts]) -> dict[str, float | None] | None:
    """Mean and largest distance between a client and the pool, over the clients that have any rows.

    js_mean, js_max, tv_mean, tv_max; `js_pairs`, the mean over all pairs of clients; `js_even` and `tv_even`, the mean
    distance in an even deal of the same sizes. The last three are None for tables too large to work them out. The whole
    is None where there is nothing to compare: no keys, or a single client.
    """
    held = [own for own in clients if own]
    if len(held) < 2:
        return None
    codes: dict[str, int] = {}
    rows = [np.asarray([codes.setdefault(key, len(codes)) for key in own], dtype=np.int64) for own in held]
    counts = [np.asarray(list(own.values()), dtype=np.float64) for own in held]
    pooled = np.zeros(len(codes))
    for places, own in zip(rows, counts, strict=True):
        pooled[places] += own
    pool = pooled / pooled.sum()
    pairs = [_against_pool(own / own.sum(), pool[places]) for places, own in zip(rows, counts, strict=True)]
    js, tv = (np.asarray(values) for values in zip(*pairs, strict=True))
    found: dict[str, float | None] = {
        "js_mean": _rounded(js.mean()),
        "js_max": _rounded(js.max()),
        "tv_mean": _rounded(tv.mean()),
        "tv_max": _rounded(tv.max()),
        "js_pairs": None,
        "js_even": None,
        "tv_even": None,
    }
    if len(held) * max(len(held), len(codes)) <= _MOST_CELLS:
        table = np.zeros((len(held), len(codes)))
        for line, places, own in zip(table, rows, counts, strict=True):
            line[places] = own / own.sum()
        if len(held) ** 2 * len(codes) <= 10 * _MOST_CELLS:
            found["js_pairs"] = _rounded(_mean_of_pairs(table))
        even = _even_deal(pooled.astype(np.int64), [int(own.sum()) for own in counts])
        found["js_even"], found["tv_even"] = (_rounded(value) for value in even)
    return found


def length_counts(lengths: Sequence[NDArray[np.integer]]) -> list[dict[str, int]]:
    """Rows of each client by the tenth of the pool's lengths that they are in."""
    pooled = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    if not len(pooled):
        return [{} for _ in lengths]
    shares = np.arange(1, LENGTH_BINS) / LENGTH_BINS
    edges = np.unique(np.quantile(pooled, shares, method="inverted_cdf"))
    found = []
    for own in lengths:
        sizes = np.bincount(np.searchsorted(edges, own), minlength=len(edges) + 1)
        found.append({str(place): int(size) for place, size in enumerate(sizes) if size})
    return found


def _against_pool(p: NDArray[np.float64], q: NDArray[np.float64]) -> tuple[float, float]:
    """(js, tv) of a client and the pool; `q` is the pool where the client has rows. Elsewhere p is 0."""
    middle = (p + q) / 2
    elsewhere = max(0.0, 1.0 - float(q.sum()))
    js = float((p * np.log2(p / middle) + q * np.log2(q / middle)).sum()) / 2 + elsewhere / 2
    return js, float(np.abs(p - q).sum()) / 2 + elsewhere / 2


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """In bits, of the last axis."""
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(-(p * logs).sum(axis=-1))


def _mean_of_pairs(table: NDArray[np.float64]) -> float:
    entropies = _entropy(table)
    total = 0.0
    for place in range(len(table) - 1):
        others = table[place + 1 :]
        total += float((_entropy((table[place] + others) / 2) - (entropies[place] + entropies[place + 1 :]) / 2).sum())
    return total / (len(table) * (len(table) - 1) / 2)


def _even_deal(pooled: NDArray[np.int64], sizes: Sequence[int]) -> tuple[float, float]:
    """Mean (js, tv) of clients of these sizes whose rows are drawn from the pool at random, without putting back."""
    rng = np.random.Generator(np.random.PCG64(seed_of(0, 0, "", "heterogeneity")))
    if len(sizes) > _MOST_DEALS:  # as many of them, evenly from small to large
        sizes = np.quantile(sizes, np.linspace(0, 1, _MOST_DEALS), method="nearest").tolist()
    times = max(1, -(-_DEALS // len(sizes)))
    pool = pooled / pooled.sum()
    found = []
    for size in sizes:
        for drawn in rng.multivariate_hypergeometric(pooled, size, size=times, method="marginals"):
            there = np.flatnonzero(drawn)
            found.append(_against_pool(drawn[there] / size, pool[there]))
    js, tv = np.mean(found, axis=0)
    return float(js), float(tv)


def _rounded(value: float) -> float:
    return round(min(1.0, max(0.0, float(value))), 6)
