"""What was prepared before, found by what it was made from: folders of plain files below one place.

    CACHE/rows-0123456789abcdef.../header.json, rows.jsonl, offsets.i64, ...
          tokens-...

The name of an entry is a digest of its whole key: contents, settings, and the source code that made it. So an entry
is never out of date, only unused; those unused longest go when all together are over the limit. An entry is written
aside and renamed, appears whole or not at all, and is checked in full whenever it is opened: what is damaged is made
anew. Two processes that want the same entry wait for one another (a lock the system drops when a process dies).

Files are opened once and stay readable when somebody else evicts them. Imports neither numpy nor torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.errors import RunError, UserError

__all__ = ["Entry", "Kept", "cache_home", "cache_limit", "clear", "code_digest", "entries", "file_digest", "prepared"]

logger = logging.getLogger("fedloom")

Build = Callable[[Path], Mapping[str, Any]]  # writes files into a folder, and says what belongs in the header

DEFAULT_LIMIT = 20 * 10**9
HEADER = "header.json"
_NAME = re.compile(r"[a-z]+-[0-9a-f]{32}\Z")
_NO_ROOM = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

_used: set[str] = set()  # entries of this process, which it does not evict itself


class _DamagedError(Exception):
    """An entry is not what was written; the argument says how."""


def cache_home() -> Path:
    """The folder of prepared data: `$FEDLOOM_CACHE`, by default `fedloom/prepared` in the user's cache."""
    named = os.environ.get("FEDLOOM_CACHE")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fedloom" / "prepared"


def cache_limit() -> int:
    """Bytes that all entries together may have: `$FEDLOOM_CACHE_LIMIT` (for example 5GB), by default 20 GB.

    Raises:
        UserError: it is not a size.
    """
    said = os.environ.get("FEDLOOM_CACHE_LIMIT")
    if not said:
        return DEFAULT_LIMIT
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", said)
    if found is None or found[2].lower() not in _UNITS:
        raise UserError(f"FEDLOOM_CACHE_LIMIT {said!r}: not a size", "for example 5GB", "cache.limit")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def code_digest() -> str:
    """Of the source code in this folder: another version of fedloom finds nothing that this one prepared."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        digest.update(f"{file.relative_to(here)} {file_digest(file)}\n".encode())
    return digest.hexdigest()


class Entry:
    """An opened entry: its header and its files. `kept` says whether others can find it.

    `view` maps a file (pages come and go as the system likes); `read` copies a stretch, and leaves nothing mapped.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], kept: bool = True) -> None:
        self.header = header
        self.kept = kept
        self.sizes: dict[str, int] = {}
        self._handles: dict[str, int] = {}
        self._close = weakref.finalize(self, _close_all, self._handles)
        try:
            for name in header["files"]:
                self._handles[name] = os.open(folder / name, os.O_RDONLY)
                self.sizes[name] = os.fstat(self._handles[name]).st_size
        except BaseException:
            self._close()
            raise

    def view(self, name: str) -> memoryview:
        if not self.sizes[name]:
            return memoryview(b"")  # nothing cannot be mapped
        return memoryview(mmap.mmap(self._handles[name], self.sizes[name], access=mmap.ACCESS_READ))

    def read(self, name: str, begin: int, end: int) -> bytes:
        handle = self._handles[name]
        found = os.pread(handle, end - begin, begin)
        while len(found) < end - begin:  # a single call gives at most 2 GiB
            more = os.pread(handle, end - begin - len(found), begin + len(found))
            if not more:
                raise RunError(f"prepared data ends early: {name} at {begin + len(found):,}", code="cache.damaged")
            found += more
        return found

    def check(self) -> None:
        """Raise _DamagedError unless every file is as it was written."""
        for name, (size, digest) in self.header["files"].items():
            if self.sizes[name] != size:
                raise _DamagedError(f"{name} has {self.sizes[name]:,} bytes instead of {size:,}")
            if _digest(self._handles[name]) != digest:
                raise _DamagedError(f"{name} has other content than was written")


def _close_all(handles: Mapping[str, int]) -> None:
    for handle in handles.values():
        os.close(handle)


def _digest(handle: int) -> str:
    """SHA-256 of an open file, read rather than mapped, so that it does not count as this process's memory."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    at = 0
    while got := os.preadv(handle, [buffer], at):
        digest.update(buffer[:got])
        at += got
    return digest.hexdigest()


def prepared(kind: str, key: Mapping[str, Any], build: Build, *, keep: bool = True) -> Entry:
    """The entry made from `key`, which `build` makes if there is none.

    `key` is JSON, and says everything that the entry depends on; the code is added here. `build` is given an empty
    folder. With `keep=False`, and where the cache cannot be written, the files are this process's alone, and gone with
    it.

    Raises:
        RunError: the disk is full.
    """
    if not keep:
        return _unkept(build)
    full = json.loads(_json({**key, "kind": kind, "code": code_digest()}))
    home = cache_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(home, error) from error
        logger.warning("%s cannot be written (%s): data is prepared for this run alone", home, error.strerror)
        return _unkept(build)
    name = f"{kind}-{hashlib.sha256(_json(full).encode()).hexdigest()[:32]}"
    _used.add(name)
    entry = _found(home / name, full)
    if entry is not None:
        return entry
    with _locked(home, name) as alone:
        entry = _found(home / name, full)  # whoever held the lock may have made it
        if entry is None:
            if alone:
                _remove_leftovers(home, name)
            entry = _made(home, name, full, build)
    _evict(home)
    return entry


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _found(place: Path, key: Mapping[str, Any]) -> Entry | None:
    """The entry at `place`, checked; None when there is none, or when it is damaged and was thrown away."""
    try:
        try:
            header = _read_header(place / HEADER)
            if header["key"] != key:
                raise _DamagedError("its header is of another entry")
            entry = Entry(place, header)
            entry.check()
        except FileNotFoundError:
            if not place.is_dir():
                return None  # never there, or evicted a moment ago
            raise _DamagedError("a file is missing") from None
        except OSError as error:
            raise _DamagedError(f"it cannot be read: {error.strerror or error}") from error
    except _DamagedError as error:
        logger.warning("prepared data in %s is damaged (%s) and is made anew", place, error)
        _remove(place)
        return None
    with contextlib.suppress(OSError):
        os.utime(place / HEADER)  # used now
    return entry


def _read_header(path: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(path.read_bytes())
        header: Mapping[str, Any] = said["header"]
        whole = said["digest"] == hashlib.sha256(_json(header).encode()).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{HEADER} cannot be read") from error
    if not whole:
        raise _DamagedError(f"{HEADER} has other content than was written")
    return header


def _written(folder: Path, key: Mapping[str, Any], build: Build, kept: bool = True) -> Entry:
    """Build into a new folder, write its header, open it."""
    folder.mkdir()
    said = build(folder)
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = (path.stat().st_size, file_digest(path))
    header = json.loads(_json({**said, "key": key, "files": files}))
    (folder / HEADER).write_text(
        json.dumps({"digest": hashlib.sha256(_json(header).encode()).hexdigest(), "header": header}), encoding="utf-8"
    )
    return Entry(folder, header, kept)


def _made(home: Path, name: str, key: Mapping[str, Any], build: Build) -> Entry:
    aside = home / f".{name}.{uuid.uuid4().hex}.tmp"
    try:
        entry = _written(aside, key, build)
        try:
            os.rename(aside, home / name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Made by another process in the meantime, where there are no locks: theirs is as good, and ours is open.
            shutil.rmtree(aside, ignore_errors=True)
        return entry
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno in _NO_ROOM:
            raise _no_room(home, error) from error
        raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _unkept(build: Build) -> Entry:
    """Files without names: they are open, and go with the process however it ends."""
    outer = Path(tempfile.mkdtemp(prefix="fedloom-"))
    try:
        return _written(outer / "data", {}, build, kept=False)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(outer.parent, error) from error
        raise
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _no_room(place: Path, error: OSError) -> RunError:
    return RunError(
        f"prepared data does not fit in {place}: {_NO_ROOM[error.errno or 0]}",
        "make room (fedloom cache --clear), or name a folder on another disk: FEDLOOM_CACHE=FOLDER",
        "disk.full",
    )


@contextlib.contextmanager
def _locked(home: Path, name: str) -> Iterator[bool]:
    """Hold the lock of an entry while it is made; gives False where the file system has no locks.

    Entries share 256 locks, so that there are never more files of them than that.
    """
    handle = os.open(home / f".lock-{name.rpartition('-')[2][:2]}", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            logger.warning("another process is preparing data; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:  # no locks here: whoever comes second throws its own away
            alone = False
        yield alone
    finally:
        os.close(handle)


def _remove_leftovers(home: Path, name: str) -> None:
    """What a process that was killed left of this entry; only for the holder of its lock."""
    for path in home.glob(f".{name}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(place: Path) -> None:
    """Away with an entry, at once for everybody who looks for it."""
    gone = place.with_name(f".{place.name}.{uuid.uuid4().hex}.gone")
    with contextlib.suppress(OSError):
        os.rename(place, gone)
        shutil.rmtree(gone, ignore_errors=True)


# ---------------------------------------------------------------- how much there is


class Kept(NamedTuple):
    """An entry as it lies on the disk."""

    path: Path
    kind: str
    bytes: int
    used: float  # when it was last used, in seconds since 1970
    source: str  # what it was made from, in a few words


def entries() -> list[Kept]:
    """What is kept, the one used last first. Contents are not checked."""
    return sorted(_kept(cache_home()), key=lambda one: (-one.used, one.path.name))


def _kept(home: Path) -> Iterator[Kept]:
    if not home.is_dir():
        return
    for place in home.iterdir():
        if not _NAME.match(place.name):
            continue
        with contextlib.suppress(OSError):  # evicted as we look
            used = (place / HEADER).stat().st_mtime if (place / HEADER).exists() else place.stat().st_mtime
            size = sum(file.stat().st_size for file in place.iterdir())
            source = ""
            with contextlib.suppress(_DamagedError):
                source = str(_read_header(place / HEADER).get("source", ""))
            yield Kept(place, place.name.partition("-")[0], size, used, source)


def _evict(home: Path) -> None:
    """Remove what was not used for the longest time, until the rest is within the limit."""
    limit = cache_limit()
    found = sorted(_kept(home), key=lambda one: one.used)
    total = sum(one.bytes for one in found)
    for one in found:
        if total <= limit:
            return
        if one.path.name not in _used:
            _remove(one.path)
            total -= one.bytes
            logger.info("removed from the cache: %s (%s)", one.path.name, one.source)


def clear() -> tuple[int, int]:
    """Remove all entries and leftovers: how many entries, and how many bytes. Whoever uses one still can."""
    found = list(_kept(cache_home()))
    for one in found:
        _remove(one.path)
    for leftover in (*cache_home().glob(".*.gone"), *cache_home().glob(".*.tmp")):
        # One that is being made right now belongs to whoever holds its lock.
        with contextlib.suppress(OSError):
            handle = os.open(cache_home() / f".lock-{leftover.name.split('-')[1][:2]}", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(handle)
    return len(found), sum(one.bytes for one in found)
