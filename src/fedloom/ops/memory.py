"""How much memory there is for this process: of the accelerator where there is one, else of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["held_bytes", "room_bytes"]

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def held_bytes(proc: Path = _PROC) -> int:
    """What this process holds now: of the accelerator what its tensors take, else its resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    found = _field(proc / "self" / "status", "VmRSS:")
    if found is not None:
        return 1024 * found
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # its peak: the nearest that such systems say


def room_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """What this process may hold in all: what it holds and what is free, within its control group's limit.

    None where the system does not say.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved())
    free_kb = _field(proc / "meminfo", "MemAvailable:")
    if free_kb is not None:
        free = min([1024 * free_kb, *_left_in_groups(proc, cgroup)])
        return held_bytes(proc) + max(0, free)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _left_in_groups(proc: Path, cgroup: Path) -> Iterator[int]:
    """Bytes that each control group around this process still grants; cached files do not count, they are let go."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, limit, usage, cached = cgroup, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            top, limit, usage = cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        place = top / path.strip("/")
        for folder in (place, *place.parents):
            if folder != top and top not in folder.parents:
                break
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            except (OSError, ValueError):
                continue
            if most.isdigit():
                yield int(most) - used + (_field(folder / "memory.stat", cached) or 0)


def _field(path: Path, name: str) -> int | None:
    """The number that stands behind a name at the beginning of a line."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None
