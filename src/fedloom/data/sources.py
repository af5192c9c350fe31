"""Training and test rows of a recipe's block `data`: of a path, or of a set of the catalogue by its name.

A named set is looked for in this order: `data.path` (a file, or a folder in a published form), its place below
`data_home()`, a hub. Files at their place are held to the published checksums; a copy that is named may differ, and it
is said when it does.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedloom.data.catalog import LOCAL, File, Form, Hub, NamedSet, find_set
from fedloom.data.languages import code_search_net, with_language
from fedloom.data.places import data_home
from fedloom.data.rows import Convert, Parse, Source, field_names, files_of, read
from fedloom.data.speeches import speeches
from fedloom.errors import UserError
from fedloom.hub import leave_alone

__all__ = ["Found", "find_files", "sources_of", "state_of", "what_to_fetch"]

PARSERS: Mapping[str, Parse] = {"speeches": speeches}
CONVERSIONS: Mapping[str, Convert] = {"with_language": with_language, "code_search_net": code_search_net}


class DataSettings(Protocol):
    """What is read here of the recipe's block `data`."""

    @property
    def name(self) -> str | None: ...
    @property
    def path(self) -> str: ...
    @property
    def test_path(self) -> str | None: ...
    @property
    def type(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str] | None: ...
    @property
    def test_set_size(self) -> float | None: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def cache(self) -> bool: ...


class Found(NamedTuple):
    """The files of a named set on this machine. `form` is None when they are in no form that is published."""

    place: Path
    form: Form | None
    train: Sequence[Path]
    test: Sequence[Path]


def sources_of(data: DataSettings, seed: int) -> tuple[Source, Source | None]:
    """The rows to train on, and the test rows where they are given apart.

    Raises:
        UserError: nothing there, not readable, or not what the other is.
    """
    if data.name is None or data.name == LOCAL:
        source, tests = _of_path(data, seed)
    else:
        source, tests = _of_set(data, find_set(data.name), seed)
    if tests is not None and tests.kind != source.kind:
        raise UserError(f"{source.name} reads as {source.kind}, but {tests.name} as {tests.kind}", code="data.mixed")
    return source, tests


def _of_path(data: DataSettings, seed: int) -> tuple[Source, Source | None]:
    beside = [data.test_path] if data.test_path else []
    settings: dict[str, Any] = {"type": data.type, "columns": data.columns, "limit": data.limit, "cache": data.cache}
    source = read(data.path, **settings, seed=seed, exclude=beside)
    if not data.test_path:
        return source, None
    if source.natural is not None:
        raise UserError(
            f"data.test_path is set, but {data.path} brings its own test rows",
            hint="leave it out",
            code="data.test_path",
        )
    return source, read(data.test_path, **settings, seed=seed)


# ---------------------------------------------------------------- named sets


def _of_set(data: DataSettings, entry: NamedSet, seed: int) -> tuple[Source, Source | None]:
    own = dict(data.columns or {})
    fits = data.type in ("auto", entry.kind) and (entry.kind == "auto" or set(own) <= set(field_names(entry.kind)))
    kind = entry.kind if fits else data.type
    columns = {**entry.columns, **own} if fits else own

    def take(label: str, **where: Any) -> Source:
        source = read(
            label,
            type=kind,
            columns=columns,
            limit=data.limit,
            cache=data.cache,
            seed=seed,
            parse=PARSERS[entry.parse] if entry.parse else None,
            convert=CONVERSIONS[entry.convert] if entry.convert else None,
            **where,
        )
        return replace(source, dropped=_merged(source.dropped))

    wants_own_tests = data.test_path is None and data.test_set_size is None
    found = find_files(entry, data.path or None)
    if found is None and data.path:
        raise _missing(entry, f"there is no {data.path}")
    if found is None:
        source, tests = _of_hub(entry, take, wants_own_tests)
    else:
        source = _noted(take(_label(entry, found.train, found.place), files=found.train), entry, found, data)
        tests = None
        if found.form is not None and found.form.test and wants_own_tests:
            if not found.test:
                raise _without_tests(entry, found)
            tests = take(_label(entry, found.test, found.place), files=found.test)
        elif found.test:
            which = "test_path" if data.test_path is not None else "test_set_size"
            names = ", ".join(path.name for path in found.test[:3])
            source = replace(source, notes=(*source.notes, f"{names} is not read: data.{which} says what is tested on"))
    if data.test_path is not None:
        given = find_files(replace(entry, forms=()), data.test_path)
        if given is None:
            raise UserError(f"data.test_path: there is no {data.test_path}", code="data.missing")
        tests = take(data.test_path, files=given.train)
    return source, tests


def _merged(dropped: Mapping[str, int]) -> dict[str, int]:
    """Reasons "WHAT: WHICH" as one per WHAT, the most frequent first: many languages are one line, not ten."""
    found: dict[str, dict[str, int]] = {}
    for reason, count in dropped.items():
        what, _, which = reason.partition(": ")
        found.setdefault(what, {})[which] = count
    merged = {}
    for what, parts in found.items():
        order = sorted((one for one in parts.items() if one[0]), key=lambda one: (-one[1], one[0]))
        listed = ", ".join(f"{which} {count:,}" for which, count in order[:4])
        more = f" and {len(order) - 4} more" if len(order) > 4 else ""
        merged[f"{what} ({listed}{more})" if listed else what] = sum(parts.values())
    return merged


def _label(entry: NamedSet, files: Sequence[Path], place: Path) -> str:
    return f"{entry.name} ({files[0] if len(files) == 1 else place})"


def find_files(entry: NamedSet, given: str | None) -> Found | None:
    """Where the set's files lie: at `given` (a file or a folder), else below `data_home()`; None when nowhere.

    Raises:
        UserError: the folder that is given holds nothing that can be read.
    """
    place = Path(given).expanduser() if given else data_home() / entry.folder
    if place.is_file():
        known = next((form for form in entry.forms if place.name in [file.name for file in form.train]), None)
        return Found(place, Form(known.train) if known is not None else None, [place], [])
    for form in entry.forms:
        train = [_matches(place, file) for file in form.train]
        if all(train):
            test = [_matches(place, file) for file in form.test]
            return Found(place, form, [*chain(*train)], [*chain(*test)] if all(test) else [])
    if given is None or not place.is_dir():
        return None
    return Found(place, None, files_of(str(place), ()) or [], [])


def _matches(place: Path, file: File) -> list[Path]:
    return sorted(one for one in place.glob(file.name) if one.is_file())


def _noted(source: Source, entry: NamedSet, found: Found, data: DataSettings) -> Source:
    """The source, with what is to be said of its files.

    Raises:
        UserError: a file at its place is not the published one.
    """
    notes = []
    for path, file in _known(found):
        if file.sha256 is None or _is_published(path, file):
            continue
        if not data.path:
            raise UserError(
                f"{path} is not the file that was published as {file.name} (another sha256)",
                hint=f"fetch it again from {file.url}; or say data.path={path}, to read it as it is",
                code="data.checksum",
            )
        notes.append(f"{path} is not {entry.name} as published (another sha256)")
    published = sum(file.rows or 0 for file in found.form.train) if found.form is not None else 0
    if published and not notes and data.limit is None and source.read != published:
        notes.append(f"{source.read:,} rows, where {entry.name} as published has {published:,}")
    return replace(source, notes=(*source.notes, *notes))


def _known(found: Found) -> Iterator[tuple[Path, File]]:
    if found.form is not None:
        files = {file.name: file for file in (*found.form.train, *found.form.test)}
        for path in (*found.train, *found.test):
            if path.name in files:
                yield path, files[path.name]


def _is_published(path: Path, file: File) -> bool:
    if file.size is not None and path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256


def state_of(folder: Path, file: File) -> str:
    """In words: whether a published file lies in its folder, and whether it is what was published."""
    there = _matches(folder, file)
    if not there:
        return "not here"
    if file.sha256 is None:
        return "here" if len(there) == 1 else f"here, {len(there)} files"
    return "here, as published" if _is_published(there[0], file) else "here, with another sha256"


def _without_tests(entry: NamedSet, found: Found) -> UserError:
    assert found.form is not None
    names = ", ".join(file.name for file in found.form.test)
    return UserError(
        f"{entry.name}: {found.place} has its training rows, but not its test rows ({names})",
        hint=f"{what_to_fetch(entry, test=True)}; or test on a part of the training rows: data.test_set_size=0.1",
        code="data.missing",
    )


# ---------------------------------------------------------------- from a hub


def _of_hub(entry: NamedSet, take: Callable[..., Source], wants_own_tests: bool) -> tuple[Source, Source | None]:
    hub = entry.hub
    if hub is None:
        raise _missing(entry, "its files are not on this machine, and no hub has it")
    if leave_alone():
        raise _missing(entry, "its files are not on this machine, and the hub cannot be reached from here")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise _missing(entry, "its files are not on this machine, and datasets, which reads hubs, is not installed",
                       "pip install 'fedloom[data]' to read it from a hub") from error  # fmt: skip
    parts = [hub.train] + ([hub.test] if wants_own_tests and hub.test is not None else [])
    several = len(hub.configs) > 1
    rows = [
        {
            (config or "") if several else "": _hub_part(datasets, entry, hub, config, part)
            for config in hub.configs or (None,)
        }
        for part in parts
    ]
    label = f"{entry.name} ({hub.id}{'@' + hub.revision[:8] if hub.revision else ''})"
    source = take(label, streams=rows[0])
    if hub.revision is None:
        source = replace(source, notes=(*source.notes, f"{hub.id} is not pinned: another day it may have other rows"))
    return source, take(label, streams=rows[1]) if len(rows) > 1 else None


def _hub_part(datasets: Any, entry: NamedSet, hub: Hub, config: str | None, part: str) -> Any:
    try:
        return datasets.load_dataset(hub.id, config, data_dir=hub.data_dir, split=part, revision=hub.revision)
    except Exception as error:  # whatever the network, the hub or the data set's own files come up with
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _missing(
            entry, f"its files are not on this machine, and {hub.id} is not to be had from a hub: {reason}"
        ) from error


def _missing(entry: NamedSet, what: str, more: str = "") -> UserError:
    home = data_home() / entry.folder
    looked = " or ".join(str(home / file.name) for form in entry.forms for file in form.train)
    return UserError(
        f"{entry.name}: {what} (looked for {looked})",
        hint="; or ".join(filter(None, [
            what_to_fetch(entry), f"say data.path=FILE for a copy elsewhere (data.name={entry.name} stays)",
            "set FEDLOOM_DATA to the folder that holds such folders", more,
        ])),
        code="data.missing",
    )  # fmt: skip


def what_to_fetch(entry: NamedSet, test: bool = False) -> str:
    """Which file to fetch from where, and where to put it."""
    home = data_home() / entry.folder
    form = entry.forms[0]
    files = [file for file in (form.test if test else (*form.train, *form.test)) if file.url]
    if not files:
        return f"fetch it from {entry.published} and put it into {home}"
    steps = [f"{file.url} to {home / file.name}" for file in files]
    return f"fetch {' and '.join(steps)} ({entry.licence})"
