"""Checkpoints of a run's state, written so that a kill at any moment leaves a sound one.

    FOLDER/round_00012/state.safetensors      params/..., server/..., base/..., personal/<number>/...
                       state.json             round, seed, clients' ids by number, checksums, what the runner adds
           best.json                          the round that is best so far
           personal.sqlite                    clients' personal state, where it lies on disk: a version per round

A checkpoint is written to a temporary sibling, every file and folder is synced, and one rename makes it appear. Reading
checks sizes before anything is allocated, then checksums; nothing is unpickled. Client ids may hold any characters, so
they are kept in the JSON file, never in a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from fedloom import tree
from fedloom.errors import RunError, UserError
from fedloom.personal import OnDisk, Store
from fedloom.study.folder import (
    full_disk_explained,
    json_text,
    remove_leftovers,
    sync_folder,
    temporary_beside,
    write_all,
    write_atomic,
)
from fedloom.types import State, Tree

__all__ = ["PERSONAL", "best_round", "load", "rounds", "save"]

logger = logging.getLogger("fedloom")

SCHEMA = 1
WITH_STORE = 2  # the personal state is a version of the store beside it
TENSORS = "state.safetensors"
FACTS = "state.json"
BEST = "best.json"
PERSONAL = "personal.sqlite"
_NAME = re.compile(r"^round_(\d{5,})$")
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_MAX_FACTS_BYTES = 1_000_000_000
_CHUNK_BYTES = 1 << 22

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Damaged(Exception):
    """What is wrong with a checkpoint, as a clause."""


# --------------------------------------------------------------------------------------------------------- writing


def save(folder: Path, state: State, extra: Mapping[str, Any], keep_last: int, best: bool) -> Path:
    """Write `state` as a checkpoint of `folder`, then remove older ones.

    Args:
        folder: the arm's checkpoints; made when missing. Only one process may write there (the run folder's lock).
        extra: anything JSON has a form for; `load` gives it back.
        keep_last: how many of the newest stay, at least 1. The best one stays besides.
        best: this one is the best so far.

    Returns:
        The new checkpoint's folder.

    Raises:
        RunError: the disk is full; the checkpoints before are as they were.
        TypeError, ValueError: the state or `extra` holds something that cannot be written; nothing was.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least the newest checkpoint has to stay")
    target = folder / f"round_{state.round:05d}"
    store = _store_of(state, folder)
    clients = [] if store is not None else list(state.personal)
    tensors = _tensors(state, clients)
    header = _header(tensors)
    facts: dict[str, Any] = {
        "schema": SCHEMA if store is None else WITH_STORE,
        "round": state.round,
        "seed": state.seed,
        "best": best,
        "clients": clients,
        "extra": dict(extra),
    }
    json_text(facts, where="extra")  # objections come before anything is written

    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    temporary = temporary_beside(target)
    with full_disk_explained(target, "the checkpoints before it are untouched"):
        folder.mkdir(parents=True, exist_ok=True)
        for parent in made:
            sync_folder(parent.parent)
        remove_leftovers(folder)
        if store is not None:
            store.sync()
        try:
            temporary.mkdir()
            facts["bytes"], facts["sha256"] = _write_tensors(temporary / TENSORS, header, tensors)
            facts["checksum"] = _checksum(facts)
            write_atomic(temporary / FACTS, json_text(facts) + "\n")
            sync_folder(temporary)
            _put_in_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    if best:
        write_atomic(folder / BEST, json_text({"round": state.round}) + "\n")
    _prune(folder, state.round, keep_last)
    if store is not None:
        store.keep(set(rounds(folder)))
    return target


def _store_of(state: State, folder: Path) -> Store | None:
    """The store of `folder` that has the personal state; one that lies elsewhere is copied like any other mapping."""
    personal = state.personal
    if not isinstance(personal, OnDisk) or personal.store.path.parent.absolute() != folder.absolute():
        return None
    if personal.version != state.round:
        raise ValueError(f"the personal state is of round {personal.version}, the state of round {state.round}")
    return personal.store


def _tensors(state: State, clients: list[str]) -> dict[str, Tensor]:
    parts = {
        "params": tree.flatten(dict(state.params)),
        "server": tree.flatten(state.server),
        "base": tree.flatten(dict(state.base)),
        **{f"personal/{number:08d}": tree.flatten(dict(state.personal[id])) for number, id in enumerate(clients)},
    }
    return {f"{part}/{name}": value for part, flat in parts.items() for name, value in flat.items()}


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The head of a safetensors file: its length (8 bytes), then JSON, padded so that data starts aligned."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            raise TypeError(f"a checkpoint cannot hold {name}: it is of type {value.dtype}")
        size = value.numel() * value.element_size()
        entries[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(
            f"a checkpoint cannot hold {len(entries):,} tensors: their names alone are {len(text):,} bytes"
        )
    return len(text).to_bytes(8, "little") + text


def _write_tensors(path: Path, header: bytes, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write tensor by tensor, so that no second copy of the state is in memory. Returns size and sha256."""
    digest = hashlib.sha256()
    size = 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for data in itertools.chain([memoryview(header)], map(_raw, tensors.values())):
            write_all(handle, data)
            digest.update(data)
            size += len(data)
        os.fsync(handle)
    finally:
        os.close(handle)
    return size, digest.hexdigest()


def _raw(value: Tensor) -> memoryview:
    """A tensor's bytes in row-major order."""
    plain = value.detach().to("cpu").contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")


def _checksum(facts: Mapping[str, Any]) -> str:
    """sha256 of the facts without their checksum, in a form that reading and writing again does not change."""
    body = {key: value for key, value in facts.items() if key != "checksum"}
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _put_in_place(temporary: Path, target: Path) -> None:
    if target.exists():  # of an earlier life of the run, which went on from an older round
        aside = temporary_beside(target)
        os.rename(target, aside)
        os.rename(temporary, target)
        sync_folder(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, target)
        sync_folder(target.parent)


def _prune(folder: Path, now: int, keep_last: int) -> None:
    there = rounds(folder)
    kept = {round for round in there if round <= now}
    kept = set(sorted(kept)[-keep_last:])
    best = best_round(folder)
    if best is not None:
        kept.add(best)
    for round in there:
        # Rounds after this one belong to a life of the run that was given up: they were damaged, or this would not be.
        if round not in kept:
            path = folder / f"round_{round:05d}"
            aside = temporary_beside(path)  # renamed first: a kill half way through must not leave half a checkpoint
            with contextlib.suppress(OSError):
                os.rename(path, aside)
                shutil.rmtree(aside, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- reading


def rounds(folder: Path) -> list[int]:
    """Rounds that have a checkpoint in `folder`, sound or not, in ascending order; none when there is no folder."""
    if not folder.is_dir():
        return []
    matches = (_NAME.match(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def best_round(folder: Path) -> int | None:
    """The best checkpoint's round; None when none was said to be the best, or it is gone.

    The checkpoints themselves say it, and best.json repeats it for people: a kill between the two changes nothing.
    """
    return max(_marked_best(folder), default=None)


def _marked_best(folder: Path) -> list[int]:
    """Rounds whose checkpoint says that it was the best when it was written, in ascending order."""
    marked = []
    for round in rounds(folder):
        with contextlib.suppress(_Damaged):
            if _read_facts(folder / f"round_{round:05d}", round)["best"]:
                marked.append(round)
    return marked


def load(folder: Path, template: State, which: Literal["newest", "best"] = "newest") -> tuple[State, dict[str, Any]]:
    """The newest sound checkpoint, or the best one, as (state, extra). Tensors land where the template's params are.

    A damaged checkpoint is named in a warning and the one before it is used. `params` and `server` must match the
    template in names, shapes and dtypes, and so must the personal trees of clients that the template has; `base` and
    other clients' personal trees grow with the rounds and come back as they were saved.

    Raises:
        RunError: there is no checkpoint, or none is sound (or not the best one).
        UserError: the checkpoint is sound but is of another model, adapter, method or seed; all differences are listed.
    """
    there = _marked_best(folder) if which == "best" else rounds(folder)
    if not there:
        marked = " marked as the best" if which == "best" else ""
        raise RunError(f"there is no checkpoint{marked} in {folder}", code="checkpoint.none")
    reasons: list[str] = []
    for round in reversed(there):
        path = folder / f"round_{round:05d}"
        try:
            facts = _read_facts(path, round)
            flat = _read_tensors(path / TENSORS, facts)
            kept = _stored(folder, facts, template)
        except _Damaged as damage:
            reasons.append(f"{path.name}: {damage}")
            logger.warning("checkpoint %s is damaged: %s; it is passed over", path, damage)
            continue
        if reasons:
            logger.warning("going on from %s instead", path)
        state = _state(path, facts, flat, template)
        return state if kept is None else replace(state, personal=kept), facts["extra"]
    raise RunError(
        f"no checkpoint in {folder} is sound: " + "; ".join(reasons),
        "start the run anew with another output_dir",
        code="checkpoint.damaged",
    )


def _stored(folder: Path, facts: Mapping[str, Any], template: State) -> OnDisk | None:
    if facts["schema"] == SCHEMA:
        return None
    if not (folder / PERSONAL).is_file():
        raise _Damaged(f"{PERSONAL} is missing")
    like = template.personal  # a run that goes on has opened the file already
    store = like.store if isinstance(like, OnDisk) else Store(folder / PERSONAL, _device(template))
    try:
        return store.at(facts["round"])
    except RunError as error:
        raise _Damaged(str(error)) from error


def _read_facts(path: Path, round: int) -> dict[str, Any]:
    file = path / FACTS
    try:
        size = file.stat().st_size
        if size > _MAX_FACTS_BYTES:
            raise _Damaged(f"{FACTS} has {size:,} bytes")
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _Damaged(f"{FACTS} is missing") from None
    except OSError as error:
        raise _Damaged(f"{FACTS} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{FACTS} is no JSON ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("checksum"), str):
        raise _Damaged(f"{FACTS} has no checksum")
    if facts.get("schema") not in (SCHEMA, WITH_STORE):
        raise _Damaged(f"{FACTS} has the schema {facts.get('schema')!r}, this version reads up to {WITH_STORE}")
    if _checksum(facts) != facts["checksum"]:
        raise _Damaged(f"{FACTS} does not match its checksum")
    if facts["round"] != round:
        raise _Damaged(f"{FACTS} is of round {facts['round']}")
    return facts


def _read_tensors(path: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise _Damaged(f"{TENSORS} has {size:,} bytes instead of {facts['bytes']:,}")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise _Damaged(f"{TENSORS} claims a header of {length:,} bytes")
            names = file.read(length)
            file.seek(0)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != facts["sha256"]:
            raise _Damaged(f"{TENSORS} does not match its checksum")
        found = safetensors.torch.load_file(path)
        # In the order of writing, since sums over leaves round by order; and each a copy of its own, since the file may
        # be removed or replaced while the state lives on.
        return {name: found[name].clone() for name in json.loads(names)}
    except FileNotFoundError:
        raise _Damaged(f"{TENSORS} is missing") from None
    except OSError as error:
        raise _Damaged(f"{TENSORS} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise _Damaged(f"{TENSORS} cannot be read: {error}") from error


def _state(path: Path, facts: Mapping[str, Any], flat: Mapping[str, Tensor], template: State) -> State:
    device = _device(template)
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "server": {}, "base": {}}
    personal: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(facts["clients"]))}
    for key, value in flat.items():
        part, _, name = key.partition("/")
        if part == "personal":
            digits, _, name = name.partition("/")
            personal[int(digits)][name] = value.to(device)
        else:
            parts[part][name] = value.to(device)

    objections: list[str] = []
    if facts["seed"] != template.seed:
        objections.append(f"seed is {facts['seed']}, the run's is {template.seed}")

    def match(what: str, like: Any, saved: Mapping[str, Tensor]) -> Any:
        try:
            return tree.unflatten(like, saved)
        except ValueError as error:
            objections.extend(f"{what}: {one}" for one in str(error).split("; "))
            return like

    params = match("params", dict(template.params), parts["params"])
    server = match("server", template.server, parts["server"])
    trees: dict[str, Tree] = {}
    for number, id in enumerate(facts["clients"]):
        like = template.personal.get(id)
        saved = personal[number]
        trees[id] = _names(saved) if like is None else match(f"personal of {id}", dict(like), saved)
    if objections:
        raise UserError(
            f"{path} does not fit this run:\n  - " + "\n  - ".join(objections),
            "a run goes on only with the recipe it began with; for another one choose a new output_dir",
            code="checkpoint.mismatch",
        )
    return State(
        seed=facts["seed"],
        round=facts["round"],
        params=params,
        server=server,
        personal=trees,
        base=_names(parts["base"]),
    )


def _device(template: State) -> torch.device:
    return next((value.device for value in template.params.values()), torch.device("cpu"))


def _names(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the escapes that `tree.flatten` gives to names, for a tree that has no template."""
    return {name.replace("~1", "/").replace("~0", "~"): value for name, value in flat.items()}
