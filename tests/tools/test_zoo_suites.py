"""The suites of the zoo and of bytes: they hold every name of the tables, run, and become a page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedloom.study.explain import known
from fedloom.study.suite import read_suite_file
from fedloom.study.suite_result import read_suite
from tools import run_warm, write_zoo

ROOT = Path(__file__).resolve().parents[2]
SUITES = ROOT / "recipes" / "suites"
# one cell of a tiny kind, small in every way
TINY = ["rounds=1", "local_steps=1", "clients_per_round=1", "evaluate.limit=1", "data.limit=16"]


def test_the_zoo_holds_every_method_and_every_kind_of_adapter() -> None:
    """A new name is added to the grid, with its learning rate."""
    recipes = [cell.recipe for cell in read_suite_file(SUITES / "zoo.yaml").cells]
    missing = {"method": set(known()["method"]), "adapter": set(known()["adapter"])}
    missing["method"] -= {recipe.method for recipe in recipes}
    missing["adapter"] -= {recipe.adapter.kind for recipe in recipes}
    # the ranks of HetLoRA and FlexLoRA differ, else there is nothing to them
    assert not any(missing.values()), f"add to grid.method of recipes/suites/zoo.yaml: {missing}"


def test_bytes_holds_what_compresses() -> None:
    recipes = [cell.recipe for cell in read_suite_file(SUITES / "bytes.yaml").cells]
    held = {kind for recipe in recipes for kind in recipe.compress.up}
    assert set(known()["compress"]) - held <= {"bfloat16", "nonzero"}  # one 16 bit is enough; zeros are fedkseed's


def test_two_cells_run_in_one_process_and_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, f"output_dir={tmp_path / 'run'}", "seeds=[0]", "grid.compress={a: {compress: {up: [zstd]}}, b: {compress: {up: [float16, zstd]}}}"]  # fmt: skip # noqa: E501
    argv = ["run_warm.py", str(SUITES / "bytes.yaml"), *words, "--jobs", "1", "--into", str(tmp_path / "into")]
    monkeypatch.setattr(sys, "argv", argv)
    assert run_warm.main() == 0
    suite = read_suite(tmp_path / "into")
    assert [cell["status"] for cell in suite["cells"]] == ["done", "done"]
    page = write_zoo.document(None, suite)
    a, b = (next(line for line in page.splitlines() if line.startswith(f"| {name} |")) for name in "ab")
    assert "941 kB" in a and float(b.split("|")[4].split()[0]) < 600
