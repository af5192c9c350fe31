"""Splitters: everybody's rows are somebody's, shares come from a client's own rows, and bad numbers are errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data import plain

from fedloom.data import split
from fedloom.data.rows import Row
from fedloom.errors import UserError

SEEDS = st.integers(0, 2**31)


def rows_of(categories: list[Any], **columns: list[Any]) -> list[Row]:
    return [
        {
            "kind": "completion",
            "text": str(i),
            **({"category": category} if category is not None else {}),
            "columns": {name: values[i] for name, values in columns.items()},
        }
        for i, category in enumerate(categories)
    ]


def lists(groups: Any) -> dict[str, list[int]]:
    """Groups, or (groups, number), with plain lists, to compare."""
    groups = groups[0] if isinstance(groups, tuple) else groups
    return {name: members.tolist() for name, members in groups.items()}


def partitions(groups: Any, total: int) -> bool:
    return sorted(row for members in groups.values() for row in members) == list(range(total))


@given(st.integers(1, 200), st.integers(1, 20), SEEDS)
def test_iid_deals_every_row_once_and_evenly(total: int, clients: int, seed: int) -> None:
    if clients > total:
        with pytest.raises(UserError, match=f"at most {total}"):
            split.iid(total, clients, seed)
        return
    groups = split.iid(total, clients, seed)
    sizes = [len(members) for members in groups.values()]
    assert partitions(groups, total) and max(sizes) - min(sizes) <= 1 and len(groups) == clients
    assert lists(groups) == lists(split.iid(total, clients, seed))


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=60), st.integers(1, 4), SEEDS)
def test_arrays_deal_as_lists_do(keys: list[str], clients: int, seed: int) -> None:
    assert list(lists(split.iid(len(keys), clients, seed)).values()) == plain.iid(len(keys), clients, seed)
    dealt = split.dirichlet(keys, clients, 0.7, seed, attempt=3)
    assert list(lists(dealt).values()) == plain.dirichlet(keys, clients, 0.7, seed, attempt=3)


def test_another_seed_deals_otherwise() -> None:
    assert lists(split.iid(100, 4, 1)) != lists(split.iid(100, 4, 2))
    keys = ["a", "b"] * 50
    assert lists(split.dirichlet(keys, 4, 0.5, 1)) != lists(split.dirichlet(keys, 4, 0.5, 2))
    assert lists(split.dirichlet(keys, 4, 0.5, 1)) != lists(split.dirichlet(keys, 4, 0.5, 1, attempt=1))
    assert lists(split.deal(100, ["a", "b"], 1)) != lists(split.deal(100, ["a", "b"], 2))


@given(
    st.lists(st.sampled_from("abc"), min_size=5, max_size=100), st.integers(1, 5), st.sampled_from([1e-6, 0.1, 1, 1e6])
)
def test_dirichlet_deals_every_row_once(keys: list[str], clients: int, alpha: float) -> None:
    groups = split.dirichlet(keys, clients, alpha, 0)
    assert partitions(groups, len(keys)) and len(groups) == clients


def test_alpha_is_what_it_says() -> None:
    """Large alpha: every client has nearly the overall mix. Small alpha: most of a category is with one client."""
    keys = list("abcd") * 500

    def largest_share(alpha: float) -> float:
        groups = split.dirichlet(keys, 5, alpha, 0)
        shares = []
        for key in "abcd":
            held = [sum(keys[row] == key for row in members) for members in groups.values()]
            shares.append(max(held) / sum(held))
        return sum(shares) / len(shares)

    assert largest_share(1e5) < 0.22 and largest_share(0.05) > 0.8


def test_by_category_is_one_category_per_client_under_its_name() -> None:
    rows = rows_of(["x", "y", "z", "x"])
    assert lists(split.by_category(rows, None)) == {"x": [0, 3], "y": [1], "z": [2]}
    assert lists(split.by_category(rows, 3)) == lists(split.by_category(rows, None))
    assert split.by_category(rows, None).left_out == {}


def test_further_categories_are_dealt_round_robin() -> None:
    groups, _ = split.by_category(rows_of([*"a", *"bb", *"ccc", *"dddd"]), 2)
    assert lists(groups) == {"c00": [1, 2, 6, 7, 8, 9], "c01": [0, 3, 4, 5]}, "the largest first: d and b, c and a"
    groups, _ = split.by_category(rows_of([*"aaa", *"bb", *"c"]), 2)
    assert lists(groups) == {"c00": [0, 1, 2, 5], "b": [3, 4]}


def test_a_key_that_looks_like_a_made_name_keeps_it_and_nobody_else_has_it() -> None:
    users = ["x", "x", "x", "c00", "c00", "y"]
    groups, _ = split.by_column(rows_of([None] * 6, user=users), "user", 2)
    assert lists(groups) == {"c01": [0, 1, 2, 5], "c00": [3, 4]}
    users = [*"aaabbb", "c00", "c01", "c02", "c03"]
    groups, _ = split.by_column(rows_of([None] * 10, user=users), "user", 4)
    assert len(set(groups)) == 4 and partitions(groups, 10), list(groups)


def test_more_clients_than_categories_is_an_error_with_the_numbers() -> None:
    with pytest.raises(
        UserError, match=r"split.clients 5, but the data has 2 categories \(a, b\): at most 2"
    ) as caught:
        split.by_category(rows_of(["a", "b", "a"]), 5)
    assert caught.value.code == "split.clients" and "split.clients=2" in caught.value.hint
    with pytest.raises(UserError, match="2 values of column 'user'"):
        split.by_column(rows_of([None] * 3, user=[1, 2, 1]), "user", 3)


def test_rows_without_a_category_belong_to_nobody_and_are_counted() -> None:
    by_category = split.by_category(rows_of(["a", None, "b"]), None)
    assert lists(by_category) == {"a": [0], "b": [2]} and by_category.left_out == {"no category": 1}
    by_column = split.by_column(rows_of([None] * 3, user=["u", None, " "]), "user", None)
    assert lists(by_column) == {"u": [0]} and by_column.left_out == {"no user": 2}


@given(st.lists(st.sampled_from("abcde"), min_size=12, max_size=80), st.integers(1, 4), st.integers(1, 3), SEEDS)
def test_shards_are_equal_runs_of_sorted_rows(keys: list[str], clients: int, each: int, seed: int) -> None:
    groups = split.shards(keys, clients, each, seed)
    assert partitions(groups, len(keys)) and lists(groups) == lists(split.shards(keys, clients, each, seed))
    small, large = len(keys) // (clients * each), -(-len(keys) // (clients * each))
    sizes = [len(members) for members in groups.values()]
    assert all(each * small <= size <= each * large for size in sizes)
    # A shard is a run of the sorted rows, so all of them together change key at most this often.
    held = sum(len({keys[row] for row in members}) for members in groups.values())
    assert held <= len(set(keys)) + clients * each - 1


def test_two_shards_each_give_most_clients_two_keys() -> None:
    keys = [str(i % 10) for i in range(1000)]
    groups = split.shards(keys, 10, 2, 3)
    assert {len(members) for members in groups.values()} == {100}
    assert all(1 <= len({keys[row] for row in members}) <= 2 for members in groups.values())
    assert lists(groups) != lists(split.shards(keys, 10, 2, 4))
    with pytest.raises(
        UserError, match=r"600 x split.shards_per_client 2 = 1,200 shards, but there are 1,000"
    ) as caught:
        split.shards(keys, 600, 2, 3)
    assert "at most 500 clients" in caught.value.hint


def test_quantity_skew_skews_sizes_and_nothing_else() -> None:
    even, skewed = (
        [len(members) for members in split.quantity_skew(1000, 5, alpha, 7).values()] for alpha in (1000.0, 0.2)
    )
    assert max(even) < 1.3 * min(even) and max(skewed) > 5 * min(skewed) and sum(skewed) == 1000
    groups = split.quantity_skew(1000, 5, 0.5, 7)
    assert partitions(groups, 1000) and lists(groups) == lists(split.quantity_skew(1000, 5, 0.5, 7))
    assert lists(groups) != lists(split.quantity_skew(1000, 5, 0.5, 7, attempt=1))
    keys = [str(i % 2) for i in range(1000)]
    largest = max(groups.values(), key=len)
    assert 0.4 < sum(keys[row] == "1" for row in largest) / len(largest) < 0.6
    with pytest.raises(UserError, match="must be above 0"):
        split.quantity_skew(10, 2, 0.0, 7)


def test_clients_with_too_few_rows_are_left_out_and_counted() -> None:
    rows = rows_of([*"aaaa", *"bb", *"c", *"ddddd", None])
    found = split.by_category(rows, None, min_rows=4)
    assert sorted(found.groups) == ["a", "d"]
    assert found.left_out == {"no category": 1, "of 2 categories with fewer than split.min_rows 4": 3}
    assert lists(split.by_category(rows, 1, min_rows=4))["c00"] == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    with pytest.raises(UserError, match="none of the 4 categories has as many rows; the largest, d, has 5"):
        split.by_category(rows, None, min_rows=6)
    with pytest.raises(UserError, match="at most 2"):
        split.by_category(rows, 3, min_rows=4)
    by_user = split.by_column(rows_of([None] * 3, user=["u", "u", "v"]), "user", None, min_rows=2)
    assert lists(by_user) == {"u": [0, 1]}
    by_file = split.files([{**row, "file": "xy"[i > 3]} for i, row in enumerate(rows_of([None] * 5))], None, min_rows=2)
    assert lists(by_file) == {"x": [0, 1, 2, 3]} and sum(by_file.left_out.values()) == 1


def test_no_category_names_a_column_that_could_be_one() -> None:
    rows = rows_of([None] * 40, text=[str(i) for i in range(40)], lang=["c", "go"] * 20)
    with pytest.raises(UserError, match="its columns are lang, text") as caught:
        split.by_category(rows, None)
    assert "data.columns.category=lang" in caught.value.hint
    with pytest.raises(UserError, match="did you mean 'lang'"):
        split.by_column(rows, "langs", None)
    assert set(split.by_category(rows, None, "lang")[0]) == {"c", "go"}


def test_columns_that_hold_lists_are_refused() -> None:
    with pytest.raises(UserError, match="lists or objects"):
        split.by_column(rows_of([None], tags=[["a"]]), "tags", None)


def test_files() -> None:
    rows = [{**row, "file": name} for row, name in zip(rows_of([None] * 4), "aabb", strict=True)]
    assert lists(split.files(rows, None)) == {"a": [0, 1], "b": [2, 3]}
    with pytest.raises(UserError, match="single file"):
        split.files(rows_of(["x"]), None)
    with pytest.raises(UserError, match="3, but the data has 2 files"):
        split.files(rows, 3)


@pytest.mark.parametrize("call", [lambda: split.iid(9, 0, 0), lambda: split.dirichlet(["a"], 1, 0.0, 0)])
def test_numbers_out_of_range(call: Callable[[], Any]) -> None:
    with pytest.raises(UserError):
        call()


# ---------------------------------------------------------------- train, validation, test


def test_shares_are_of_each_client_and_numbers_of_all() -> None:
    own = {"a": 25, "b": 4, "c": 71}
    assert split.part_sizes(0.1, own, "x") == {"a": 3, "b": 0, "c": 7}
    assert split.part_sizes(10, own, "x") == {"a": 3, "b": 0, "c": 7}
    assert split.part_sizes(0, own, "x") == {"a": 0, "b": 0, "c": 0}
    for wrong in (-1, 1.5, 100):
        with pytest.raises(UserError):
            split.part_sizes(wrong, own, "x")


@given(st.dictionaries(st.text(min_size=1, max_size=2), st.integers(1, 50), min_size=1), st.integers(1, 40))
def test_a_number_of_rows_adds_up(own: dict[str, int], size: int) -> None:
    if size >= sum(own.values()):
        return
    sizes = split.part_sizes(size, own, "x")
    assert sum(sizes.values()) == size and all(0 <= sizes[name] <= own[name] for name in own)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 10), st.integers(0, 10), SEEDS)
def test_parts_are_a_division_and_no_duplicate_is_in_two(contents: list[int], val: int, test: int, seed: int) -> None:
    content = [bytes([one]) for one in contents]
    members = list(range(len(contents)))
    parts = split.divide(members, content, num_validation=val, num_test=test, seed=seed, client="c")
    assert sorted(row for part in parts for row in part) == members
    wanted = plain.divide(members, content, num_validation=val, num_test=test, seed=seed, client="c")
    assert tuple(part.tolist() for part in parts) == wanted
    held = [{content[row] for row in part} for part in parts]
    assert not (held[0] & held[1]) and not (held[0] & held[2]) and not (held[1] & held[2])
    if all(count == 1 for count in Counter(content).values()):
        assert len(parts.test) == min(test, len(members))
        assert len(parts.validation) == min(val, len(members) - len(parts.test))


def test_parts_are_drawn_anew_for_each_client_and_seed() -> None:
    content = [bytes([i]) for i in range(50)]

    def tests(seed: int, client: str) -> list[int]:
        return split.divide(range(50), content, num_validation=5, num_test=10, seed=seed, client=client).test.tolist()

    assert tests(0, "a") == tests(0, "a") != tests(0, "b") and tests(0, "a") != tests(1, "a")
