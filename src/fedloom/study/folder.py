"""The run folder: what lies where, written so that a crash at any moment leaves it sound.

    runs/NAME/recipe.yaml                       the resolved recipe
              rounds.jsonl                      one line per arm and round
              result.json                       the outcome, when there is one
              facts.json                        what is known from the start: model, data report, versions
              adapter/                          a PEFT folder
              model/                            in its place, where the model's own weights were trained
              checkpoints/ARM/round_00012/      see `fedloom.study.checkpoint`
              stages/ARM.json                   an arm that is done
              report.html, log.txt

One process writes at a time (a lock the system drops when the process dies, however it dies). Every file but the two
that only grow appears whole or not at all: it is written beside its place, synced and renamed. Imports no torch.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import RunError, UserError

__all__ = [
    "RunFolder",
    "find_runs",
    "full_disk_explained",
    "is_running",
    "json_text",
    "read_json",
    "read_lines",
    "remove_leftovers",
    "sync_folder",
    "temporary_beside",
    "write_atomic",
]

logger = logging.getLogger("fedloom")

LOCK = ".lock"
_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{32}\.tmp$")
_NO_ROOM = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}
_NO_ROOM |= {errno.EFBIG: "the file size limit is reached"}
_LOCK_PATIENCE_SECONDS = 1.0  # `is_running` holds a shared lock for an instant


# ---------------------------------------------------------------------------------------------------- single files


@contextlib.contextmanager
def full_disk_explained(path: Path, kept: str = "what was there before is untouched") -> Iterator[None]:
    """Turn the system's word for a full disk into an error a person can act on.

    Raises:
        RunError: there was no room; every other OSError passes through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise RunError(
            f"cannot write {path}: {_NO_ROOM[error.errno]}; {kept}",
            "make room, then go on with `fedloom run --resume` and this run's folder",
            code="disk.full",
        ) from error


def temporary_beside(path: Path) -> Path:
    """A free name in the same folder, hence on the same file system, that `remove_leftovers` knows as ours."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writes left in `folder`. Only for the process that holds the run's lock."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if _TEMPORARY.match(entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write every byte, however many calls it takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file that appears whole or not at all: temporary sibling, fsync, rename, fsync of the folder.

    Raises:
        RunError: the disk is full; the old file, if there was one, is still there.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = temporary_beside(path)
    with full_disk_explained(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _plain(value: Any, where: str) -> None:
    """Raise if `value` would not come back from JSON as it was; NaN has no place there, and keys must be strings."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; JSON has no such number, write None for what was not measured")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; JSON keys are strings")
            _plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _plain(item, f"{where}[{index}]")


def json_text(value: Any, *, indent: int | None = 1, where: str = "the value") -> str:
    """JSON text that any reader takes.

    Raises:
        ValueError: a number is not finite; TypeError: something has no form in JSON. Both name the place.
    """
    _plain(value, where)
    return json.dumps(value, indent=indent, ensure_ascii=False)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}", code="file.missing") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is damaged: {error}", code="file.damaged") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; none when it is missing. A torn last line, of a killed write, is left out.

    Raises:
        UserError: a line before the last is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):  # no newline after it, so its write was cut short
                continue
            raise UserError(f"{path} line {number} is damaged: {error}", code="file.damaged") from error
        found.append(value)
    return found


# ------------------------------------------------------------------------------------------------------ the folder


def is_running(path: Path) -> bool:
    """Whether a process holds the run's lock at this moment."""
    try:
        handle = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: nothing can be known
        return False
    finally:
        os.close(handle)
    return False


def find_runs(folder: Path) -> list[Path]:
    """Run folders directly inside `folder`, the newest first."""
    if not folder.is_dir():
        return []
    runs = [entry for entry in folder.iterdir() if (entry / "recipe.yaml").is_file()]
    return sorted(runs, key=lambda run: (run / "recipe.yaml").stat().st_mtime, reverse=True)


def _runs_nearby(path: Path) -> str:
    runs = find_runs(path.parent) or find_runs(Path("runs"))
    if not runs:
        return "start one with `fedloom run RECIPE.yaml`"
    return "runs there are: " + ", ".join(str(run) for run in runs[:6]) + (" and more" if len(runs) > 6 else "")


class RunFolder:
    """A run folder. `create` and `resume` hold its lock until `close`, or the end of a `with`; `look` holds none.

    `path` is the folder. Methods that write need the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    # -- opening

    @classmethod
    def create(cls, path: Path, recipe: str) -> RunFolder:
        """Make a new run folder with its resolved recipe (YAML text) in it.

        Raises:
            UserError: something is there already, or is no folder that can be made; nothing was changed.
            RunError: another process writes there; or the disk is full.
        """
        folder = cls(path)
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        try:
            with full_disk_explained(path):
                path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"output_dir {path}: {path if path.exists() else 'a part of it'} is a file, not a folder",
                "choose another with output_dir=DIR",
                code="run.exists",
            ) from error
        except PermissionError as error:
            raise UserError(
                f"output_dir {path}: no permission to write there",
                "choose another with output_dir=DIR",
                code="run.permission",
            ) from error
        cls._refuse_occupied(path)  # before the lock file, so that a stranger's folder stays as it is
        folder._take_lock()
        try:
            cls._refuse_occupied(path)  # and again, now that nobody else can fill it
            remove_leftovers(path)
            write_atomic(path / "recipe.yaml", recipe)
            for made in missing:
                sync_folder(made.parent)
        except BaseException:
            folder.close()
            raise
        return folder

    @staticmethod
    def _refuse_occupied(path: Path) -> None:
        there = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
        there = [name for name in there if not _TEMPORARY.match(name)]
        if not there:
            return
        if "recipe.yaml" not in there:
            shown = ", ".join(there[:4]) + (" and more" if len(there) > 4 else "")
            raise UserError(
                f"{path} is not empty and holds no run (it has {shown})",
                "choose another folder with output_dir=DIR",
                code="run.exists",
            )
        done = (path / "result.json").exists()
        raise UserError(
            f"{path} holds a run already" + (", which is finished" if done else ", which did not finish"),
            f"start elsewhere with output_dir={_next_free(path)}"
            + (
                f", or look at it with `fedloom report {path}`"
                if done
                else f", or go on with it: fedloom run --resume {path}"
            ),
            code="run.exists",
        )

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """Open a run to go on with it, and clear away what a killed process left half written.

        Raises:
            UserError: there is no run. RunError: another process writes there.
        """
        folder = cls.look(path)
        folder._take_lock()
        for place in (path, folder.path / "stages"):
            remove_leftovers(place)
        checkpoints = folder.path / "checkpoints"
        for place in (checkpoints, *(checkpoints.iterdir() if checkpoints.is_dir() else ())):
            if place.is_dir():
                remove_leftovers(place)
        return folder

    @classmethod
    def hold(cls, path: Path) -> RunFolder:
        """Hold the lock of a folder that is there and is no run's, a suite's say, and clear away what was half written.

        Raises:
            RunError: another process holds it.
        """
        folder = cls(path)
        folder._take_lock()
        remove_leftovers(path)
        return folder

    @classmethod
    def look(cls, path: Path) -> RunFolder:
        """Open a run to read it, whether it goes on or not.

        Raises:
            UserError: there is no run; the hint names those nearby.
        """
        if not path.exists():
            raise UserError(f"there is no run folder {path}", _runs_nearby(path), code="run.missing")
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is no run folder: it has no recipe.yaml", _runs_nearby(path), code="run.missing")
        return cls(path)

    def _take_lock(self) -> None:
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                who = os.pread(handle, 20, 0).decode(errors="replace").strip()
                os.close(handle)
                raise RunError(
                    f"{self.path} is in use by a running process" + (f" ({who})" if who else ""),
                    f"watch it with `fedloom watch {self.path}`, or wait until it has ended",
                    code="run.locked",
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    os.close(handle)
                    raise
                logger.warning(
                    "%s: this file system has no locks, so see to it that only one process runs here", self.path
                )
                break
        with contextlib.suppress(OSError):  # the number is for people; the lock holds without it
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()}".encode(), 0)
        self._lock = handle

    def close(self) -> None:
        """Let go of the lock. The lock file stays: removing it would let two processes in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    # -- places

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def rounds(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def checkpoints(self, arm: str) -> Path:
        return self.path / "checkpoints" / _plain_name(arm)

    # -- rounds.jsonl

    def append_round(self, line: Mapping[str, Any]) -> None:
        """Add a line to rounds.jsonl, whole and synced.

        Raises:
            RunError: the disk is full; the lines before it are as they were.
        """
        self._append(self.rounds, json_text(line, indent=None, where="rounds.jsonl"))

    def read_rounds(self) -> list[dict[str, Any]]:
        """All lines of rounds.jsonl, in the order in which they were written."""
        return read_lines(self.rounds)

    def keep_rounds(self, done: Mapping[str, int]) -> None:
        """Cut rounds.jsonl back to what checkpoints hold: lines of `done`'s arms up to their round, no others.

        Between a round's line and its checkpoint, and while a line is written, a process may be killed. The round is
        then run again, and its line must not stand there twice.
        """
        lines = self.read_rounds()
        kept = [line for line in lines if line["round"] <= done.get(line["arm"], -1)]
        text = "".join(json_text(line, indent=None) + "\n" for line in kept)
        if self.rounds.exists() and self.rounds.read_bytes() != text.encode():
            write_atomic(self.rounds, text)

    # -- the rest

    def write_stage(self, arm: str, value: Mapping[str, Any]) -> None:
        """Note that an arm is done, with all that result.json will need of it."""
        path = self.path / "stages" / f"{_plain_name(arm)}.json"
        with full_disk_explained(path):
            path.parent.mkdir(exist_ok=True)
        write_atomic(path, json_text(value, where=f"stages/{arm}") + "\n")

    def read_stage(self, arm: str) -> dict[str, Any] | None:
        """What `write_stage` noted; None for an arm that is not done.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / "stages" / f"{_plain_name(arm)}.json"
        return self._object(path) if path.exists() else None

    def read_stages(self) -> dict[str, dict[str, Any]]:
        """All arms that are done."""
        folder = self.path / "stages"
        names = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
        stages = {name: self.read_stage(name) for name in names if not name.startswith(".")}
        return {name: stage for name, stage in stages.items() if stage is not None}

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Note what is known before round 1, for `watch` and for a report of a run without a result.

        Keys that readers know: "model", "data", "versions", "arms" (arm -> rounds it will have), "started".
        """
        write_atomic(self.path / "facts.json", json_text(facts, where="facts.json") + "\n")

    def read_facts(self) -> dict[str, Any]:
        """What `write_facts` noted; empty when nothing was."""
        path = self.path / "facts.json"
        return self._object(path) if path.exists() else {}

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json.

        Raises:
            RunError: the disk is full.
            ValueError: it does not have the form that other tools rely on; every difference is named.
        """
        from fedloom.study.result import check_result

        write_atomic(self.result, json_text(check_result(result), where="result.json") + "\n")

    def read_result(self) -> dict[str, Any] | None:
        """The content of result.json; None when the run has none yet.

        Raises:
            UserError: the file is damaged.
        """
        return self._object(self.result) if self.result.exists() else None

    def log(self, text: str) -> None:
        """Add lines to log.txt, each with the time in front."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._append(self.path / "log.txt", "\n".join(f"{now} {line}" for line in text.splitlines() or [""]))

    @staticmethod
    def _object(path: Path) -> dict[str, Any]:
        value = read_json(path)
        if not isinstance(value, dict):
            raise UserError(f"{path} is damaged: it holds no JSON object", code="file.damaged")
        return value

    @staticmethod
    def _append(path: Path, text: str) -> None:
        with full_disk_explained(path, "the lines before this one are untouched"):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # a write before this one was killed
                try:
                    write_all(handle, ("\n" * torn + text + "\n").encode())
                    os.fsync(handle)
                except OSError:
                    with contextlib.suppress(OSError):  # half a line would spoil the next one
                        os.ftruncate(handle, size)
                    raise
            finally:
                os.close(handle)


def _plain_name(arm: str) -> str:
    """Arms name folders, so nothing that could lead out of the run folder is let through."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", arm):
        raise ValueError(f"an arm's name may hold letters, digits, '.', '_' and '-', not {arm!r}")
    return arm


def _next_free(path: Path) -> Path:
    """The first of NAME-2, NAME-3, ... that is free; counts on from the number that NAME ends with."""
    match = re.fullmatch(r"(.+)-(\d{1,6})", path.name)
    stem, number = (match[1], int(match[2])) if match else (path.name, 1)
    return next(free for n in itertools.count(number + 1) if not (free := path.with_name(f"{stem}-{n}")).exists())
