"""How unlike each other clients are: each one's distribution against that of all rows together, the pool.

Two distances, both 0 for the same distribution and 1 for two that have nothing in common:

    js   Jensen-Shannon divergence to base 2: the entropy of the mean of both less the mean of their entropies
    tv   total variation: half the sum of the absolute differences, the share of rows that would have to move

Small clients are unlike the pool by luck alone, so what an even deal of the same sizes would have is given beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedloom.seeds import seed_of

__all__ = ["LENGTH_BINS", "Counted", "distances", "length_counts"]

LENGTH_BINS = 10  # by the pool's own deciles, so that the figures do not depend on the unit
_MOST_CELLS = 20_000_000  # clients x keys of the figures that need the whole table
_DEALS = 200  # of single clients, at least, for the figures of an even deal
_MOST_DEALS = 1000  # and at most

Counts = Mapping[str, int]  # key -> rows of one client


class Counted(NamedTuple):
    """Rows of each client by key: client k has `counts[edges[k] : edges[k + 1]]` rows of those `codes`."""

    edges: NDArray[np.int64]
    codes: NDArray[np.int64]  # from 0 to num_keys - 1, each client's in ascending order
    counts: NDArray[np.int64]
    num_keys: int

    @classmethod
    def of(cls, edges: NDArray[np.int64], keys: NDArray[np.integer]) -> Counted:
        """From the key of each row, client after client; -1 is none."""
        client = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        known = keys >= 0
        names, codes = np.unique(keys[known], return_inverse=True)
        number = max(1, len(names))
        cells, counts = np.unique(client[known] * number + codes, return_counts=True)
        each = np.bincount(cells // number, minlength=len(edges) - 1)
        return cls(np.concatenate([[0], np.cumsum(each)]), cells % number, counts, number)

    @classmethod
    def from_dicts(cls, clients: Sequence[Counts]) -> Counted:
        places: dict[str, int] = {}
        for own in clients:
            for key in own:
                places.setdefault(key, len(places))
        lines = [sorted((places[key], count) for key, count in own.items()) for own in clients]
        edges = np.concatenate([[0], np.cumsum([len(line) for line in lines], dtype=np.int64)])
        flat = np.asarray([pair for line in lines for pair in line], dtype=np.int64).reshape(-1, 2)
        return cls(edges, flat[:, 0], flat[:, 1], max(1, len(places)))


def distances(clients: Sequence[Counts] | Counted) -> dict[str, float | None] | None:
    """Mean and largest distance between a client and the pool, over the clients that have any rows.

    js_mean, js_max, tv_mean, tv_max; `js_pairs`, the mean over all pairs of clients; `js_even` and `tv_even`, the mean
    distance in an even deal of the same sizes. The last three are None for tables too large to work them out. The whole
    is None where there is nothing to compare: no keys, or a single client.
    """
    edges, codes, counts, num_keys = clients if isinstance(clients, Counted) else Counted.from_dicts(clients)
    here = np.flatnonzero(np.diff(edges))
    number = len(here)
    if number < 2:
        return None
    begins = edges[here]
    sizes = np.add.reduceat(counts, begins)
    line = np.repeat(np.arange(number), np.diff(edges)[here])
    pooled = np.bincount(codes, weights=counts, minlength=num_keys)
    p, q = counts / sizes[line], (pooled / pooled.sum())[codes]
    js, tv = _against_pool(p, q, begins)
    found: dict[str, float | None] = {
        "js_mean": _rounded(js.mean()),
        "js_max": _rounded(js.max()),
        "tv_mean": _rounded(tv.mean()),
        "tv_max": _rounded(tv.max()),
        "js_pairs": None,
        "js_even": None,
        "tv_even": None,
    }
    if number * max(number, num_keys) <= _MOST_CELLS:
        if number**2 * num_keys <= 10 * _MOST_CELLS:
            table = np.zeros((number, num_keys))
            table[line, codes] = p
            found["js_pairs"] = _rounded(_mean_of_pairs(table))
        even = _even_deal(pooled.astype(np.int64), sizes.tolist())
        found["js_even"], found["tv_even"] = (_rounded(value) for value in even)
    return found


def length_counts(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Of each row, the tenth of the pool's lengths that it is in."""
    if not len(lengths):
        return np.zeros(0, dtype=np.int64)
    shares = np.arange(1, LENGTH_BINS) / LENGTH_BINS
    return np.searchsorted(np.unique(np.quantile(lengths, shares, method="inverted_cdf")), lengths)


def _against_pool(
    p: NDArray[np.float64], q: NDArray[np.float64], begins: Sequence[int] | NDArray[np.int64] = (0,)
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(js, tv) of each client and the pool; `q` is the pool where the client has rows. Elsewhere p is 0."""
    middle = (p + q) / 2
    elsewhere = np.maximum(0.0, 1.0 - np.add.reduceat(q, begins))
    js = np.add.reduceat(p * np.log2(p / middle) + q * np.log2(q / middle), begins) / 2 + elsewhere / 2
    return js, np.add.reduceat(np.abs(p - q), begins) / 2 + elsewhere / 2


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
            found.append([float(value[0]) for value in _against_pool(drawn[there] / size, pool[there])])
    js, tv = np.mean(found, axis=0)
    return float(js), float(tv)


def _rounded(value: float) -> float:
    return round(min(1.0, max(0.0, float(value))), 6)
