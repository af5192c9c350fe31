"""Threads and the allocator: what the machine grants, and nothing where there is no glibc."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from fedloom.errors import UserError
from fedloom.models.load import hardware_dtype
from fedloom.ops import host


def cpus(tmp_path: Path, siblings: dict[int, str]) -> Path:
    for cpu, names in siblings.items():
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(names + "\n")
    return tmp_path


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


@pytest.mark.usefixtures("four_cpus")
def test_hyper_threads_count_once(tmp_path: Path) -> None:
    root = cpus(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert host.available_cores(root, tmp_path / "no-cgroup") == 2


@pytest.mark.usefixtures("four_cpus")
def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert host.available_cores(tmp_path / "absent", tmp_path / "no-cgroup") == 4


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("300000 100000", 3)]
)
def test_a_container_quota_bounds_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert host.available_cores(tmp_path / "absent", tmp_path) == cores


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("200000", 2)])
def test_the_older_container_quota_is_read_too(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert host.available_cores(tmp_path / "absent", tmp_path) == cores


def test_affinity_bounds_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1}, raising=False)
    assert host.available_cores(tmp_path, tmp_path) == 1


def test_threads_are_set_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_cores", lambda: 3)
    assert host.tune_host(2).threads == torch.get_num_threads() == 2
    assert host.tune_host("auto").threads == torch.get_num_threads() == 3


def test_no_threads_is_refused() -> None:
    with pytest.raises(UserError, match="threads is 0"):
        host.tune_host(0)


def test_nothing_is_touched_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("looked for mallopt"))
    assert host.keep_freed_memory() is False
    assert host.tune_host(1) == host.Host(threads=1, keeps_memory=False)


def test_a_c_library_without_mallopt_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert host.keep_freed_memory() is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_takes_the_settings() -> None:
    assert host.keep_freed_memory() is True


def test_shapes_that_are_gone_give_their_memory_back() -> None:
    """1,200 lengths in bfloat16, in processes of their own: with oneDNN's own limits one grows twice as much."""
    code = """
import torch
from fedloom.ops.host import tune_host
tune_host(1)
weight = torch.zeros(1024, 288, dtype=torch.bfloat16)
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) // 1024
for n in range(100, 108):
    torch.nn.functional.linear(torch.zeros(n, 288, dtype=torch.bfloat16), weight)
before = peak()
for n in range(108, 1300):
    torch.nn.functional.linear(torch.zeros(n, 288, dtype=torch.bfloat16), weight)
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not say how much memory a process has held")
    if hardware_dtype("cpu")[0] != torch.bfloat16:
        pytest.skip("this processor has no bfloat16 products, and emulating them takes minutes")

    def growth(**more: str) -> int:
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **more}
        )
        return int(found.stdout)

    unbounded = growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024")
    if unbounded < 100:
        pytest.skip("this processor's bfloat16 products keep no code by shape")
    assert growth() < 0.6 * unbounded


def test_float32_products_are_tf32_on_a_gpu_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert host.tune_host(1).tf32 is there
    assert said == ["high"]


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.self = self


def is_there(knot: weakref.ref[Knot]) -> bool:
    return knot() is not None


def test_nothing_is_collected_while_modules_are_imported() -> None:
    assert gc.isenabled()
    with host.imports():
        assert not gc.isenabled()
        with host.imports():
            pass
        assert not gc.isenabled(), "the inner one must not switch it on"
    assert gc.isenabled()
    with pytest.raises(ImportError), host.imports():
        raise ImportError
    assert gc.isenabled()


def test_what_is_there_is_settled_and_garbage_is_not() -> None:
    assert gc.get_freeze_count() == 0
    before = weakref.ref(Knot())
    with host.settled():
        assert not is_there(before)
        assert gc.get_freeze_count() > 100_000, "torch's objects are left alone"
        inside = weakref.ref(Knot())
        gc.collect()
        assert not is_there(inside), "what comes later is collected as ever"
        with host.settled():
            pass
        assert gc.get_freeze_count() > 0, "the inner one must not let them go"
    assert gc.get_freeze_count() == 0
