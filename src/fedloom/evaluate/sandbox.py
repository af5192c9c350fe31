"""Run programs that nobody has read: limits, no network, no other files, no other processes, and a verdict.

    sandbox = open_sandbox()                       # refuses where the machine cannot hold a program
    outcomes = sandbox.run([Program.of("def f(x): return x + 1", "assert f(1) == 2"), ...])
    outcomes[0].status                             # "passed"

A program is Python text in parts (an answer, then its tests), run one after the other in one module of one process
that ends afterwards. It has passed when the last part came to its end; exit status and printed words count for nothing.

Several layers stand between a program and the machine, and each is tried before anything is run (`protections`):

    limits      memory, CPU time, file size, open files; by the kernel, for the process
    seccomp     a filter on system calls: no processes, threads, sockets, signals to others, tracing, or mounts
    landlock    no file but Python's own library may be opened
    namespaces  no network device, no view of other processes, a root folder of its own, files in memory only

`limits`, `seccomp` and one of the other two are essential. `inside.py` is what runs in the processes.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.errors import RunError, UserError

__all__ = [
    "LAYERS",
    "UNSANDBOXED",
    "Limits",
    "Outcome",
    "Part",
    "Program",
    "Sandbox",
    "describe_sandbox",
    "open_sandbox",
]

logger = logging.getLogger("fedloom")

LAYERS = ("limits", "seccomp", "landlock", "namespaces")
HOLDS = {
    "memory, time and file sizes": ("limits",),
    "processes and signals": ("seccomp", "namespaces"),
    "network": ("seccomp", "namespaces"),
    "files": ("landlock", "namespaces"),
}
UNSANDBOXED = "FEDLOOM_ALLOW_UNSANDBOXED"  # the environment variable by which a user takes the risk


class Limits(NamedTuple):
    """What one program may use. A program is one process with one thread."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 20.0  # for what waits instead of computing; a busy machine is no fault of a program
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20  # of any one file
    disk_bytes: int = 32 << 20  # of all its files together
    open_files: int = 64
    stack_bytes: int = 8 << 20
    output_bytes: int = 1 << 16  # kept of what it prints; the rest is read and dropped


class Part(NamedTuple):
    """One text of a program. The first of `readings` that is Python is run."""

    name: str
    readings: tuple[str, ...]


class Program(NamedTuple):
    """Parts that run one after the other and see one another's names."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, text: str, tests: str | None = None) -> Program:
        """A program of one text, and perhaps of tests behind it."""
        more = () if tests is None else (Part("tests", (tests,)),)
        return cls((Part("program", (text,)), *more))


class Outcome(NamedTuple):
    """What became of a program.

    Statuses: `passed`; `failed`, by an exception; `timeout`; `memory`; `crashed`, by a signal; `quit`, it ended itself
    before its last part was through; `forged`, it wrote a verdict of its own.
    """

    status: str
    detail: str = ""  # one line, empty when it passed
    reading: int = 0  # the highest number of a reading that was taken
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs. `open_sandbox` makes the one that this machine can have."""

    layers: tuple[str, ...]
    patience: tuple[float, ...] = (0.1, 1.0)  # seconds before walls that could not be put up are tried again

    @property
    def protections(self) -> dict[str, str]:
        """What is held, and by which layers; "nothing" where by none."""
        return {
            what: ", ".join(layer for layer in by if layer in self.layers) or "nothing" for what, by in HOLDS.items()
        }

    def run(
        self,
        programs: Sequence[Program],
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        on_outcome: Callable[[int, Outcome], None] | None = None,
    ) -> list[Outcome]:
        """Run programs side by side, and return their outcomes in their order.

        `workers` is the number of programs at a time: by default one per core, fewer where memory is short.
        `on_outcome` is called from the calling thread, in the order in which programs end.

        Raises:
            RunError: a layer that stood when the sandbox was opened could not be put up.
        """
        limits = limits or Limits()
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(programs)):
            todo.put(index)
        ended: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()
        stopping = threading.Event()

        def serve(keeper: _Keeper) -> None:
            while not stopping.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                job = {"parts": programs[index].parts, "limits": limits._asdict(), "layers": self.layers}
                try:
                    ended.put((index, _outcome(keeper.ask(job), limits)))
                except BaseException as error:  # raised again in the calling thread
                    ended.put((index, error))
                    return

        outcomes: dict[int, Outcome] = {}
        keepers: list[_Keeper] = []
        threads: list[threading.Thread] = []
        with tempfile.TemporaryDirectory(prefix="fedloom-sandbox-", ignore_cleanup_errors=True) as folder:
            try:
                for _ in range(min(len(programs), workers or default_workers(limits))):
                    keepers.append(_Keeper(Path(folder), self.patience))
                    threads.append(threading.Thread(target=serve, args=(keepers[-1],), daemon=True))
                    threads[-1].start()
                while len(outcomes) < len(programs):
                    index, outcome = ended.get()
                    if isinstance(outcome, BaseException):
                        raise outcome
                    outcomes[index] = outcome
                    if on_outcome is not None:
                        on_outcome(index, outcome)
            finally:
                stopping.set()
                for keeper in keepers:
                    keeper.close()
                for thread in threads:
                    thread.join()
        return [outcomes[index] for index in range(len(programs))]


def default_workers(limits: Limits) -> int:
    """One program per core, as long as half of the memory holds all of them at their limit."""
    from fedloom.ops.host import available_cores

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(available_cores(), memory // 2 // (limits.memory_bytes + limits.disk_bytes)))


def open_sandbox(allow_unsandboxed: bool | None = None) -> Sandbox:
    """The strongest sandbox this machine can have. What it holds has been tried, not assumed.

    Args:
        allow_unsandboxed: run programs even where an essential layer is missing; None: what the environment variable
            FEDLOOM_ALLOW_UNSANDBOXED says. A machine that has all of them uses them anyway.

    Raises:
        UserError: an essential layer is missing, and nobody took the risk.
    """
    layers, missing = _layers_of_this_machine()
    if not missing:
        return Sandbox(layers)
    if allow_unsandboxed is None:
        allow_unsandboxed = os.environ.get(UNSANDBOXED, "") not in ("", "0")
    if not allow_unsandboxed or not hasattr(os, "fork"):
        raise UserError(
            f"programs written by a model are run in a sandbox, and this machine cannot hold one: {missing}",
            f"run this on Linux 5.13 or later; or, where the machine may be lost, set {UNSANDBOXED}=1 to run programs "
            "with nothing between them and your files and network",
            code="sandbox.missing",
        )
    logger.warning("programs are run WITHOUT a sandbox, as %s says; what is missing: %s", UNSANDBOXED, missing)
    return Sandbox((*layers, "unsandboxed"))


def describe_sandbox() -> str:
    """One line for `fedloom env`: the layers that stand, or why programs are refused."""
    layers, missing = _layers_of_this_machine()
    return ", ".join(layers) if not missing else f"none: {missing}"


@functools.cache
def _layers_of_this_machine() -> tuple[tuple[str, ...], str]:
    """The layers that can be put up here, and why these are not enough ("" when they are)."""
    if sys.platform != "linux":
        return (), f"{platform.system()} has no system call filter that a program cannot leave"
    nothing = Program.of("pass")
    working, reasons = [], {}
    for layer in LAYERS:
        try:
            [outcome] = Sandbox((layer,), ()).run([nothing], workers=1)
            reasons[layer] = f"{layer}: {outcome.status} {outcome.detail}".strip()
            working += [layer] if outcome.passed else []
        except (RunError, OSError) as error:
            reasons[layer] = f"{layer}: {error}"
    lacking = [layer for layer in ("limits", "seccomp") if layer not in working]
    if not {"landlock", "namespaces"} & set(working):
        lacking += ["landlock", "namespaces"]
    if lacking:
        return tuple(working), "; ".join(reasons[layer] for layer in lacking)
    with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        limits = Limits()
        trial = Program.of(_TRIAL.replace("PATH", repr(str(secret))).replace("BYTES", str(limits.memory_bytes)))
        [outcome] = Sandbox(tuple(working)).run([trial], limits, workers=1)
        touched = secret.read_text() != "secret"
    if not outcome.passed or touched:
        return tuple(working), f"its walls do not hold: {outcome.detail or 'a file outside was written'}"
    return tuple(working), ""


# Tries what must not work. Numbers of system calls differ between machines, so nothing is taken on trust.
_TRIAL = """
import os, socket, threading
def fork():
    if os.fork() == 0:
        os._exit(0)
trials = {
    "start a process": fork,
    "start a thread": threading.Thread(target=int).start,
    "open a socket": socket.socket,
    "signal others": lambda: os.kill(-1, 0),
    "read a file": lambda: open(PATH),
    "write a file": lambda: open(PATH, "w"),
    "empty a file": lambda: os.close(os.open(PATH, os.O_RDONLY | os.O_TRUNC)),
    "change a file's mode": lambda: os.chmod(PATH, 0o777),
    "list a folder": lambda: os.listdir(os.path.dirname(PATH)),
    "take memory": lambda: bytearray(BYTES),
}
for what, trial in trials.items():
    try:
        trial()
    except (OSError, RuntimeError, MemoryError):
        continue
    raise AssertionError(f"a program can {what}")
"""


class _Keeper:
    """The process that runs one program after the other."""

    def __init__(self, folder: Path, patience: Sequence[float]) -> None:
        self.folder, self.patience = folder, patience
        self.over = False
        self.lock = threading.Lock()  # between its own thread, which may start a successor, and the one that closes it
        self.start()

    def start(self) -> None:
        # Neither the user's environment nor site-packages; hashes as in every run. The library path is the loader's,
        # and the programs do not see it.
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONHASHSEED": "0",
            "PYTHONUTF8": "1",
        }
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-P", "-B", "-W", "ignore", str(Path(__file__).with_name("inside.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The report on one program. What fails for want of memory or processes is tried again, a little later."""
        for pause in self.patience:
            report = self._ask(job)
            if "wall" not in report or self.over:
                return report
            time.sleep(pause)
        return self._ask(job)

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        line = b""
        with suppress(OSError, ValueError):
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        with self.lock:
            if self.over:
                return {"wall": "it was closed"}
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines() or ["ended by a signal"]
            self.kill()
            self.start()
        return {"wall": f"the process that runs programs ended: {said[-1]}"}

    def close(self) -> None:
        """End it and all that it started, for good."""
        with self.lock:
            self.over = True
            self.kill()

    def kill(self) -> None:
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(OSError):
                pipe and pipe.close()


def _outcome(report: Mapping[str, Any], limits: Limits) -> Outcome:
    if "wall" in report:
        raise RunError(f"the sandbox could not be put up: {report['wall']}", code="sandbox.broken")
    status, detail = _judged(report, limits)
    verdict = report["verdict"] or {}
    return Outcome(
        status,
        "".join(char if char.isprintable() else " " for char in detail)[:500],
        verdict.get("reading", 0),
        report["out"],
        report["err"],
        report["seconds"],
        report["cpu_seconds"],
        report["peak_bytes"],
    )


def _judged(report: Mapping[str, Any], limits: Limits) -> tuple[str, str]:
    verdict = report["verdict"] or {}
    killed = report["signal"]
    if verdict.get("status") == "passed":
        return "passed", ""
    if report["late"]:
        return "timeout", f"did not end within {limits.wall_seconds:g} s"
    # The kernel counts in ticks, so it may end a program a little early.
    if killed == signal.SIGXCPU or (killed == signal.SIGKILL and report["cpu_seconds"] > 0.9 * limits.cpu_seconds):
        return "timeout", f"used {limits.cpu_seconds:g} s of CPU time"
    if killed:
        memory = ": the system was out of memory, most likely" if killed == signal.SIGKILL else ""
        return "crashed", _signal_name(killed) + memory
    if verdict.get("status") == "forged":
        return "forged", "wrote a verdict of its own"
    if not verdict:
        return "quit", f"ended itself with exit status {report['exit']} before its tests were through"
    error = f"{verdict['error']}: {verdict['message']}" if verdict["message"] else verdict["error"]
    where = f" ({verdict['where']})" if verdict["where"] else ""
    if verdict["error"] == "SystemExit":
        return "quit", f"called exit before its tests were through{where}"
    return "memory" if verdict["error"] == "MemoryError" else "failed", error + where


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
