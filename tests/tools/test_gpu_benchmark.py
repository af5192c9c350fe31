"""The GPU benchmark on a tiny model: every side runs, here too, and its page tells what happened."""

from __future__ import annotations

import pytest
import torch
from benchmarks.gpu import run
from benchmarks.gpu.case import Case, peak_flops
from benchmarks.gpu.case import run as run_case

CPU = torch.device("cpu")


def test_every_side_runs_on_a_tiny_model() -> None:
    rows = []
    for case in run.cases(tiny=True):
        found = run_case(case, CPU)
        rows.append({"name": case.name, **case._asdict(), **found})
    sides = {row["side"]: row for row in rows}
    assert sides["fedloom"]["tokens"] == 2 * sides["trainer"]["tokens"] == 2 * 2 * 32
    assert sides["fedloom"]["flops"] == 2 * sides["trainer"]["flops"] > 0
    assert sides["fedloom"]["loss"] == pytest.approx(5.545, abs=0.1)  # the logarithm of 256 tokens: it has trained
    page = run.page({"machine": {}, "runs": rows, "not_run": ["another"]})
    assert "| fedloom tiny, C = 2, plain |" in page and "Not run, the time was up: another." in page
    assert "| product tiny, C = 2, plain |" in page


def test_what_did_not_fit_and_what_failed_is_told() -> None:
    runs = [
        {"name": "a", "side": "fedloom", "size": "7b", "out_of_memory": True},
        {"name": "b", "side": "product", "size": "7b", "error": "Traceback\nValueError: no"},
    ]
    page = run.page({"machine": {}, "runs": runs, "not_run": []})
    assert "| a | out of memory | | | |" in page and "| b | failed: ValueError: no | |" in page


def test_a_case_that_hangs_ends_with_the_time() -> None:
    assert run.one(Case("fedloom", "tiny"), 0.01) == {"error": "not done after 0 s"}


def test_peaks_go_by_the_devices_own_name() -> None:
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA L40S") == 362.1e12 and peak_flops("NVIDIA A100-SXM4-80GB") == 311.8e12
    assert peak_flops("some other device") is None
