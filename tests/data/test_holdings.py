"""Who holds what: flat arrays that read like dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.holdings import Held, Names
from fedloom.data.listing import listed, spread


@given(st.lists(st.text(max_size=4), unique=True, max_size=12), st.text(max_size=4))
def test_names_are_found_in_whatever_order(names: list[str], other: str) -> None:
    found = Names(names)
    assert [found.place(name) for name in names] == list(range(len(names))) and list(found) == names
    assert (other in found) == (other in names) and 7 not in found
    if other not in names:
        with pytest.raises(KeyError):
            found.place(other)


@given(st.lists(st.integers(-1, 3), max_size=30), st.lists(st.booleans(), min_size=30, max_size=30))
def test_numbers_by_owner_are_what_a_loop_finds(owner: list[int], keep: list[bool]) -> None:
    ids = Names(["d", "a", "c", "b"])
    held = Held.by_owner(ids, np.asarray(owner, dtype=np.int32))
    plain = {name: [n for n, one in enumerate(owner) if one == place] for place, name in enumerate(ids)}
    assert {name: own.tolist() for name, own in held.items()} == plain
    assert held.sizes.tolist() == [len(own) for own in plain.values()] and held.owner(len(owner)).tolist() == owner
    to = np.arange(len(owner)) * 3 + 1
    assert held.mapped(to)["a"].tolist() == [int(to[n]) for n in plain["a"]]
    kept = held.only(np.asarray(keep)[held.numbers])
    assert {name: own.tolist() for name, own in kept.items()} == {
        name: [n for n in own if keep[n]] for name, own in plain.items()
    }


def test_of_very_many_clients_some_are_listed_evenly_spread() -> None:
    assert list(spread(5)) == [0, 1, 2, 3, 4] and spread(1_000_000, 3) == [0, 499999, 999999]
    places = spread(1_000_000)
    assert len(set(places)) == 1000 and places[0] == 0 and places[-1] == 999_999
    table = {str(number): number for number in range(1500)}
    assert len(listed(table)) == 1000 and {"0", "1499"} <= listed(table).keys() and listed({"a": 1}) == {"a": 1}
