"""Running a suite: each cell in a process of its own, several at once within memory; stopped and gone on with at will.

What is done is known from the run folders alone, whose names say their content: a cell whose folder holds a result is
not run again, one that was interrupted goes on from its checkpoint. Imports no torch; the cells' processes do.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from fedloom.errors import FedloomError, RunError, TimeoutOrTooFewClients, UserError
from fedloom.ops.host import available_cores
from fedloom.study.folder import RunFolder, is_running, read_lines, write_atomic
from fedloom.study.identity import content_id
from fedloom.study.recipe import Recipe, resolved_yaml
from fedloom.study.result import versions
from fedloom.study.suite import Suite, SuiteCell
from fedloom.study.suite_result import Cell, SuiteResult, check_suite, is_suite, read_suite, write_suite
from fedloom.study.suite_table import (
    Finished,
    arms_of,
    csv_text,
    differences_of,
    markdown,
    metrics_of,
    notes_of,
    rows_of,
)

__all__ = ["Job", "Quiet", "SuiteDisplay", "cells_of", "run_suite"]

COMMAND = [sys.executable, "-m", "fedloom"]
POLL_SECONDS = 0.2
LOG_LINES = 12  # of a failed cell's log are shown
FIRST_GUESS = 1.5  # a cell's memory is taken for this much more than it has used by the end of its first round
HEADROOM = 1.05  # and once it has ended, another with the same settings for this much more than it used
OF_FREE_MEMORY = 0.9
KILLED = -signal.SIGKILL  # what a process ends with that the system has ended for want of memory

Status = Literal["waiting", "running", "done", "failed", "stopped"]


class SuiteDisplay(Protocol):
    """Where a suite reports to, from the thread that drives it."""

    def say(self, text: str) -> None:
        """Something has happened."""

    def draw(self, jobs: Sequence[Job], started: float) -> None:
        """How it stands; called several times a second."""


class Quiet:
    """A display that shows nothing."""

    def say(self, text: str) -> None:
        pass

    def draw(self, jobs: Sequence[Job], started: float) -> None:
        pass


@dataclass
class Job:
    """One run to make, for all cells with the same content."""

    id: str
    cell: SuiteCell
    run: Path
    recipe_file: Path
    log: Path
    status: Status = "waiting"
    cached: bool = False  # done before this call
    seconds: float = 0.0  # in processes before this one
    cpu_seconds: float = 0.0
    peak_memory: int | None = None
    reason: str = ""
    alone: bool = False  # did not fit beside others
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)  # the last line of rounds.jsonl

    @property
    def group(self) -> str:
        """Jobs with the same settings need about as much memory and time."""
        return repr(dict(self.cell.settings))

    @property
    def elapsed(self) -> float:
        return self.seconds + (time.monotonic() - self.started if self.process is not None else 0.0)

    def finished(self) -> bool:
        """Whether the run folder holds a whole result."""
        if not (self.run / "recipe.yaml").is_file():
            return False
        try:
            result = RunFolder.look(self.run).read_result()
        except FedloomError:
            return False
        return result is not None and result.get("status") == "done"


@dataclass
class Stop:
    """How often it was asked to stop: once is after the round, twice is now, three times kills."""

    times: int = 0
    told: int = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.times += 1


def run_suite(
    suite: Suite, *, jobs: int | None = None, smoke: bool = False, display: SuiteDisplay | None = None
) -> SuiteResult:
    """Run what is not done yet of a suite, and write suite.json, table.md and table.csv in its folder.

    Args:
        jobs: cells at once, in place of the suite's own limit.
        smoke: each of the grid's settings with the first seed through every step in small.

    Raises:
        UserError: the folder is something else's; nothing was written.
        RunError: cells failed (all others were run), or it was stopped, or its folder is in use.
        TimeoutOrTooFewClients: the time limit was reached; the next call goes on.
    """
    return _Driver(suite, jobs or suite.limits.jobs, smoke, display or Quiet()).go()


def cells_of(suite: Suite, *, smoke: bool = False) -> list[Job]:
    """The runs of a suite, with the state of those that have been begun; nothing is written."""
    return list(_jobs(suite, _folder(suite, smoke), smoke)[0].values())


def _folder(suite: Suite, smoke: bool) -> Path:
    return suite.output_dir.with_name(suite.output_dir.name + "-smoke") if smoke else suite.output_dir


def _jobs(suite: Suite, folder: Path, smoke: bool) -> tuple[dict[str, Job], list[tuple[SuiteCell, str]]]:
    """The runs by their name, and the cells each with the name of its run.

    Runs go by seed first, so that a whole table is there early and its errors shrink.
    """
    order = {seed: place for place, seed in enumerate(suite.seeds)}
    cells = sorted(suite.cells, key=lambda cell: order[cell.seed])
    if smoke:
        first = {repr(dict(cell.settings)): cell for cell in reversed(cells)}
        cells = [cell for cell in cells if first[repr(dict(cell.settings))] is cell]
    store = folder / "runs" if smoke else suite.run_store
    known: dict[str, Cell] = {}
    if is_suite(folder):
        with contextlib.suppress(UserError):  # of another version, or damaged: the run folders know enough
            known = {cell["id"]: cell for cell in read_suite(folder)["cells"]}
    found: dict[str, Job] = {}
    named = {id(cell): content_id(cell.recipe) for cell in cells}
    for cell in cells:
        name = named[id(cell)]
        if name in found:
            continue
        run = store / (f"{name}-smoke" if smoke else name)
        job = Job(name, cell, run, folder / "cells" / f"{name}.yaml", folder / "logs" / f"{name}.log")
        before = known.get(name)
        if before is not None:
            job.seconds, job.peak_memory = before["seconds"] or 0.0, before.get("peak_memory_bytes")
            job.cpu_seconds = before.get("cpu_seconds", 0.0)
        if job.finished():
            job.status, job.cached = "done", True
            _from_result(job)
        found[name] = job
    return found, [(cell, named[id(cell)]) for cell in suite.cells if id(cell) in named]


def _from_result(job: Job) -> None:
    """Time and memory of a run that another suite has made."""
    result = RunFolder.look(job.run).read_result() or {}
    if job.peak_memory is None:
        job.peak_memory = result.get("costs", {}).get("peak_memory_bytes")
    if not job.seconds:
        phases = [cost.get(key) or 0.0 for cost in result.get("costs_per_arm", {}).values() for key in _PHASES]
        job.seconds = math.fsum([*phases, result.get("costs", {}).get("prepare_seconds") or 0.0])


_PHASES = ("train_seconds", "communication_seconds", "evaluate_seconds", "checkpoint_seconds")


class _Driver:
    def __init__(self, suite: Suite, jobs: int, smoke: bool, display: SuiteDisplay) -> None:
        self.suite, self.smoke, self.display = suite, smoke, display
        self.folder = _folder(suite, smoke)
        self.cores = available_cores()
        self.width = jobs
        self.threads = max(1, self.cores // jobs)
        limit = suite.limits.memory_gb
        self.memory = limit * 1e9 if limit is not None else OF_FREE_MEMORY * free_memory()
        self.jobs: list[Job] = []
        self.by_name: dict[str, Job] = {}
        self.cells: list[tuple[SuiteCell, str]] = []
        self.results: dict[str, tuple[Mapping[str, Any], list[dict[str, Any]]]] = {}
        self.stop = Stop()
        self.timed_out = False
        self.seconds = 0.0  # of calls before this one
        self.begun = time.monotonic()

    def go(self) -> SuiteResult:
        _refuse_occupied(self.folder, self.suite.name)
        self.by_name, self.cells = _jobs(self.suite, self.folder, self.smoke)
        self.jobs = list(self.by_name.values())
        for place in (self.folder, self.folder / "cells", self.folder / "logs"):
            place.mkdir(parents=True, exist_ok=True)
        for job in self.jobs:
            job.run.parent.mkdir(parents=True, exist_ok=True)
        with _held(self.folder), _listening(self.stop):
            if is_suite(self.folder):
                with contextlib.suppress(UserError):
                    self.seconds = read_suite(self.folder)["seconds"]
            self._write_files()
            self._introduce()
            try:
                self._drive()
            finally:
                for job in self._running():  # an error of our own leaves nobody behind
                    _signal(job, signal.SIGTERM)
            return self._end()

    def _write_files(self) -> None:
        write_atomic(self.folder / "suite.yaml", self.suite.resolved)
        if self.suite.bases:
            (self.folder / "base").mkdir(exist_ok=True)
        for name, text in self.suite.bases.items():
            write_atomic(self.folder / "base" / f"{name}.yaml", text)
        for job in self.jobs:
            write_atomic(job.recipe_file, resolved_yaml(self._recipe(job)))
        self._save("running")

    def _recipe(self, job: Job) -> Recipe:
        """What the cell's process is given: its place, and its share of the cores."""
        recipe = job.cell.recipe
        run = job.run.with_name(job.id) if self.smoke else job.run  # run_recipe adds "-smoke" itself
        changes: dict[str, Any] = {"name": job.cell.label, "output_dir": str(run.resolve())}
        if recipe.runtime.threads == "auto":
            changes["runtime"] = recipe.runtime.model_copy(update={"threads": self.threads})
        return recipe.model_copy(update=changes)

    def _introduce(self) -> None:
        done = sum(job.status == "done" for job in self.jobs)
        begun = sum(job.status != "done" and (job.run / "recipe.yaml").is_file() for job in self.jobs)
        cells = len(self.suite.cells)
        text = f"{self.suite.name}: {len(self.jobs)} runs"
        if len(self.jobs) < cells and not self.smoke:
            text += f" for {cells} cells ({cells - len(self.jobs)} are the same as others)"
        parts = [f"{done} done already"] * bool(done) + [f"{begun} to go on with"] * bool(begun)
        parts.append(f"{self.width} at once with {self.threads} thread{'s' * (self.threads > 1)} each")
        self.display.say(f"{text}; {', '.join(parts)}")
        if self.width * self.threads > self.cores:
            self.display.say(f"note: {self.width} at once on {self.cores} cores wait for one another")

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _drive(self) -> None:
        while True:
            for job in self._running():
                self._reap(job)
            self._heed()
            if not self.stop.times and not self.timed_out:
                self._start_what_fits()
            running = self._running()
            if not running and (self.stop.times or self.timed_out or not self._waiting()):
                return
            self.display.draw(self.jobs, self.begun)
            time.sleep(POLL_SECONDS)

    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.process is not None]

    def _waiting(self) -> list[Job]:
        return [job for job in self.jobs if job.status == "waiting"]

    def _heed(self) -> None:
        """Pass on what was asked for: Ctrl-C, or the end of the time."""
        minutes = self.suite.limits.minutes
        if minutes is not None and not self.timed_out and time.monotonic() - self.begun > 60 * minutes:
            self.timed_out = True
            if self._running() or self._waiting():
                self.display.say(f"the limit of {minutes:g} minutes is reached: what runs stops after its round")
                for job in self._running():
                    _signal(job, signal.SIGTERM)
        while self.stop.told < self.stop.times:
            self.stop.told += 1
            if self.stop.told == 1:
                self.display.say("stopping: runs finish their round and save; once more stops them now")
            for job in self._running():
                _signal(job, signal.SIGKILL if self.stop.told > 2 else signal.SIGTERM)

    def _start_what_fits(self) -> None:
        running = self._running()
        for job in self._waiting():
            if len(running) >= self.width:
                return
            if job.finished():  # by another suite, meanwhile
                job.status, job.cached = "done", True
                _from_result(job)
                self._ended(job)
            elif is_running(job.run):  # another suite is at it
                continue
            elif self._fits(job, running):
                self._start(job)
                running.append(job)
            else:
                return  # in order: a large one is not put off for ever

    def _fits(self, job: Job, running: Sequence[Job]) -> bool:
        """The first run goes alone until it is known what a run needs."""
        if not running:
            return True
        if job.alone or any(one.alone for one in running):
            return False
        needs = [self._needs(one) for one in (*running, job)]
        known = [need for need in needs if need is not None]
        return len(known) == len(needs) and math.fsum(known) <= self.memory

    def _needs(self, job: Job) -> float | None:
        """Bytes that a run will need at most, by what runs have needed; None where nothing is known yet."""
        same = [one.peak_memory for one in self.jobs
                if one.peak_memory and one.group == job.group and (one is not job or job.process is None)]  # fmt: skip
        if same:
            return max(HEADROOM * max(same), job.peak_memory or 0)
        seen = [FIRST_GUESS * one.peak_memory for one in self.jobs
                if one.peak_memory and one.process is not None and one.progress.get("round")]  # fmt: skip
        ended = [HEADROOM * one.peak_memory for one in self.jobs if one.peak_memory and one.process is None]
        return max((*seen, *ended), default=None)

    def _start(self, job: Job) -> None:
        resume = (job.run / "recipe.yaml").is_file()
        words = ["run", "--resume", str(job.run)] if resume else ["run", str(job.recipe_file)]
        words += ["--smoke"] if self.smoke and not resume else []
        with job.log.open("ab") as log:
            log.write(f"\n$ fedloom {' '.join(words)}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C on the terminal reaches us alone, and we tell the runs.
            job.process = subprocess.Popen(
                [*COMMAND, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        job.started, job.status = time.monotonic(), "running"
        self.display.say(f"{'goes on' if resume else 'starts'}: {job.cell.label} ({job.id})")

    def _reap(self, job: Job) -> None:
        """See whether a run has ended, and how."""
        assert job.process is not None
        pid, status, usage = os.wait4(job.process.pid, os.WNOHANG)
        if pid == 0:
            job.peak_memory = max(job.peak_memory or 0, _memory_of(job.process.pid)) or None
            lines = _last_round(job.run)
            job.progress = lines if lines is not None else job.progress
            return
        code = os.waitstatus_to_exitcode(status)
        job.process.returncode = code
        job.seconds = job.elapsed
        job.cpu_seconds += usage.ru_utime + usage.ru_stime
        job.process = None
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        others = len(self._running())
        asked = bool(self.stop.times) or self.timed_out
        if code == 0 and job.finished():
            job.status, job.peak_memory = "done", max(peak, job.peak_memory or 0)
        elif asked and code in (130, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT):
            job.status = "stopped"
        elif is_running(job.run):  # another suite was faster by an instant
            job.status = "waiting"
            return
        elif code == KILLED and others and not job.alone:
            job.status, job.alone = "waiting", True
            self.display.say(f"killed, for want of memory it seems: {job.cell.label}; it goes on alone later")
            return
        else:
            job.status = "failed"
            job.reason = _why(job.log, code)
        self._ended(job)

    def _ended(self, job: Job) -> None:
        from fedloom.study.progress import duration

        left = sum(one.status in ("waiting", "running") for one in self.jobs)
        took = "done by another suite" if job.cached else f"{duration(job.seconds)}"
        self.display.say(f"{job.status}: {job.cell.label}, {took}; {left} left")
        if job.status == "failed":
            for line in job.reason.splitlines():
                self.display.say(f"    {line}")
        self._save("running")

    # ---- what is written ---------------------------------------------------------------------------------------------

    def _result_of(self, job: Job) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        if job.id not in self.results:
            folder = RunFolder.look(job.run)
            self.results[job.id] = folder.read_result() or {}, folder.read_rounds()
        return self.results[job.id]

    def _save(self, status: Literal["running", "done", "failed", "stopped"]) -> SuiteResult:
        cells: list[Cell] = []
        finished: list[Finished] = []
        for cell, name in self.cells:
            job = self.by_name[name]
            cells.append(_cell(cell, job, self.folder))
            if job.status == "done":
                finished.append(Finished(cell.settings, cell.seed, *self._result_of(job)))
        metrics = metrics_of(finished, self.suite.metrics)
        rows = rows_of(finished, metrics)
        differences = differences_of(rows, self.suite.settings, self.suite.same_tests)
        known = versions()
        order = [arm for cell in self.suite.cells for arm in cell.recipe.arms]
        suite = check_suite(
            {
                "schema": 1,
                "name": self.suite.name,
                "status": status,
                "fedloom_version": known.get("fedloom", "unknown"),
                "arms": arms_of(finished) or list(dict.fromkeys(order)),
                "seeds": list(dict.fromkeys(cell["seed"] for cell in cells)),
                "settings": {name: list(values) for name, values in self.suite.settings.items()},
                "metrics": metrics,
                "cells": cells,
                "table": rows,
                "differences": differences,
                "notes": notes_of(finished, self.suite.seeds, differences),
                "seconds": self.seconds + time.monotonic() - self.begun,
                "jobs": self.width,
                "versions": known,
                "machine": machine(self.threads),
                "suite": dict(self.suite.document),
            }
        )
        write_suite(self.folder, suite)
        write_atomic(self.folder / "table.md", markdown(suite))
        write_atomic(self.folder / "table.csv", csv_text(suite))
        return suite

    def _write_report(self) -> None:
        if self.suite.report:
            from fedloom.study.report import write_report

            write_report(self.folder)

    def _end(self) -> SuiteResult:
        failed = [job for job in self.jobs if job.status == "failed"]
        unfinished = [job for job in self.jobs if job.status in ("waiting", "stopped", "running")]
        again = "call it again to go on: what is done is kept"
        if unfinished:
            self._save("stopped")
            self._write_report()
            text = f"{len(unfinished)} of {len(self.jobs)} runs are not done"
            if self.timed_out:
                raise TimeoutOrTooFewClients(
                    f"the limit of {self.suite.limits.minutes:g} minutes was reached: {text}", again, "suite.timed_out"
                )
            raise RunError(f"stopped: {text}", again, "suite.stopped", exit_code=130)
        suite = self._save("failed" if failed else "done")
        self._write_report()
        if failed:
            names = "\n".join(f"  {job.cell.label}: {job.log}" for job in failed[:10])
            more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
            raise RunError(
                f"{len(failed)} of {len(self.jobs)} runs failed; the table has the others\n{names}{more}",
                again,
                "suite.failed",
            )
        return suite


def _cell(cell: SuiteCell, job: Job, folder: Path) -> Cell:
    made: Cell = {
        "id": job.id,
        "settings": dict(cell.settings),
        "seed": cell.seed,
        "run": os.path.relpath(job.run, folder),
        "status": job.status,
        "seconds": job.elapsed if job.status != "waiting" or job.seconds else None,
    }
    if job.cpu_seconds:
        made["cpu_seconds"] = job.cpu_seconds
    if job.peak_memory:
        made["peak_memory_bytes"] = int(job.peak_memory)
    if job.reason:
        made["reason"] = job.reason
    return made


def _held(folder: Path) -> RunFolder:
    try:
        return RunFolder.hold(folder)
    except RunError as error:
        if error.code != "run.locked":
            raise
        raise RunError(
            f"{folder} is in use: this suite is being run by another process",
            "wait until it has ended, or share its runs: output_dir=OTHER run_store=" + str(folder / "runs"),
            "suite.locked",
        ) from error


def _refuse_occupied(folder: Path, name: str) -> None:
    """Neither another suite's folder nor a stranger's is written to."""
    if is_suite(folder):
        there = read_suite(folder)["name"]
        if there != name:
            raise UserError(
                f"{folder} holds the suite {there}, and this one is {name}",
                "choose another folder with output_dir=DIR",
                code="suite.exists",
            )
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file", "choose another with output_dir=DIR", code="suite.exists")
    ours = {"suite.yaml", "cells", "logs", "base", "runs", ".lock"}
    there_is = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if there_is and not ({"suite.yaml", "cells"} & there_is and there_is <= ours):
        shown = ", ".join(sorted(there_is)[:4])
        raise UserError(
            f"{folder} is not empty and holds no suite (it has {shown})",
            "choose another folder with output_dir=DIR",
            code="suite.exists",
        )


@contextlib.contextmanager
def _listening(stop: Stop) -> Iterator[None]:
    """Route the signals that ask for an end to `stop`, where this is possible (a process's main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(job: Job, number: signal.Signals) -> None:
    if job.process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.process.pid, number)


def _last_round(run: Path) -> dict[str, Any] | None:
    try:
        lines = read_lines(run / "rounds.jsonl")
    except FedloomError:
        return None
    return lines[-1] if lines else None


_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _why(log: Path, code: int) -> str:
    """The last lines of a failed run's log, from where it speaks of the failure."""
    try:
        text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    except OSError:
        text = ""
    text = text.rpartition("\n$ fedloom ")[2].partition("\n")[2]
    lines = [_ESCAPE.sub("", line).rstrip() for line in text.splitlines() if line.strip()]
    told = [place for place, line in enumerate(lines) if line.startswith("fedloom: ")]
    lines = lines[told[-1] :] if told else lines[-LOG_LINES:]
    if code < 0:
        name = signal.Signals(-code).name
        lines.append(f"ended by {name}" + (": the system was out of memory, most likely" if code == KILLED else ""))
    return "\n".join(lines[:LOG_LINES]) or f"ended with exit code {code}"


# ---- the machine -----------------------------------------------------------------------------------------------------


def _memory_of(pid: int) -> int:
    """Peak memory of a process so far; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


_GROUPS = (  # limit, use and statistics of a control group, of both versions
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def free_memory() -> float:
    """Bytes that new processes may take: what the system says is available, and a control group's limit lets them."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
        free = int(found[1]) * 1024.0 if found else math.inf
    except OSError:
        free = math.inf
    root = Path("/sys/fs/cgroup")
    for limit, used, stat in _GROUPS:
        with contextlib.suppress(OSError, ValueError):
            found = re.search(r"^(?:total_)?inactive_file (\d+)$", (root / stat).read_text(), re.MULTILINE)
            cache = float(found[1]) if found else 0.0  # files in memory that the system lets go of when asked for room
            free = min(free, float((root / limit).read_text()) - float((root / used).read_text()) + cache)
    if math.isinf(free):
        with contextlib.suppress(ValueError, OSError, AttributeError):
            free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return free


def machine(threads: int) -> dict[str, Any]:
    """What the seconds in the table were measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found[1].strip() if found else name
    memory = 0
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": name, "cores": available_cores(), "threads_per_run": threads, "memory_bytes": memory}
