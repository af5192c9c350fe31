"""The form of suite.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import UserError
from fedloom.study.suite_result import check_suite, is_suite, read_suite, write_suite

A_SUITE: dict[str, Any] = {
    "schema": 1,
    "name": "small",
    "status": "done",
    "fedloom_version": "0.1.0",
    "arms": ["base", "federated"],
    "seeds": [0, 1],
    "settings": {"method": ["fedavg", "fedprox"]},
    "metrics": [{"name": "score", "title": "score", "unit": "share", "better": "higher"}],
    "cells": [
        {
            "id": "a1b2",
            "settings": {"method": "fedavg"},
            "seed": 0,
            "run": "runs/a1b2",
            "status": "done",
            "seconds": 12.5,
            "peak_memory_bytes": 900_000_000,
        },
        {
            "id": "c3d4",
            "settings": {"method": "fedprox"},
            "seed": 0,
            "run": "runs/c3d4",
            "status": "failed",
            "seconds": 1.5,
            "reason": "fedloom: out of memory",
        },
    ],
    "table": [
        {
            "settings": {"method": "fedavg"},
            "arm": "federated",
            "comparison": "rounds",
            "metric": "score",
            "n": 2,
            "mean": 0.5,
            "std": 0.1,
            "values": {"0": 0.43, "1": 0.57},
            "costs": {"bytes_up_per_client_round": 231_424.0},
        }
    ],
    "differences": [
        {
            "settings": {"method": "fedavg"},
            "by": "arm",
            "a": "federated",
            "b": "base",
            "comparison": "rounds",
            "metric": "score",
            "n": 2,
            "mean": 0.4,
            "low": 0.1,
            "high": 0.7,
            "level": 0.95,
            "p": 0.03,
            "p_holm": 0.06,
            "resolved": True,
            "resolved_holm": False,
        }
    ],
    "notes": [],
    "seconds": 14.0,
    "jobs": 2,
    "versions": {"python": "3.12"},
    "machine": {"cores": 2},
    "suite": {"suite": "small"},
}


def test_a_suite_is_written_and_read_back_as_it_was(tmp_path: Path) -> None:
    assert not is_suite(tmp_path)
    write_suite(tmp_path, A_SUITE)
    assert is_suite(tmp_path)
    assert read_suite(tmp_path) == A_SUITE


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("cells", 0, "status"), "finished", "cells.0.status"),
        (("table", 0, "mean"), float("nan"), "table.0.mean"),
        (("differences", 0, "p"), 1.5, "differences.0.p"),
        (("metrics", 0, "unit"), "percent", "metrics.0.unit"),
        (("extra",), 1, "extra"),
    ],
)
def test_a_wrong_part_is_named_and_nothing_is_written(tmp_path: Path, place: Any, value: Any, named: str) -> None:
    wrong: Any = copy.deepcopy(A_SUITE)
    at = wrong
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(ValueError, match=named):
        check_suite(wrong)
    with pytest.raises(ValueError, match=named):
        write_suite(tmp_path, wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_suite_and_a_damaged_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no suite folder") as missing:
        read_suite(tmp_path)
    assert missing.value.code == "suite.missing"
    (tmp_path / "suite.json").write_text(json.dumps({**A_SUITE, "schema": 2}))
    with pytest.raises(UserError, match=r"damaged: .*schema") as damaged:
        read_suite(tmp_path)
    assert damaged.value.code == "file.damaged"
