"""What a run's numbers depend on, as one short name: the recipe, the data and the model it reads, and the code.

Two runs with the same name have the same numbers up to rounding, so one of them is enough. Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fedloom.data.catalog import CATALOG
from fedloom.data.places import data_home
from fedloom.errors import UserError
from fedloom.evaluate.tasks import TASKS, find_task
from fedloom.study.recipe import Recipe, resolved_json

__all__ = ["code_digest", "content_id", "path_digest"]

# Keys that say where a run lies, how fast it is or who is told, and not what comes out.
WITHOUT_EFFECT = (
    "name",
    "output_dir",
    "runtime.threads",
    "runtime.personal_state",
    "checkpoint.save_rounds",
    "checkpoint.save_total_limit",
    "report_to",
    "data.cache",
    "project",
)

# Modules of fedloom that show numbers and make none.
SHOWS = (
    "cli/",
    "recipes/",
    "__main__.py",
    *(
        f"study/{name}"
        for name in (
            "aliases", "compare", "draw", "findings", "foreign", "identity", "load", "objections", "page", "partition",
            "pictures", "progress", "report", "statistics", "suite", "trackers/", "tuned", "yaml_text",
        )
    ),
)  # fmt: skip

WHOLE_BYTES = 512 * 2**20  # larger files are known by their size, their time and a part of their content
PART_BYTES = 4 * 2**20


def content_id(recipe: Recipe) -> str:
    """A name of 16 hexadecimal digits for what a recipe will give here and now.

    The files it reads are read; a hub id stands for itself, so that a new revision of it is not noticed.
    """
    said = resolved_json(recipe)
    for key in WITHOUT_EFFECT:
        block, _, leaf = key.rpartition(".")
        (said.get(block) or {} if block else said).pop(leaf, None)
    named = _texts([said.get(key) for key in ("model", "data", "evaluate")])
    files = {text: Path(text) for text in named if _is_path(text)} | _published(recipe)
    content = {
        "recipe": said,
        "files": {name: path_digest(path) for name, path in sorted(files.items())},
        "code": code_digest(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _published(recipe: Recipe) -> dict[str, Path]:
    """Files that are read from their usual place: those of a data set by name, and of benchmarks."""
    found: dict[str, Path] = {}
    name = recipe.data.name
    if name is not None and name in CATALOG:
        from fedloom.data.sources import find_files

        with contextlib.suppress(UserError):  # what is missing is the run's own to tell
            there = find_files(CATALOG[name], recipe.data.path or None)
            if there is not None:
                found |= {f"{name}/{path.name}": path for path in (*there.train, *there.test)}
    for task in recipe.evaluate.tasks:
        if task in TASKS and task not in recipe.evaluate.task_paths:
            places = (data_home() / place for place in find_task(task).places)
            found |= {f"task {task}": place for place in itertools.islice(filter(Path.exists, places), 1)}
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _is_path(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):
        return False


def path_digest(path: Path) -> str:
    """Of a file's content, or of all files in a folder with their names."""
    if path.is_file():
        status = path.stat()
        return _file_digest(str(path), status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        parts = file.relative_to(path).parts
        if not any(part.startswith(".") for part in parts):
            digest.update(f"{'/'.join(parts)}\0{path_digest(file)}\0".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            while chunk := file.read(2**20):
                digest.update(chunk)
        else:
            digest.update(str(changed).encode())
            digest.update(file.read(PART_BYTES))
            file.seek(-PART_BYTES, 2)
            digest.update(file.read(PART_BYTES))
    return digest.hexdigest()


@functools.cache
def code_digest() -> str:
    """Of fedloom's own files that make numbers, the built-in model among them."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root).as_posix()
        if "__pycache__" in name or name.startswith(SHOWS) or not file.is_file():
            continue
        if file.suffix in (".py", ".json", ".safetensors"):
            digest.update(f"{name}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
