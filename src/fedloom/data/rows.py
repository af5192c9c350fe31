"""Rows: files, folders, hub ids and built-in tasks, read into one shape.

A row is a dict with `kind`, the fields of that kind, and the original under `columns`:

    alpaca              instruction, input ("" when there is none), output
    chat                messages: [{"role", "content", and "train": False where no loss is wanted}, ...]
    prompt_completion   prompt, completion
    completion          text
    preference          chosen, rejected, and what they answer: see `fedloom.data.pairs`

`category` is there when the data has one, `file` (the file's stem) when several files were read. What cannot be used is
left out and counted by reason, never patched up: a missing `input` is "", a missing answer is a dropped row, and the
word "None" never appears. Files are read in a stream, and their rows written into a store on disk (`data/store.py`)
that is kept for the next time (`data/cache.py`). Imports neither numpy nor torch nor transformers, so that `fedloom
init` starts quickly.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import importlib
import itertools
import json
import logging
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from fedloom.data.cache import Entry, file_digest, prepared
from fedloom.data.json_stream import Text, list_items, object_lists, wrong
from fedloom.data.store import Row as Row  # noqa: PLC0414  the name is looked for here
from fedloom.data.store import Rows, RowWriter, from_entry
from fedloom.data.telling import Telling
from fedloom.errors import UserError, suggest
from fedloom.hub import leave_alone

logger = logging.getLogger("fedloom")

KINDS = ("preference", "chat", "alpaca", "prompt_completion", "completion")  # the first that fits is taken
REFUSED_KINDS = ("unpaired",)
SAMPLE = 100  # rows looked at to tell what a file holds: the first row alone is too often unlike the rest

# field -> the columns it is looked for in, in this order
_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "alpaca": {
        "instruction": ("instruction", "question"),
        "output": ("output", "response", "answer"),
        "input": ("input", "context"),
        "category": ("category",),
    },
    "chat": {"messages": ("messages", "conversations"), "category": ("category",)},
    "prompt_completion": {"prompt": ("prompt",), "completion": ("completion",), "category": ("category",)},
    "completion": {"text": ("text",), "category": ("category",)},
    "preference": {
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "messages": ("messages", "conversations"),
        "prompt": ("prompt",),
        "instruction": ("instruction", "question"),
        "input": ("input", "context"),
        "category": ("category",),
    },
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "preference": ("messages", "prompt", "instruction", "input", "category"),
}
_OFTEN_MISSING = ("input", "category")  # of every other kind
FIELDS = tuple(dict.fromkeys(name for names in _NAMES.values() for name in names))

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_GSM8K_MARKER = re.compile(r"\n?[ \t]*####[ \t]*([^\n]+?)\s*\Z")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*\Z")
Convert = Callable[[Mapping[str, Any]], "Mapping[str, Any] | LeftOut"]  # a raw row, read otherwise or left out
Parse = Callable[[Iterator[str]], Iterator[Mapping[str, Any]]]  # the lines of a text file -> raw rows

_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_NOT_DATA = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}  # what `datasets` puts beside


class LeftOut(str):
    """What `Convert` gives for a row that is not used: the reason it is counted under."""

    __slots__ = ()


@dataclass(frozen=True)
class Source:
    """What was read, and what was not.

    `rows` are the usable ones in the order of the files. `dropped` counts the others by reason, so that
    `read == len(rows) + sum(dropped.values())`. `files` are the stems of the files when there were several, else empty.
    `natural` is what a built-in task brings: client -> "train" | "validation" | "test" -> row numbers.
    """

    name: str
    kind: str
    rows: Rows
    read: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)  # field -> column it was read from
    natural: Mapping[str, Mapping[str, Sequence[int]]] | None = None
    task: Any = None  # the BuiltinTask, for its own scoring

    @property
    def said(self) -> str:
        """What is said aloud: "read as alpaca: 15,011 rows"."""
        left_out = sum(self.dropped.values())
        tail = f", {left_out:,} left out ({_counts(self.dropped)})" if left_out else ""
        return f"read as {self.kind}: {len(self.rows):,} row{'' if len(self.rows) == 1 else 's'}{tail}"


def read(
    path: str,
    *,
    type: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    exclude: Iterable[str] = (),
    files: Sequence[Path] | None = None,
    streams: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    parse: Parse | None = None,
    convert: Convert | None = None,
    cache: bool = True,
) -> Source:
    """Read `path`: a file, a folder, a glob, "builtin:NAME", or a hub id ("owner/name", needs `datasets`).

    `type` is "auto" or one of `KINDS`; `columns` maps fields to the data's own names. At most `limit` rows are read:
    the first ones of a file, and of several files the same number from each. `seed` is for built-in tasks, whose rows
    are made. `exclude` are files of the folder that are left alone (the test file, when it lies beside the others).

    For named sets: `files`, or the raw rows of `streams` by name, are read in place of what `path` names, which is then
    only a name for messages; `parse` makes rows of a text file; `convert` changes each raw row before it is looked at.
    `cache=False` neither looks for what was read before nor keeps it.

    Raises:
        UserError: nothing there, not readable, not UTF-8, not recognised, or no usable row; it names file and line.
    """
    if type not in ("auto", *KINDS):
        if type in REFUSED_KINDS:
            raise _refused(path, type)
        known = ("auto", *KINDS)
        raise UserError(f"data.type {type!r}: no such type{suggest(type, known)}", code="data.type")
    if limit is not None and limit < 1:
        raise UserError(f"data.limit {limit}: must be at least 1", code="data.limit")
    if path.startswith("builtin:"):
        return _read_builtin(path, limit=limit, seed=seed, paired=type == "preference")

    settings: dict[str, Any] = {"type": type, "columns": dict(columns or {}), "limit": limit}
    files = files_of(path, exclude) if files is None and streams is None else files
    if files is None:  # what a hub has under a name may change, so it is asked anew each time
        parts = {"": _hub_rows(path)} if streams is None else {name: _told(path, one) for name, one in streams.items()}
        openers: _Openers = [(name, lambda rows=rows: rows) for name, rows in parts.items()]  # type: ignore[misc]
        entry = prepared(
            "rows",
            {},
            lambda folder: _gather(path, openers, folder, convert=convert, one_file=len(parts) == 1, **settings),
            keep=False,
        )
        return _source(path, entry)
    names = _stems(files) if len(files) > 1 else [""]
    openers = [(name, partial(_file_rows, file, parse)) for name, file in zip(names, files, strict=True)]

    def build(folder: Path) -> dict[str, Any]:
        before = _stamps(files)
        made = _gather(path, openers, folder, convert=convert, one_file=len(files) == 1, **settings)
        changed = [file for file, stamp in before.items() if _stamps([file])[file] != stamp]
        if changed:
            raise UserError(f"{changed[0]}: the file changed while it was read", code="data.changed")
        return made

    key: dict[str, Any] = {**settings, "byteorder": sys.byteorder}
    key["files"] = [[name, _format_of(file), _digest_of(file)] for name, file in zip(names, files, strict=True)]
    if parse is not None or convert is not None:  # which are code of this package, and belong to the set's name
        key["set"] = [path, *(f"{one.__module__}.{one.__qualname__}" for one in (parse, convert) if one is not None)]
    return _source(path, prepared("rows", key, build, keep=cache))


def _told(path: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[_Raw]:
    return (_Raw(f"{path}, row {number:,}", row) for number, row in enumerate(rows, 1))


def _stamps(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """What changes when a file does, as far as a look tells."""
    found = {file: file.stat() for file in files}
    return {file: (one.st_mtime_ns, one.st_size) for file, one in found.items()}


def _digest_of(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _source(path: str, entry: Entry) -> Source:
    header = entry.header
    source = Source(
        name=path,
        kind=header["kind_of_rows"],
        rows=from_entry(entry),
        read=header["read"],
        dropped=header["dropped"],
        notes=tuple(header["notes"]),
        files=tuple(header["stems"]),
        columns=header["columns"],
    )
    logger.info("%s: %s", path, source.said)
    for note in source.notes:
        logger.info("%s", note)
    return source


def as_rows(rows: Sequence[Row]) -> Rows:
    """Any rows as a store, which they are already or are written into in memory."""
    if isinstance(rows, Rows):
        return rows
    writer = RowWriter(None, row_key)
    for row in rows:
        writer.append(row)
    return writer.rows()


def objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for each object of a file or folder as it is, for formats that are not rows to train on.

    Raises:
        UserError: nothing there, not readable, not UTF-8, or not an object with named fields; it names file and line.
    """
    files = files_of(path, ())
    if files is None:
        raise _missing(path, Path(path).expanduser())
    for file in files:
        for where, value in _file_rows(file):
            _check_object(where, value)
            yield where, value


def row_key(row: Row) -> bytes:
    """16 bytes that are equal for exact duplicates: the same content, whatever the category or the other columns."""
    content = {name: row[name] for name in _NAMES[row["kind"]] if name != "category" and name in row}
    text = json.dumps([row["kind"], content], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


# ---------------------------------------------------------------- from files to raw rows


class _Raw(NamedTuple):
    where: str  # "FILE, line 17"
    value: Any


def files_of(path: str, exclude: Iterable[str]) -> list[Path] | None:
    """The files that `path` names, sorted; None when it looks like a hub id.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    here = Path(path).expanduser()
    left_alone = {Path(other).expanduser().resolve() for other in exclude}
    if here.is_file():
        if _format_of(here) is None:
            raise UserError(
                f"{path}: not a format that is read",
                hint=f"files may end in {', '.join(_FORMATS)}, each but parquet also with .gz",
                code="data.format",
            )
        return [here]
    if here.is_dir():
        found = [file for file in here.iterdir() if _is_data(file)] or [
            file for file in here.rglob("*") if _is_data(file)
        ]
        files = sorted(file for file in found if file.resolve() not in left_alone)
        if not files:
            there = sorted(file.name for file in here.iterdir())
            listed = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
            raise UserError(
                f"{path}: no data file in this folder (it holds {listed or 'nothing'})",
                hint=f"files may end in {', '.join(_FORMATS)}, each but parquet also with .gz",
                code="data.empty_folder",
            )
        return files
    if any(mark in path for mark in "*?["):
        matches = sorted(Path(name) for name in glob.glob(str(here)))
        files = [file for file in matches if _is_data(file) and file.resolve() not in left_alone]
        if not files:
            raise UserError(f"{path}: no data file matches", code="data.missing")
        return files
    if _HUB_ID.match(path) and _format_of(here) is None and not here.parent.exists():
        return None
    raise _missing(path, here)


def _missing(path: str, here: Path) -> UserError:
    parent = here.parent
    while not parent.exists():
        parent = parent.parent
    if parent != here.parent:
        return UserError(
            f"{path}: no such file; the folder {here.parent} does not exist (only {parent} does)", code="data.missing"
        )
    names = [file.name for file in parent.iterdir() if file.is_dir() or _format_of(file) is not None]
    near = difflib.get_close_matches(here.name, names, n=3, cutoff=0.4)
    shown = near or sorted(names)[:8]
    there = f"; nearest in {parent}: {', '.join(shown)}" if shown else f"; {parent} holds no data files"
    return UserError(
        f"{path}: no such file or folder{there}",
        hint="data.path takes a file, a folder, builtin:NAME, or a hub id such as owner/name",
        code="data.missing",
    )


def _is_data(file: Path) -> bool:
    hidden = file.name.startswith((".", "_"))
    return file.is_file() and not hidden and file.name not in _NOT_DATA and _format_of(file) is not None


def _format_of(file: Path) -> str | None:
    name = file.name.lower()
    plain = name.removesuffix(".gz")
    for ending in _FORMATS:
        if plain.endswith(ending) and not (ending == ".parquet" and plain != name):
            return ending
    return None


def _stems(files: Sequence[Path]) -> list[str]:
    """One name per file: its stem, with as much of its folder or ending as it takes to be unique."""

    def stem(file: Path) -> str:
        name = file.name[: -len(".gz")] if file.name.lower().endswith(".gz") else file.name
        return Path(name).stem

    for naming in (
        stem,
        lambda file: f"{file.parent.name}_{stem(file)}",
        lambda file: f"{file.parent.name}_{file.name}",
    ):
        names = [naming(file) for file in files]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def _file_rows(file: Path, parse: Parse | None = None) -> Iterator[_Raw]:
    readers = {
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    ending = _format_of(file)
    try:
        if parse is not None:
            yield from (_Raw(f"{file}, row {number:,}", row) for number, row in enumerate(parse(_lines(file)), 1))
            return
        assert ending is not None
        yield from readers[ending](file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: damaged gzip file: {error}", code="data.damaged") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read: {error.strerror or error}", code="data.unreadable")


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with their ends; a byte order mark is taken off."""
    offset = 0
    with _open(file) as stream:
        for number, raw in enumerate(stream, 1):
            yield _decode(file, raw, offset, number)
            offset += len(raw)


def _decode(file: Path, raw: bytes, offset: int = 0, line: int = 1) -> str:
    """Decode strictly. `offset` and `line` say where in the file `raw` begins."""
    begin = 3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        return raw[begin:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = begin + error.start
        line += raw.count(b"\n", 0, at)
        guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") and offset == 0 else "WINDOWS-1252"
        likely = "it looks like UTF-16" if guess == "UTF-16" else "perhaps it is Windows-1252 or Latin-1"
        raise UserError(
            f"{file}: not UTF-8: byte 0x{raw[at]:02x} at offset {offset + at:,}, line {line:,} ({likely})",
            hint=f"convert it: iconv -f {guess} -t UTF-8 {file} > utf8_{file.name.removesuffix('.gz')}",
            code="data.encoding",
        ) from error


def _jsonl_rows(file: Path) -> Iterator[_Raw]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number:,}: not JSON: {error}",
                hint=f"look at it: sed -n {number}p {file}",
                code="data.malformed",
            ) from error
        yield _Raw(f"{file}, line {number:,}", value)


def _json_rows(file: Path) -> Iterator[_Raw]:
    """A list of rows, or an object with one list, or an object per line."""
    try:
        with _open(file) as stream:
            text = Text(stream, partial(_decode, file))
            first = text.skip()
            if first == "[":
                yield from _numbered(file, list_items(text))
            elif first == "{":
                yield from _object_rows(file, text)
                return
            elif first:
                value = text.value()
            if text.skip():
                raise wrong("Extra data", text)
            if first and first != "[":
                raise UserError(f"{file}: {_what(value)}; expected a list of objects", code="data.malformed")
    except RecursionError as error:
        raise UserError(f"{file}: not JSON that can be read: nested too deeply", code="data.malformed") from error
    except json.JSONDecodeError as error:
        line, column = text.place(error.pos)
        raise UserError(
            f"{file}, line {line:,}, column {column}: not JSON: {error.msg}",
            hint=f"look at it: sed -n {line}p {file}",
            code="data.malformed",
        ) from error


def _numbered(file: Path, values: Iterable[Any]) -> Iterator[_Raw]:
    for number, value in enumerate(values, 1):
        yield _Raw(f"{file}, row {number:,}", value)


def _object_rows(file: Path, text: Text) -> Iterator[_Raw]:
    """The rows of an object's only list. Which list that is, the whole file has to be seen for."""
    lists = [name for name, _ in object_lists(text)]
    if text.skip():
        # One object per line in a file called .json is common enough to be read as what it is.
        yield from _jsonl_rows(file)
        return
    if len(set(lists)) != 1:
        holds = f"{len(set(lists))} lists ({', '.join(sorted(set(lists)))})" if lists else "no list"
        raise UserError(
            f"{file}: an object with {holds}; expected a list of rows, or an object with one list",
            hint="one object per row is what is read: a list of objects, or one object per line in a .jsonl file",
            code="data.malformed",
        )
    with _open(file) as stream:
        again = Text(stream, partial(_decode, file))
        again.skip()
        for place, (_, values) in enumerate(object_lists(again), 1):
            if place == len(lists):  # of several with the same name the last one counts
                yield from _numbered(file, values)


def _csv_rows(file: Path) -> Iterator[_Raw]:
    # The default of 128 KiB per field is less than a long answer; C long is the most that csv takes.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(_lines(file), strict=True)
    header: list[str] = []
    try:
        for values in reader:
            where = f"{file}, line {reader.line_num:,}"
            if not values:
                continue
            if not header:
                header = [name.strip() for name in values]
                twice = [name for name, count in Counter(header).items() if count > 1]
                if twice:
                    raise UserError(f"{where}: column {twice[0]!r} is there twice", code="data.columns")
                if len(header) == 1 and re.search(r"[;\t]", header[0]):
                    mark = ";" if ";" in header[0] else "a tab"
                    raise UserError(
                        f"{where}: the columns seem to be separated by {mark}; fedloom reads commas",
                        hint="save it with commas, or as .jsonl",
                        code="data.columns",
                    )
                continue
            if len(values) > len(header):
                raise UserError(
                    f"{where}: {len(values)} values for {len(header)} columns ({', '.join(header)})",
                    hint="a value that has a comma or a line break needs double quotes around it",
                    code="data.malformed",
                )
            yield _Raw(where, dict(itertools.zip_longest(header, values)))
    except csv.Error as error:
        raise UserError(
            f"{file}, line {reader.line_num:,}: not CSV: {error}",
            hint="a double quote inside a quoted value is written twice",
            code="data.malformed",
        ) from error


def _parquet_rows(file: Path) -> Iterator[_Raw]:
    parquet = _extra("pyarrow.parquet", f"reading {file}")
    arrow_error = importlib.import_module("pyarrow").ArrowException
    number = 0
    try:
        # By default a whole row group is read ahead, which may be the whole file.
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            for batch in table.iter_batches(batch_size=128):
                for item in batch.to_pylist():
                    number += 1
                    yield _Raw(f"{file}, row {number:,}", item)
    except arrow_error as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{file}: not a readable parquet file: {first_line}", code="data.damaged") from error


def _hub_rows(name: str) -> Iterator[_Raw]:
    datasets = _extra("datasets", f"data.path {name!r} is no file here, and reading it from a hub")
    try:
        if leave_alone():
            raise ConnectionError("the hub cannot be reached from here")
        found = datasets.load_dataset(name)
    except Exception as error:  # whatever the network, the hub or the data set's own files come up with
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        folder = name.rpartition("/")[2]
        raise UserError(
            f"{name}: no such file or folder here, and not to be had from a hub: {reason}",
            hint=(
                f"on a machine that reaches the hub: hf download {name} --repo-type dataset --local-dir {folder}; "
                f"copy the folder here and say data.path={folder} (or the one file in it: data.path={folder}/FILE)"
            ),
            code="data.hub",
        ) from error
    if isinstance(found, Mapping):
        if "train" not in found and len(found) != 1:
            raise UserError(
                f"{name}: the splits are {', '.join(sorted(found))} and none is called train",
                hint="download it and name one file: data.path=FILE",
                code="data.hub",
            )
        found = found["train"] if "train" in found else next(iter(found.values()))
    for number, item in enumerate(found, 1):
        yield _Raw(f"{name}, row {number:,}", item)


def _extra(module: str, what: str) -> Any:
    """Import a module that only the extra `data` brings."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{what} needs {package}, which is not installed",
            hint="pip install 'fedloom[data]'; or give the data as .jsonl, .json or .csv",
            code="data.extra",
        ) from error


# ---------------------------------------------------------------- from raw rows to rows


class _Layout(NamedTuple):
    """How the raw rows of one file become rows: which columns each field is looked for in, in order."""

    kind: str
    columns: Mapping[str, tuple[str, ...]]


_Openers = Sequence[tuple[str, Callable[[], Iterator[_Raw]]]]  # the name of each file, and what reads it


class _DropError(Exception):
    """This row cannot be used; the argument is the reason it is counted under."""


def _gather(
    path: str,
    openers: _Openers,
    folder: Path,
    *,
    type: str,
    columns: Mapping[str, str],
    limit: int | None,
    convert: Convert | None = None,
    one_file: bool = True,
) -> dict[str, Any]:
    """Write the usable rows of all files into `folder`; gives what `_source` reads."""
    rows = RowWriter(folder, row_key)
    telling = Telling("read")
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    layouts: dict[str, _Layout] = {}
    read = 0
    for place, (name, open_rows) in enumerate(openers):
        # Of several files the same number from each: the first file alone may be a single client.
        share = None if limit is None else limit // len(openers) + (place < limit % len(openers))
        raw = _converted(itertools.islice(open_rows(), share), convert)
        sample = _first(raw)
        if not sample:
            if share == 0:
                continue
            raise UserError(f"{path if one_file else name}: empty, it has no rows", code="data.empty")
        for where, value in sample:
            _check_object(where, value)
        looked_at = [item.value for item in sample if not isinstance(item.value, LeftOut)]
        if not looked_at:
            counts = _counts(Counter(item.value for item in sample))
            raise UserError(f"{path}: not one of {len(sample):,} rows can be used ({counts})", code="data.no_rows")
        layout = layouts[name] = _recognise(path if one_file else name, looked_at, type, columns)
        first = next(iter(layouts.items()))
        if layout.kind != first[1].kind:
            raise UserError(
                f"{path}: {first[0]} reads as {first[1].kind}, but {name} as {layout.kind}",
                hint="keep files of one kind in a folder, or name the kind with data.type",
                code="data.mixed",
            )
        for where, value in itertools.chain(sample, raw):
            read += 1
            telling.tell(read)
            _check_object(where, value)
            if isinstance(value, LeftOut):
                dropped[str(value)] += 1
                continue
            try:
                row = _normalise(where, value, layout, notes)
            except _DropError as reason:
                dropped[str(reason)] += 1
                continue
            if name:
                row["file"] = name
            rows.append(row)
    kind = next(iter(layouts.values())).kind
    if not len(rows):
        raise UserError(
            f"{path}: read as {kind}, but not one of {read:,} rows can be used ({_counts(dropped)})",
            hint="if the fields are in other columns, say so: data.columns='{output: NAME}'",
            code="data.no_rows",
        )
    found = {name: names[0] for name, names in next(iter(layouts.values())).columns.items() if len(names) == 1}
    return {
        "source": path,
        "kind_of_rows": kind,
        "read": read,
        "dropped": dict(dropped),
        "notes": [f"{count:,} rows: {note}" for note, count in sorted(notes.items())],
        "stems": [name for name, _ in openers if name],
        "columns": found,
        "store": rows.finish(),
    }


def _converted(raw: Iterator[_Raw], convert: Convert | None) -> Iterator[_Raw]:
    if convert is None:
        yield from raw
        return
    for where, value in raw:
        _check_object(where, value)
        yield _Raw(where, convert(value))


def _first(raw: Iterator[_Raw]) -> list[_Raw]:
    """As many rows as it takes for `SAMPLE` of them to be usable."""
    found: list[_Raw] = []
    usable = 0
    while usable < SAMPLE and (item := next(raw, None)) is not None:
        found.append(item)
        usable += not isinstance(item.value, LeftOut)
    return found


def _check_object(where: str, value: Any) -> None:
    if not isinstance(value, (dict, LeftOut)):
        raise UserError(
            f"{where}: {_what(value)}; expected an object with named fields",
            hint='for example {"instruction": "...", "input": "...", "output": "..."}',
            code="data.malformed",
        )


def _recognise(
    where: str, sample: Sequence[Mapping[str, Any]], type: str, columns: Mapping[str, str] | None
) -> _Layout:
    """Decide from the first rows what they are."""
    filled = {name for row in sample for name, value in row.items() if not (_is_null(value) or value == "")}
    there = {name: None for row in sample for name in row}  # ordered as first met
    renamed = dict(columns or {})
    for name, column in renamed.items():
        if name not in FIELDS:
            raise UserError(f"data.columns.{name}: no such field{suggest(name, FIELDS)}", code="data.columns")
        if column not in there:
            raise UserError(
                f"{where}: data.columns.{name} is {column!r}, but there is no such column{suggest(column, there)}",
                hint=f"the columns are {', '.join(there)}",
                code="data.columns",
            )

    def look(kind: str) -> dict[str, tuple[str, ...]] | None:
        """Where each field of `kind` is, or None when one that must be there is not."""
        if any(name not in _NAMES[kind] for name in renamed):
            return None
        found: dict[str, tuple[str, ...]] = {}
        for name, candidates in _NAMES[kind].items():
            if name in renamed:
                found[name] = (renamed[name],)
                continue
            # A filled column goes before one that is only there (an empty `output` beside `response`).
            hits = [column for column in candidates if column in filled] or [c for c in candidates if c in there]
            if hits:
                found[name] = (hits[0],)
            elif name in _OPTIONAL.get(kind, _OFTEN_MISSING):
                found[name] = candidates  # it may still come in a later row
            else:
                return None
        return found

    asked = KINDS if type == "auto" else (type,)
    labelled = "label" in there and "prompt" in there and all(isinstance(row.get("label"), bool) for row in sample)
    if type == "auto" and labelled:
        raise _refused(where, "unpaired")
    for kind in asked:
        layout = look(kind)
        if layout is not None:
            return _Layout(kind, layout)
    expected = "; ".join(f"{kind} ({', '.join(_needed(kind))})" for kind in asked)
    example = ", ".join(f"{name}: COLUMN" for name in _needed("alpaca" if type == "auto" else type))
    raise UserError(
        f"{where}: the columns are {', '.join(there) or 'none'}; expected those of {expected}",
        hint=f"say which column is which: data.columns='{{{example}}}'",
        code="data.columns",
    )


def field_names(kind: str) -> tuple[str, ...]:
    """The fields that rows of this kind may have."""
    return tuple(_NAMES[kind])


def _needed(kind: str) -> list[str]:
    """The fields that rows of this kind must have."""
    return [name for name in _NAMES[kind] if name not in _OPTIONAL.get(kind, _OFTEN_MISSING)]


def _refused(where: str, kind: str) -> UserError:
    return UserError(
        f"{where}: this is {kind} data (answers with a label, good or bad); fedloom trains on answers to imitate",
        hint="to imitate one column of it, name it: data.type=prompt_completion data.columns.completion=COLUMN",
        code="data.unpaired",
    )


def _normalise(where: str, raw: Mapping[str, Any], layout: _Layout, notes: Counter[str]) -> Row:
    """One row; raises _DropError with a reason when it cannot be used."""
    kind, columns = layout
    row: Row = {"kind": kind}
    if kind == "chat":
        row["messages"] = _messages(where, raw, _value(raw, columns["messages"]), notes)
    elif kind == "preference":
        from fedloom.data.pairs import pair

        row |= pair(where, raw, {name: _value(raw, places) for name, places in columns.items()}, notes)
    elif kind == "prompt_completion" and isinstance(_value(raw, columns["prompt"]), list):
        # The conversational form: only the completion carries loss, also where the prompt has earlier answers.
        prompt = _messages(where, {}, _value(raw, columns["prompt"]), notes, answers_needed=False)
        completion = _messages(where, {}, _value(raw, columns["completion"]), notes)
        row["kind"] = "chat"
        row["messages"] = [
            {**one, "train": False} if one["role"] == "assistant" else one for one in prompt
        ] + completion
    else:
        for name in columns:
            if name == "category":
                continue
            text = _text(where, name, _value(raw, columns[name]))
            if not text.strip() and name != "input":
                raise _DropError(f"empty {name}")
            row[name] = text
        if kind == "alpaca":
            if not row["input"].strip():
                row["input"] = ""
            if columns["output"] == ("answer",):
                row["output"], marked = _GSM8K_MARKER.subn(_answer_sentence, row["output"])
                if marked:
                    notes["the marker '#### N' became 'The answer is N.'"] += 1
    category = _value(raw, columns["category"])
    if isinstance(category, (str, int, float)) and not _is_null(category) and str(category).strip():
        row["category"] = str(category).strip()
    row["columns"] = raw
    return row


def _answer_sentence(match: re.Match[str]) -> str:
    before = "\n" if match.start() > 0 else ""
    return f"{before}The answer is {match.group(1)}."


def _value(raw: Mapping[str, Any], columns: Sequence[str]) -> Any:
    for column in columns:
        if column in raw:
            return raw[column]
    return None


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(where: str, name: str, value: Any) -> str:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
            raise _DropError(f"broken Unicode in {name}") from None
        return value
    if _is_null(value):
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise UserError(f"{where}: {name} is {_what(value)}; expected text", code="data.field")


def _messages(
    where: str, raw: Mapping[str, Any], value: Any, notes: Counter[str], answers_needed: bool = True
) -> list[dict[str, Any]]:
    """OpenAI messages or ShareGPT conversations -> messages up to the last answer."""
    if _is_null(value) or value == []:
        raise _DropError("no messages")
    if isinstance(value, dict):  # one message, not in a list
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where}: the messages are {_what(value)}; expected a list of objects", code="data.field")
    messages: list[dict[str, Any]] = []
    system = raw.get("system")
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    for item in value:
        speaker = item.get("role", item.get("from"))
        role = _ROLES.get(str(speaker).lower())
        if role is None:
            raise UserError(
                f"{where}: a message of {speaker!r}{suggest(str(speaker), _ROLES)}",
                hint="a message is {'role': 'user' | 'assistant' | 'system' | 'tool', 'content': text}",
                code="data.field",
            )
        content = item.get("content", item.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        message: dict[str, Any] = {"role": role, "content": _text(where, "content", content)}
        if item.get("tool_calls"):
            message["tool_calls"] = item["tool_calls"]
        if item.get("train") is False:
            message["train"] = False
        if role == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise _DropError("empty answer")
        messages.append(message)
    if not answers_needed:
        return messages
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(one["role"] == "assistant" and one.get("train", True) for one in messages):
        raise _DropError("no answer")
    return messages


# ---------------------------------------------------------------- built-in tasks


def _read_builtin(path: str, *, limit: int | None, seed: int, paired: bool = False) -> Source:
    from fedloom.data.builtin import TASKS
    from fedloom.data.builtin.pairs import as_pair

    name = path.removeprefix("builtin:")
    if name not in TASKS:
        raise UserError(
            f"{path}: no such built-in task{suggest(name, TASKS)}",
            hint=f"built-in tasks: {', '.join('builtin:' + known for known in sorted(TASKS))}",
            code="data.builtin",
        )
    task = TASKS[name]
    made = task.rows(seed)
    total = sum(len(part) for parts in made.values() for part in parts.values())
    rows: list[Row] = []
    natural: dict[str, dict[str, Sequence[int]]] = {}
    for client, parts in made.items():
        natural[client] = {}
        for part, part_rows in parts.items():
            share = len(part_rows)
            if limit is not None and share:
                share = max(1, share * limit // total)
            natural[client][part] = range(len(rows), len(rows) + share)
            for row in part_rows[:share]:
                told = as_pair(name, row) if paired else row
                rows.append({"kind": "preference" if paired else "alpaca", "input": "", **told, "columns": row})
    kind = str(rows[0]["kind"])
    source = Source(name=path, kind=kind, rows=as_rows(rows), read=len(rows), natural=natural, task=task)
    logger.info("%s: %s", path, source.said)
    return source


# ---------------------------------------------------------------- words


def _what(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(value.__class__, f"a {value.__class__.__name__}")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in sorted(counts.items()))
