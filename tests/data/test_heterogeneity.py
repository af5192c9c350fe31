"""Distances between clients: known values, bounds, and what an even deal has."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.toys import Data, Split, alpaca_rows, tokenizer, write

from fedloom.data import heterogeneity, prepare
from fedloom.data.heterogeneity import Counted, distances, length_counts

COUNTS = st.lists(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 20), min_size=1), min_size=2, max_size=5)


def plainly(clients: list[dict[str, int]]) -> dict[str, float]:
    """By the definitions, over all keys."""
    keys = sorted({key for own in clients for key in own})
    rows = [[own.get(key, 0) / sum(own.values()) for key in keys] for own in clients]
    total = sum(sum(own.values()) for own in clients)
    pool = [sum(own.get(key, 0) for own in clients) / total for key in keys]

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log2(x) for x in p if x > 0)

    def js(p: list[float], q: list[float]) -> float:
        return entropy([(x + y) / 2 for x, y in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2

    one = [js(row, pool) for row in rows]
    other = [sum(abs(x - y) for x, y in zip(row, pool, strict=True)) / 2 for row in rows]
    pairs = [js(rows[i], rows[j]) for i in range(len(rows)) for j in range(i)]
    return {
        "js_mean": sum(one) / len(one),
        "js_max": max(one),
        "tv_mean": sum(other) / len(other),
        "tv_max": max(other),
        "js_pairs": sum(pairs) / len(pairs),
    }


@given(COUNTS)
def test_they_are_what_the_definitions_say(clients: list[dict[str, int]]) -> None:
    found = distances(clients)
    assert found is not None
    for name, value in plainly(clients).items():
        assert found[name] == pytest.approx(value, abs=2e-6)
    assert all(value is not None and 0 <= value <= 1 for value in found.values())


def test_known_values() -> None:
    apart = distances([{"a": 5}, {"b": 5}])
    # p = (1, 0), q = (1/2, 1/2): H(3/4, 1/4) - H(1/2, 1/2) / 2
    assert apart is not None and apart["js_mean"] == pytest.approx(0.311278, abs=1e-6)
    assert apart["tv_mean"] == apart["tv_max"] == 0.5 and apart["js_pairs"] == 1.0
    many = distances([{str(i): 7} for i in range(500)])
    assert many is not None and many["tv_mean"] == pytest.approx(1 - 1 / 500) and many["js_pairs"] == 1.0
    same = distances([{"a": 300, "b": 100}, {"a": 30, "b": 10}, {}])
    assert same is not None and (same["js_max"], same["tv_max"], same["js_pairs"]) == (0, 0, 0)
    assert distances([{"a": 3}]) is None and distances([{}, {}]) is None


def test_an_even_deal_is_as_unlike_as_its_sizes_make_it() -> None:
    rng = np.random.default_rng(0)
    for size, clients in ((10, 40), (1000, 40)):
        dealt = rng.permutation(np.arange(size * clients) % 4).reshape(clients, size)
        found = distances([{str(key): count for key, count in Counter(own.tolist()).items()} for own in dealt])
        assert found is not None and found["js_even"] is not None
        assert found["js_mean"] == pytest.approx(found["js_even"], rel=0.3)
    assert found["js_even"] < 0.001


def test_a_table_too_large_is_left_out_and_the_rest_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [{"a": 3, "b": 1}, {"b": 2}, {"c": 9, "a": 1}]
    whole = distances(clients)
    monkeypatch.setattr(heterogeneity, "_MOST_CELLS", 1)
    part = distances(clients)
    assert whole is not None and part == {**whole, "js_pairs": None, "js_even": None, "tv_even": None}
    monkeypatch.undo()
    monkeypatch.setattr(heterogeneity, "_MOST_DEALS", 2)
    fewer = distances(clients)
    assert fewer is not None and fewer["js_even"] == pytest.approx(whole["js_even"], abs=0.2)


def test_lengths_are_counted_in_the_pools_tenths() -> None:
    lengths = np.arange(100)
    found = length_counts(lengths)
    assert np.bincount(found).tolist() == [10] * 10 and np.all(np.diff(found) >= 0)
    # Whatever the unit: the same as of any growing function of the lengths.
    assert length_counts(lengths * lengths * 7 + 3).tolist() == found.tolist()
    assert len(set(length_counts(np.full(7, 3)).tolist())) == 1 and not len(length_counts(np.zeros(0, dtype=np.int64)))


@given(st.lists(st.lists(st.integers(-1, 4), max_size=8), min_size=2, max_size=6))
def test_counts_of_rows_are_those_of_dictionaries(clients: list[list[int]]) -> None:
    edges = np.concatenate([[0], np.cumsum([len(own) for own in clients])])
    flat = np.asarray([key for own in clients for key in own], dtype=np.int64)
    named = [{str(key): count for key, count in Counter(own).items() if key >= 0} for own in clients]
    found, wanted = distances(Counted.of(edges, flat)), distances(named)
    assert (found is None) == (wanted is None)
    for name in ("js_mean", "js_max", "tv_mean", "tv_max", "js_pairs") if found and wanted else ():
        assert found[name] == pytest.approx(wanted[name], abs=2e-6)


def test_the_report_has_them(tmp_path: Path) -> None:
    plain = tokenizer()
    path = write(tmp_path / "d.jsonl", alpaca_rows(120, ["red", "green", "blue"]))
    apart = prepare(Data(path), Split("by_category", None), plain, 0).report.to_json()
    dealt = prepare(Data(path), Split("iid", 3), plain, 0).report.to_json()
    assert apart["heterogeneity"]["category"]["tv_mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert dealt["heterogeneity"]["category"]["tv_mean"] < 0.2
    assert 0 <= dealt["heterogeneity"]["length"]["js_mean"] < 0.2
    line = dealt["clients"][0]["lengths"]
    assert list(line) == ["p10", "p25", "p50", "p75", "p90"] and sorted(line.values()) == list(line.values())
    bare = write(tmp_path / "bare.jsonl", alpaca_rows(60))
    assert prepare(Data(bare), Split("iid", 3), plain, 0).report.heterogeneity["category"] is None
