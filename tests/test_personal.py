"""Personal state on disk: what a dictionary would have, as of every version, after failures, forks and kills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fedloom import personal
from fedloom.errors import RunError
from fedloom.personal import OnDisk, Store, joined, staged
from fedloom.types import Tree


def tree(value: float, dtype: torch.dtype = torch.float32) -> Tree:
    return {
        "z.b": torch.full((2, 3), value, dtype=dtype),
        "a/é": torch.tensor(value, dtype=torch.float64),
        "none": torch.zeros(0),
    }


def same(one: Mapping[str, Tree], other: Mapping[str, Tree]) -> bool:
    return sorted(one) == sorted(other) and all(
        list(one[client]) == list(other[client])
        and all(torch.equal(one[client][name], leaf) for name, leaf in other[client].items())
        and all(one[client][name].dtype == leaf.dtype for name, leaf in other[client].items())
        for client in other
    )  # fmt: skip


def rounds_of(start: Mapping[str, Tree], number: int) -> list[Mapping[str, Tree]]:
    """States after each round; in round r client r and client 0 get a tree."""
    found = [start]
    for round in range(1, number + 1):
        new = staged(found[-1])
        new["0"] = tree(round)
        new[f"client/{round}"] = tree(-round, torch.bfloat16)
        found.append(joined(found[-1], new))
    return found


def test_every_version_is_what_a_dictionary_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal, "CHUNK_BYTES", 100)  # a tree is in several pieces
    store = Store(tmp_path / "p.sqlite")
    kept, plain = rounds_of(store.cut(0), 5), rounds_of({}, 5)
    for one, other in zip(kept, plain, strict=True):
        assert isinstance(one, OnDisk) and same(one, other) and bool(one) == bool(other) and len(one) == len(other)
        assert one.get("nobody") is None and ("0" in one) == ("0" in other)
    again = Store(tmp_path / "p.sqlite")  # another process, or the next one
    assert same(again.at(3), plain[3])
    with pytest.raises(RunError, match="ends with round 5"):
        again.at(6)


def test_a_round_that_fails_and_rounds_that_are_done_again_leave_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "p.sqlite")
    kept, plain = rounds_of(store.cut(0), 4), rounds_of({}, 4)
    lost = staged(kept[-1])
    lost["0"] = tree(99)
    lost["lost"] = tree(99)
    assert torch.equal(lost["0"]["z.b"], tree(99)["z.b"]) and same(kept[-1], plain[-1])
    gone_on = joined(kept[-1], {"0": tree(5)})
    assert same(gone_on, {**plain[-1], "0": tree(5)})
    back = Store(tmp_path / "p.sqlite").cut(2)  # resumed from round 2
    assert same(back, plain[2]) and same(
        rounds_of(back, 1)[-1], {**plain[2], "0": tree(1), "client/1": tree(-1, torch.bfloat16)}
    )


def test_a_second_round_from_the_same_state_stands_beside_the_first(tmp_path: Path) -> None:
    kept = rounds_of(Store(tmp_path / "p.sqlite").cut(0), 3)
    plain = rounds_of({}, 3)
    fork = joined(kept[1], {"0": tree(7), "new": tree(8)})
    assert same(fork, {**plain[1], "0": tree(7), "new": tree(8)}) and len(fork) == 3 and same(kept[3], plain[3])
    assert staged(kept[1]) == {}


def test_what_no_checkpoint_has_goes(tmp_path: Path) -> None:
    store = Store(tmp_path / "p.sqlite")
    kept, plain = rounds_of(store.cut(0), 6), rounds_of({}, 6)

    def stored() -> list[int]:
        return [row[0] for row in store.execute("SELECT version FROM trees WHERE client = '0' ORDER BY version")]

    assert stored() == [1, 2, 3, 4, 5, 6]
    store.keep({2, 5})
    assert stored() == [2, 5, 6]
    store.keep({2, 6})
    assert stored() == [2, 6]
    for version in (2, 6):
        assert same(kept[version], plain[version])


def test_damage_is_told_with_the_clients_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "p.sqlite")
    kept = rounds_of(store.cut(0), 1)[-1]
    store.execute("UPDATE trees SET data = CAST(substr(data, 1, length(data) - 1) || x'7f' AS BLOB) WHERE client = '0'")
    with pytest.raises(RunError, match="client '0' is damaged"):
        kept["0"]
    store.execute("UPDATE trees SET client = 'other' WHERE client = 'client/1'")
    with pytest.raises(RunError, match="'other' is damaged"):
        kept["other"]
    store.sync()
    (tmp_path / "p.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RunError, match="not a database"):
        Store(tmp_path / "p.sqlite").at(0)
