"""Settings of the process for the machine it runs on: torch threads and how glibc hands memory back.

Large temporary tensors (logits, activations) are taken and freed at every step. By default glibc maps and unmaps each
of them, and the page faults cost up to half of the time of a step. Two settings keep the memory in the process.

oneDNN keeps the code it makes for each new shape of a product, 1,024 of them, one or two MB each in bfloat16. The
sizes of batches are rounded to few (`ops.shapes`), a few hundred shapes in all; with room for 256 of them little is
made twice, and other products do not fill the memory with code that is not needed again.

torch and transformers bring half a million objects that stay. The garbage collector looks through all of them again and
again while they come, and for a fifth of a second whenever a run collects before it measures memory: it is paused
while they are imported (`imports`), and told to leave them alone while a run lasts (`settled`).

On a GPU float32 matrix products are rounded to TF32 (10 bits of mantissa, as many as float16 has, at float32's range):
several times faster where a base is float32, and of no effect on one in bfloat16 or float16. NVIDIA_TF32_OVERRIDE=0 in
the environment, which NVIDIA's libraries read themselves, keeps all bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedloom.errors import UserError

__all__ = ["Host", "available_cores", "imports", "keep_freed_memory", "settled", "tune_host"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_SHAPE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's in front of it
KEPT_SHAPES = 256

_CPU_ROOT = Path("/sys/devices/system/cpu")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Host:
    """What was set: torch's threads inside one operation, and whether freed memory stays in the process."""

    threads: int
    keeps_memory: bool
    tf32: bool = False  # float32 matrix products in TF32


def tune_host(threads: int | Literal["auto"] = "auto", processes: int = 1) -> Host:
    """Set torch's thread count and the allocator, once, before the first large tensor.

    `auto` is the number of physical cores this process may use: two threads on one core only wait for each other.
    So many `processes` of one run on this host share them.

    Raises:
        UserError: `threads` is below 1.
    """
    for name in _SHAPE_CACHES:  # read once, at the first product; a person's own setting stays
        os.environ.setdefault(name, str(KEPT_SHAPES))
    import torch

    if threads != "auto" and threads < 1:
        raise UserError(f"threads is {threads}, but must be 1 or more, or auto", code="host.threads")
    count = max(1, available_cores() // processes) if threads == "auto" else threads
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    tf32 = torch.cuda.is_available()
    if tf32:  # not on a CPU, where "high" may mean bfloat16 to oneDNN
        torch.set_float32_matmul_precision("high")
    return Host(threads=count, keeps_memory=keep_freed_memory(), tf32=tf32)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Import large packages inside this: without garbage collection, as what they make stays."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Leave what is there by now out of garbage collection while this lasts. What is garbage by now goes first.

    Where somebody else has frozen objects, nothing is done: they could not be told from ours afterwards.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed blocks instead of giving them back; False where there is no glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    # Old glibc takes no threshold above half a heap (32 MiB); that much still covers most temporaries.
    mapped = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25)
    trimmed = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mapped and trimmed)


def available_cores(cpu_root: Path = _CPU_ROOT, cgroup_root: Path = _CGROUP_ROOT) -> int:
    """Physical cores this process may use: by affinity, by the container's quota, hyper-threads counted once."""
    allowed = _allowed_cpus()
    cores = len({_siblings(cpu_root, cpu) for cpu in allowed})
    quota = _quota(cgroup_root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _allowed_cpus() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _siblings(cpu_root: Path, cpu: int) -> str:
    """A name that all threads of one core share; the cpu's own number where the system does not say."""
    try:
        return (cpu_root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip() or str(cpu)
    except OSError:
        return str(cpu)


def _quota(cgroup_root: Path) -> float | None:
    """Whole cpus a container grants (cgroup 2, then cgroup 1), or None where there is no limit."""
    try:
        limit, period = (cgroup_root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((cgroup_root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup_root / "cpu" / "cpu.cfs_period_us").read_text())
        return None if limit_us <= 0 else limit_us / period_us
    except (OSError, ValueError):
        return None
