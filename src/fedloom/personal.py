"""Clients' personal state on disk, so that memory does not grow with how many clients have taken part.

`State.personal` is a mapping from client id to tree. In memory it is a dictionary; `OnDisk` is the same over one SQLite
file. A round adds a version to the file and leaves those before it as they are, so that a state stays what it was, and
a checkpoint notes a number instead of copying a million trees. A version that no checkpoint refers to any more goes.

    trees    client, version, chunk, superseded (the version that has another tree of this client), data (a wire frame)
    head     the newest whole version; rows beyond it are of a round that did not end

Trees are frames of `fedloom.wire` (safetensors, a checksum); nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from fedloom import wire
from fedloom.errors import RunError
from fedloom.types import Tree

__all__ = ["OnDisk", "Store", "joined", "staged"]

CHUNK_BYTES = 1 << 28  # SQLite's values end at 10^9 bytes
WAIT_SECONDS = 60.0  # for another process that writes
_SCHEMA = """
CREATE TABLE IF NOT EXISTS trees (
    client TEXT NOT NULL, version INTEGER NOT NULL, chunk INTEGER NOT NULL, superseded INTEGER, data BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS place ON trees (client, version, chunk);
CREATE INDEX IF NOT EXISTS old ON trees (superseded) WHERE superseded IS NOT NULL;
CREATE INDEX IF NOT EXISTS new ON trees (version);
CREATE TABLE IF NOT EXISTS head (version INTEGER NOT NULL);
"""


def staged(personal: Mapping[str, Tree]) -> MutableMapping[str, Tree]:
    """Where a round's new trees go as they come, to be `joined` when it ends."""
    return personal.staged() if isinstance(personal, OnDisk) else {}


def joined(personal: Mapping[str, Tree], new: Mapping[str, Tree]) -> Mapping[str, Tree]:
    """Both, `new` before what was; `personal` stays as it is."""
    return personal.joined(new) if isinstance(personal, OnDisk) else {**personal, **new}


class Store:
    """The file. One process writes; others may read at the same time."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = path, torch.device(device)
        self._opened: tuple[int, sqlite3.Connection] | None = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._opened is None or self._opened[0] != os.getpid():  # a connection must not cross a fork
            settings: Any = {"timeout": WAIT_SECONDS, "isolation_level": None, "check_same_thread": False}
            if self.path.exists() and not os.access(self.path, os.W_OK):
                db = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, **settings)
            else:
                db = sqlite3.connect(self.path, **settings)
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                db.executescript(_SCHEMA)
            self._opened = os.getpid(), db
        return self._opened[1]

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """
        Raises:
            RunError: the disk is full, or the file is damaged.
        """
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise RunError(
                f"{self.path}: {error}",
                hint="free some space, then go on with --resume" if "full" in str(error) else "",
                code="run.disk_full" if "full" in str(error) else "personal.file",
            ) from error

    @property
    def head(self) -> int:
        return int(self.execute("SELECT coalesce(max(version), 0) FROM head").fetchone()[0])

    def at(self, version: int) -> OnDisk:
        """The state of one version.

        Raises:
            RunError: the file does not have it.
        """
        if version > self.head:
            raise RunError(
                f"{self.path} ends with round {self.head}; the checkpoint is of round {version}",
                code="personal.version",
            )
        return OnDisk(self, version)

    def cut(self, version: int) -> OnDisk:
        """Give up what came after a version, and go on from there."""
        view = self.at(version)
        with self._at_once():
            self.execute("DELETE FROM trees WHERE version > ?", version)
            self.execute("UPDATE trees SET superseded = NULL WHERE superseded > ?", version)
            self._set_head(version)
        return view

    def write(self, client: str, version: int, tree: Tree) -> None:
        header = {"client": client, "names": list(tree)}
        frame = memoryview(wire.encode("personal", header, own=tree))
        with self._at_once():
            self.execute(
                "UPDATE trees SET superseded = ? WHERE client = ? AND superseded IS NULL AND version < ?",
                version,
                client,
                version,
            )
            self.execute("DELETE FROM trees WHERE client = ? AND version = ?", client, version)
            for chunk, begin in enumerate(range(0, len(frame), CHUNK_BYTES)):
                data = frame[begin : begin + CHUNK_BYTES]
                self.execute("INSERT INTO trees VALUES (?, ?, ?, NULL, ?)", client, version, chunk, data)

    def read(self, client: str, version: int) -> Tree | None:
        """The client's tree as of a version; None where it had none yet.

        Raises:
            RunError: what the file has of it is damaged.
        """
        found = self.execute(
            "SELECT version FROM trees WHERE client = ? AND version <= ? ORDER BY version DESC LIMIT 1", client, version
        ).fetchone()
        if found is None:
            return None
        rows = self.execute("SELECT data FROM trees WHERE client = ? AND version = ? ORDER BY chunk", client, found[0])
        try:
            message = wire.decode(b"".join(row[0] for row in rows))
            own = message.trees["own"]
            if message.header["client"] != client:
                raise KeyError("client")
            return {name: own[name].to(self.device) for name in message.header["names"]}
        except (RunError, KeyError, sqlite3.Error, TypeError) as error:
            raise RunError(
                f"{self.path}: the personal state of client {client!r} is damaged ({error})",
                hint="start the run anew with another output_dir",
                code="personal.damaged",
            ) from error

    def finish(self, version: int) -> None:
        """A version is whole."""
        self._set_head(version)

    def sync(self) -> None:
        """All that was written outlives a power cut."""
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def keep(self, versions: set[int]) -> None:
        """Remove trees that none of these versions, nor any later one, has."""
        old = self.execute("SELECT DISTINCT version, superseded FROM trees WHERE superseded IS NOT NULL").fetchall()
        newest = max(versions)
        gone = [(a, b) for a, b in old if b <= newest and not any(a <= kept < b for kept in versions)]
        with self._at_once():
            for version, superseded in gone:
                self.execute("DELETE FROM trees WHERE superseded = ? AND version = ?", superseded, version)

    def close(self) -> None:
        if self._opened is not None and self._opened[0] == os.getpid():
            self._opened[1].close()
        self._opened = None

    def _set_head(self, version: int) -> None:
        with self._at_once():
            self.execute("DELETE FROM head")
            self.execute("INSERT INTO head VALUES (?)", version)

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        """Everything inside, or nothing of it."""
        if self._db.in_transaction:
            yield
            return
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self.execute("COMMIT")


class OnDisk(Mapping[str, Tree]):
    """The personal state as of one version of a store; each tree is read when it is asked for."""

    def __init__(self, store: Store, version: int) -> None:
        self.store, self.version = store, version

    def __getitem__(self, client: str) -> Tree:
        found = self.store.read(client, self.version)
        if found is None:
            raise KeyError(client)
        return found

    def __contains__(self, client: object) -> bool:
        statement = "SELECT 1 FROM trees WHERE client = ? AND version <= ? LIMIT 1"
        return self.store.execute(statement, client, self.version).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        statement = "SELECT DISTINCT client FROM trees WHERE version <= ? ORDER BY client"
        return (str(row[0]) for row in self.store.execute(statement, self.version))

    def __len__(self) -> int:
        statement = "SELECT count(DISTINCT client) FROM trees WHERE version <= ?"
        return int(self.store.execute(statement, self.version).fetchone()[0])

    def __bool__(self) -> bool:
        return self.store.execute("SELECT 1 FROM trees WHERE version <= ? LIMIT 1", self.version).fetchone() is not None

    def staged(self) -> MutableMapping[str, Tree]:
        if self.store.head != self.version:  # another round has gone on from here: this one stays in memory
            return {}
        self.store.cut(self.version)  # what a round that failed has left
        return _Staged(self.store, self.version + 1)

    def joined(self, new: Mapping[str, Tree]) -> Mapping[str, Tree]:
        if self.store.head != self.version:
            return _Fork(self, dict(new))
        target = new if isinstance(new, _Staged) and new.store is self.store else self.staged()
        if target is not new:
            target.update(new)
        self.store.finish(self.version + 1)
        return OnDisk(self.store, self.version + 1)


class _Staged(MutableMapping[str, Tree]):
    """The trees of a round that goes on, in the file already."""

    def __init__(self, store: Store, version: int) -> None:
        self.store, self.version = store, version
        self.written: dict[str, None] = {}

    def __setitem__(self, client: str, tree: Tree) -> None:
        self.store.write(client, self.version, tree)
        self.written[client] = None

    def __getitem__(self, client: str) -> Tree:
        found = self.store.read(client, self.version) if client in self.written else None
        if found is None:
            raise KeyError(client)
        return found

    def __delitem__(self, client: str) -> None:
        raise TypeError("a client's new state is not taken back")

    def __iter__(self) -> Iterator[str]:
        return iter(self.written)

    def __len__(self) -> int:
        return len(self.written)


class _Fork(Mapping[str, Tree]):
    """What a second round from the same state gives: the new trees in memory, the others from the file."""

    def __init__(self, below: Mapping[str, Tree], own: Mapping[str, Tree]) -> None:
        self.below, self.own = below, own

    def __getitem__(self, client: str) -> Tree:
        return self.own[client] if client in self.own else self.below[client]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.below, *self.own]))

    def __len__(self) -> int:
        return sum(1 for _ in self)
