"""Run a command and tell what it and all its descendants cost: CPU seconds, and the most memory held at once.

    python -m benchmarks.throughput.supervise COST.json LIMIT_SECONDS COMMAND ...

Linux only. This process declares itself the reaper of orphans, so that a descendant that puts itself into the
background is waited for like any other and its time counts. A descendant whose parent never waited for it has its time
lost to the kernel's sum: samples of every process's own clock stand beside it, and the larger of the two is reported.

Memory at a moment is the anonymous memory of all processes together, plus the file pages and shared memory of the
process that maps most of them (libraries and shared buffers are mapped by many and held once). The peak over samples is
raised to the kernel's own high-water mark of any single process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

EVERY_SECONDS = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Watch:
    """What has been seen of the descendants of this process."""

    def __init__(self) -> None:
        self.cpu: dict[tuple[int, float], float] = {}
        self.peak_bytes = 0
        self.most_processes = 0

    def look(self) -> list[psutil.Process]:
        processes: list[psutil.Process] = psutil.Process().children(recursive=True)
        private, shared = 0, 0
        for process in processes:
            with contextlib.suppress(psutil.Error, OSError):
                times = process.cpu_times()
                self.cpu[process.pid, process.create_time()] = times.user + times.system
                memory = process.memory_info()
                private += memory.rss - memory.shared
                shared = max(shared, memory.shared)
                self.peak_bytes = max(self.peak_bytes, high_water_bytes(process.pid))
        self.peak_bytes = max(self.peak_bytes, private + shared)
        self.most_processes = max(self.most_processes, len(processes))
        return processes


def high_water_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # a process that has ended has no memory left to tell of


def end(processes: list[psutil.Process]) -> None:
    """End what the command left running, gently first."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def follow_the_parent() -> None:
    """Be told when the benchmark itself ends, so that nothing of a broken-off run goes on in the background."""
    libc = ctypes.CDLL(None)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) or libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        sys.exit("this system does not let a process wait for its grandchildren")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended with the benchmark"))


def main() -> None:
    cost, limit, command = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    follow_the_parent()
    watch = Watch()
    began = time.perf_counter()
    child = subprocess.Popen(command)
    timed_out = False
    try:
        while child.poll() is None:
            watch.look()
            if time.perf_counter() - began > limit:
                timed_out = True
                child.kill()
            time.sleep(EVERY_SECONDS)
        wall = time.perf_counter() - began
    finally:
        end(watch.look())
    reap()
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "return_code": child.returncode,
        "timed_out": timed_out,
        "whole_wall_seconds": wall,
        "waited_cpu_seconds": waited.ru_utime + waited.ru_stime,
        "sampled_cpu_seconds": sum(watch.cpu.values()),
        "peak_memory_bytes": watch.peak_bytes,
        "processes": watch.most_processes,
    }
    found["cpu_seconds"] = max(found["waited_cpu_seconds"], found["sampled_cpu_seconds"])
    cost.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
