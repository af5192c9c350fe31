"""Benchmark tasks on anything that answers: a run, a PEFT adapter folder, a plain model, and the base of the first two.

target = open_target("runs/mine")                      # or a folder, a hub id, "builtin"
asked = [ask("gsm8k"), ask("boolq", Path("own.json"))] # files are read and checked before any model is loaded
results = [measure(target, one, out=Path("eval")) for one in asked]
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fedloom.errors import UserError
from fedloom.evaluate.tasks.base import Item, Task, TaskSettings
from fedloom.evaluate.tasks.run import Bindable, OnProgress, TaskResult, answerer_of, find_task, rescore, run_task
from fedloom.models.load import BUILTIN, Base, load_base
from fedloom.ops.host import tune_host
from fedloom.study.folder import RunFolder, json_text, write_atomic
from fedloom.study.load import read_recipe
from fedloom.study.session import device_name
from fedloom.study.tuned import Which, base_name_of, open_tuned
from fedloom.types import Tree

__all__ = ["Asked", "PlainModel", "Target", "ask", "file_name", "kind_of", "measure", "open_target", "score_again"]

Kind = Literal["run", "adapter", "model"]


class PlainModel:
    """A model with nothing bound to it, for whoever expects an adapter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextlib.contextmanager
    def bound(self, tree_C: Tree) -> Iterator[nn.Module]:
        yield self.model


@dataclass(frozen=True)
class Target:
    """What is measured."""

    name: str
    kind: Kind
    base: Base
    adapter: Bindable
    tree: Tree
    chat_template: str
    home: Path | None  # where a run's measurements are kept
    about: dict[str, Any]  # what files of items say of it


@dataclass(frozen=True)
class Asked:
    """A task with its items read."""

    task: Task
    source: Path | None
    settings: TaskSettings


# ---- what is measured ------------------------------------------------------------------------------------------------


def kind_of(name: str) -> Kind:
    """What a target's name means.

    Raises:
        UserError: there is such a folder, and it is none of the three; or there is none, where one must be.
    """
    path = Path(name).expanduser()
    if name == BUILTIN:
        return "model"
    if (path / "recipe.yaml").is_file():
        return "run"
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if path.is_dir() and not (path / "config.json").is_file():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise UserError(
            f"{name} is neither a run, nor an adapter, nor a model: it holds {there}",
            "a run has recipe.yaml, a PEFT adapter adapter_config.json, a model config.json",
            "eval.target",
        )
    if not path.exists() and path.parent != Path(".") and path.parent.is_dir():
        RunFolder.look(path)  # says which runs there are
    return "model"


def open_target(
    name: str,
    *,
    base_only: bool = False,
    model: str | None = None,
    dtype: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    threads: int | Literal["auto"] | None = None,
    checkpoint: Which | None = None,
) -> Target:
    """Load what is to be measured.

    Args:
        name: a run folder, a PEFT adapter folder, or a model (a folder, a hub id, "builtin").
        base_only: the untouched base of a run or an adapter.
        model: the base, where it now lies elsewhere than the run or the adapter says.
        dtype: of the base; by default the recipe's, or auto.
        chat_template: how questions are laid out; by default the recipe's, or auto.
        threads: torch's; by default the recipe's, or auto.
        checkpoint: one of a run's checkpoints in place of its `adapter/`.

    Raises:
        UserError: there is nothing of this name, or it does not fit together.
    """
    kind = kind_of(name)
    path = Path(name).expanduser()
    if kind == "model" and (base_only or model is not None) and name != BUILTIN and not path.exists():
        RunFolder.look(path)  # there is nothing; says which runs there are
    if checkpoint is not None and (kind != "run" or base_only):
        what = "the base" if base_only else f"{name}, which is no run"
        raise UserError(f"--checkpoint {checkpoint} has no meaning for {what}", "leave it out", "checkpoint.none")
    if kind == "model" and base_only:
        raise UserError(f"{name} is a model without an adapter already", "leave --base out", "eval.base")
    if kind == "model" and model is not None:
        raise UserError(f"{name} is a model itself: --model {model} has no meaning", "leave --model out", "eval.base")
    recipe = read_recipe(path).recipe if kind == "run" else None
    tune_host(threads or (recipe.runtime.threads if recipe is not None else "auto"))
    layout = chat_template or (recipe.data.chat_template if recipe is not None else "auto")
    home = path / "eval" if kind == "run" else None
    about = {"target": name, "kind": kind, "chat_template": layout}
    if kind == "model" or base_only:
        found = model or (name if kind == "model" else base_name_of(path))
        try:
            base = load_base(
                found,
                dtype=dtype or (recipe.dtype if recipe is not None else "auto"),
                quantization=recipe.quantization if recipe is not None else "none",
                trust_remote_code=trust_remote_code or (recipe is not None and recipe.trust_remote_code),
                device=device_name(),
            )
        except UserError as error:
            if kind != "model" or path.exists() or name == BUILTIN:
                raise
            message = f"{name} is no folder of a run or an adapter here, so it must be a model: {error.message}"
            raise UserError(message, error.hint, error.code) from error
        about |= {"base": base.name, "dtype": _dtype(base), "measured": "base" if base_only else "model"}
        where = home / "base" if home is not None else None
        return Target(name, kind, base, PlainModel(base.model), {}, layout, where, about)
    tuned = open_tuned(path, model=model, dtype=dtype, checkpoint=checkpoint)
    if checkpoint is not None:
        about |= {"checkpoint": checkpoint}
        home = None if home is None else home / checkpoint
    weights = _sha256_of(sorted(tuned.folder.glob("*.safetensors")))
    about |= {"base": tuned.base.name, "dtype": _dtype(tuned.base), "measured": "tuned", "adapter_sha256": weights}
    return Target(name, kind, tuned.base, tuned.adapter, tuned.tree, layout, home, about)


def _sha256_of(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(2**20):
                whole.update(piece)
    return whole.hexdigest()


def _dtype(base: Base) -> str:
    return str(base.dtype).removeprefix("torch.")


# ---- measuring -------------------------------------------------------------------------------------------------------


def ask(name: str, source: Path | None = None, settings: TaskSettings | None = None) -> Asked:
    """A task, its files read and its settings checked.

    Raises:
        UserError: there is no such task, or its files are not there or are something else, or a setting is wrong.
    """
    settings = settings or TaskSettings()
    task = find_task(name)
    items = list(task.load(source, settings))

    def loaded(source: Path | None, settings: TaskSettings) -> Sequence[Item]:
        return items

    return Asked(replace(task, load=loaded), source, settings)


def measure(
    target: Target,
    asked: Asked,
    *,
    batch_size: int = 16,
    out: Path | None = None,
    on_progress: OnProgress | None = None,
) -> TaskResult:
    """Measure one task, and write its items and a summary into the folder `out`.

    Raises:
        UserError: an item does not suit the model. RunError: out of memory, or the disk is full.
    """
    answerer = answerer_of(
        target.adapter,
        target.tree,
        target.base.tokenizer,
        batch_size=batch_size,
        chat_template=target.chat_template,
        on_progress=on_progress,
    )
    file = None if out is None else out / f"{file_name(asked.task.name, asked.settings)}.jsonl"
    about = {**target.about, "batch_size": batch_size}
    result = run_task(asked.task, answerer, source=asked.source, settings=asked.settings, out=file, about=about)
    if file is not None:
        _write_summary(file, {**result.to_json(), "settings": _plain(asked.settings), "model": about})
    return result


def score_again(file: Path, out: Path | None = None) -> TaskResult:
    """Judge the answers in a file of items again, without the model; the folder `out` gets both files anew.

    Raises:
        UserError: it is no such file, or `out` is where it lies.
    """
    if out is not None and (out / file.name).resolve() == file.resolve():
        raise UserError(f"{file} would be written over", "name another folder", "file.exists")
    result = rescore(file, None if out is None else out / file.name)
    if out is not None:
        _write_summary(out / file.name, result.to_json())
    return result


def _write_summary(file: Path, summary: dict[str, Any]) -> None:
    write_atomic(file.with_suffix(".json"), json_text(summary, where=file.name) + "\n")


def file_name(task: str, settings: TaskSettings) -> str:
    """A name for a measurement: other settings, another file, so that none is written over by a quick try."""
    parts = [
        f"{value}{word}" if word == "shot" else f"{word}{value}"
        for word, value in (
            ("shot", settings.num_fewshot),
            ("limit", settings.limit),
            ("tokens", settings.max_new_tokens),
            ("samples", settings.samples),
            ("seed", settings.seed or None),
        )
        if value is not None
    ]
    if settings.extra:
        own = json_text(dict(settings.extra), indent=None)
        parts.append(hashlib.sha256(own.encode()).hexdigest()[:8])
    safe = "".join(char if char.isalnum() or char in "-_." else "-" for char in task)
    return "_".join([safe, *parts])


def _plain(settings: TaskSettings) -> dict[str, Any]:
    return {**asdict(settings), "extra": dict(settings.extra)}
