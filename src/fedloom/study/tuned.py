"""A run's outcome, opened again: to answer, to be scored on other data, to be exported."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedloom.data.catalog import CATALOG
from fedloom.data.federation import ClientData, Federation
from fedloom.data.listing import MOST_LISTED
from fedloom.data.rows import Row, as_rows, read
from fedloom.data.sources import sources_of
from fedloom.data.templates import layout_for
from fedloom.data.tokens import Examples, prompt_ids, tokenised
from fedloom.errors import RunError, UserError
from fedloom.evaluate.generate import Sampling, generate_one
from fedloom.models.load import Base, load_base, load_tokenizer
from fedloom.rounds import initial_state
from fedloom.runtimes import batched
from fedloom.study import checkpoint as checkpoints
from fedloom.study.blocks import AdapterRecipe, DataRecipe
from fedloom.study.build import adapter_of, algorithm_of, export_adapter, width_of
from fedloom.study.folder import RunFolder, find_runs, full_disk_explained, temporary_beside
from fedloom.study.load import read_recipe
from fedloom.study.measure import DEFAULT_NEW_TOKENS, measures, one_model
from fedloom.study.peft_settings import settings_of_peft
from fedloom.study.recipe import Recipe
from fedloom.study.result import ArmResult
from fedloom.study.session import device_name, open_session
from fedloom.types import Adapter, Client, State, Tree

__all__ = ["Evaluated", "Tuned", "base_name_of", "evaluate_run", "export_lora", "export_merged", "open_tuned"]

Which = Literal["best", "last"]  # of a run's checkpoints

# Merged weights are rounded to the dtype they are stored in; what that does to logits, as a share of their largest.
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Tuned:
    """A base model with a run's adapter on it."""

    folder: Path  # the adapter's
    base: Base
    adapter: Adapter
    tree: Tree
    kind: str  # what the rows of its training were: alpaca, chat, prompt_completion, completion
    chat_template: str
    max_new_tokens: int

    def prompt(self, messages: Sequence[Mapping[str, str]], input: str = "") -> list[int]:
        """Token ids before the answer to a conversation, as training had them before its answers.

        Args:
            messages: role and content of each turn, the last one the user's. Where training had single questions in
                the Alpaca layout or plain text, only the last turn counts.
            input: for rows of instruction, input and output.
        """
        last = messages[-1]["content"]
        row: Row
        if self.kind in ("completion", "prompt_completion"):
            row = {"kind": "prompt_completion", "prompt": last, "completion": ""}
        elif self.kind == "chat" or (len(messages) > 1 and self.remembers):
            row = {"kind": "chat", "messages": [*messages]}
        else:
            row = {"kind": "alpaca", "instruction": last, "input": input, "output": ""}
        [ids] = prompt_ids([row], self.base.tokenizer, self.chat_template)
        return ids

    @property
    def remembers(self) -> bool:
        """Whether earlier turns are part of a prompt: training had conversations, or the template has them."""
        return self.kind == "chat" or layout_for(self.base.tokenizer, self.chat_template) == "tokenizer"

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        input: str = "",
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        on_text: Any = None,
    ) -> str:
        """The answer as text; `on_text` gets each piece of it as it is written."""
        return generate_one(
            self.adapter,
            self.tree,
            self.prompt(messages, input),
            self.base.tokenizer,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            sampling=sampling,
            on_text=on_text,
        )


def open_tuned(
    run: Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    checkpoint: Which | None = None,
) -> Tuned:
    """Open a run folder, a PEFT adapter folder, or the model folder of a run that trained the model's own weights.

    Args:
        model: the base, where it now lies elsewhere than the run or the adapter says.
        dtype: of the base; the recipe's by default.
        quantization: of the base; the recipe's by default.
        checkpoint: one of the run's checkpoints in place of its `adapter/`; the run may be unfinished.

    Raises:
        UserError: there is no adapter or no such checkpoint, no base, or they do not match.
    """
    recipe = read_recipe(run).recipe if (run / "recipe.yaml").is_file() else None
    folder = adapter_folder(run) if checkpoint is None else None
    name_said, settings = ("", None) if folder is None else _settings(folder)
    if folder is None and recipe is None:
        raise UserError(f"{run} is no run, so it has no checkpoints", "leave --checkpoint out", "checkpoint.none")
    whole = folder is not None and is_model(folder)  # nothing of the base is needed
    if whole and model is not None:
        raise UserError(f"{folder} is a model itself: --model {model} has no meaning", "leave --model out", "eval.base")
    name = model or (recipe.model if recipe is not None and not whole else name_said)
    if not name:
        raise UserError(f"{folder} does not say which model it is for", "name it: --model FOLDER", "adapter.base")
    base = load_base(
        name,
        dtype=dtype or (recipe.dtype if recipe is not None else "auto"),
        quantization=quantization or (recipe.quantization if recipe is not None else "none"),
        trust_remote_code=recipe is not None and recipe.trust_remote_code,
        device=device_name(),
    )
    if folder is None or settings is None:
        assert recipe is not None and checkpoint is not None
        temporary = Path(tempfile.mkdtemp(prefix="fedloom-"))
        weakref.finalize(base, shutil.rmtree, temporary, ignore_errors=True)  # once nobody has the model any more
        folder = temporary / "adapter"
        _write_checkpoint(run, recipe, base, checkpoint, folder)
        _, settings = _settings(folder)
    # The folder's own rank and targets: a run that merged into the base exports more than the recipe's rank.
    try:
        adapter = adapter_of(base, Recipe(model=name, data=DataRecipe(path="-"), adapter=settings, local_steps=1))
    except UserError as error:
        if error.code != "adapter.targets":
            raise
        raise UserError(
            f"the adapter does not match the model {name}: {error.message}", error.hint, "adapter.mismatch"
        ) from error
    tree = adapter.init(0) if whole else load_tree(adapter, folder)
    facts: Mapping[str, Any] = RunFolder.look(run).read_facts() if recipe is not None else {}
    return Tuned(
        folder,
        base,
        adapter,
        tree,
        kind=str(facts.get("data", {}).get("read_as") or "alpaca"),
        chat_template=recipe.data.chat_template if recipe is not None else "auto",
        max_new_tokens=(recipe.evaluate.max_new_tokens if recipe is not None else None) or DEFAULT_NEW_TOKENS,
    )


def state_of(run: Path, recipe: Recipe, adapter: Adapter, which: Which) -> State:
    """The state in a checkpoint of the run's federated arm, or of its global arm where it has no federated one.

    Raises:
        UserError: the run has neither arm, or no such checkpoint yet. RunError: none is sound.
    """
    arm = next((arm for arm in ("federated", "global") if arm in recipe.arms), None)
    place = RunFolder.look(run).checkpoints(arm or "federated")
    if arm is None or not checkpoints.rounds(place):
        raise UserError(
            f"{run} has no checkpoint of a federated or global arm",
            f"fedloom run --resume {run}" if arm else "the arms of the recipe must have federated or global",
            "checkpoint.none",
        )
    template = initial_state(algorithm_of(recipe, arm), adapter, recipe.seed)
    return checkpoints.load(place, template, "best" if which == "best" else "newest")[0]


def _write_checkpoint(run: Path, recipe: Recipe, base: Base, which: Which, folder: Path) -> None:
    """A checkpoint as a PEFT folder. The base is left as it was."""
    adapter: Any = adapter_of(base, recipe)
    try:
        state = state_of(run, recipe, adapter, which)
        adapter.sync(state.base)
        export_adapter(adapter, recipe, state.params, folder)
    finally:
        if hasattr(adapter, "detach"):  # the hooks of the other kinds do nothing while nothing is bound
            adapter.detach()


def base_name_of(run: Path) -> str:
    """The base of a run folder, or of a PEFT adapter folder.

    Raises:
        UserError: it does not say.
    """
    if (run / "recipe.yaml").is_file():
        return read_recipe(run).recipe.model
    name, _ = _settings(run)
    if not name:
        raise UserError(f"{run} does not say which model it is for", "name it: --model FOLDER", "adapter.base")
    return name


def adapter_folder(run: Path) -> Path:
    """Where a run's adapter lies, or its model where that is what was trained.

    Raises:
        UserError: there is none; the message names runs that have one.
    """
    if (run / "adapter_config.json").is_file() or is_model(run):
        return run
    if (run / "adapter" / "adapter_config.json").is_file():
        return run / "adapter"
    if is_model(run / "model"):
        return run / "model"
    if not run.is_dir():
        RunFolder.look(run)  # no such folder at all: says which runs there are
    nearby = [other for other in find_runs(run.parent) or find_runs(Path("runs")) if (other / "adapter").is_dir()]
    having = f"; runs with one here: {', '.join(map(str, nearby[:6]))}" if nearby else ""
    unfinished = (run / "recipe.yaml").is_file() and not (run / "result.json").is_file()
    raise UserError(
        f"no adapter in {run}{having}",
        f"fedloom run --resume {run}" if unfinished else "the arms of the recipe must have federated or global",
        "adapter.missing",
    )


def is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model, and no adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def load_tree(adapter: Adapter, folder: Path) -> Tree:
    """An adapter folder's parameters.

    Raises:
        UserError: they are not made for this model.
    """
    loader: Any = adapter  # every kind that writes PEFT folders reads them
    tree: Tree = loader.load(folder)
    return tree


def _settings(folder: Path) -> tuple[str, AdapterRecipe]:
    """(base model, settings) that a PEFT adapter folder says. A model is its own base, with every weight as trained."""
    if is_model(folder):
        return str(folder), AdapterRecipe(kind="full")
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = settings_of_peft(config, folder)
    except UserError as error:
        raise UserError(f"{folder}: {error.message}", error.hint, error.code) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "; ".join(str(error).splitlines()[:3])
        raise UserError(
            f"{path}: not the settings of an adapter that is read here: {reason}", code="adapter.config"
        ) from error
    return str(config.get("base_model_name_or_path") or ""), settings


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluated:
    """What was measured, and on what."""

    data: str
    score_name: str
    rows: int
    outcome: ArmResult


def evaluate_run(
    run: Path,
    *,
    data: str | None = None,
    base_only: bool = False,
    limit: int | None = None,
    score: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    checkpoint: Which | None = None,
) -> Evaluated:
    """Measure a run's model on its own test rows, or on all rows of other data.

    Args:
        data: a file, a folder, a hub id or a named set; built-in tasks and sets that have test rows stand for those.
            None: the run's own test rows.
        base_only: the untouched base in place of the tuned model.
        limit: test rows that are scored, per client.
        score: another score than the recipe's.
        batch_size: examples in one pass, other than the recipe's.
        threads: torch's, other than the recipe's.
        checkpoint: one of the run's checkpoints in place of its `adapter/`; the run may be unfinished.

    Raises:
        UserError: no adapter, or no such checkpoint, or the data cannot be read, or the score does not exist.
    """
    recipe = read_recipe(RunFolder.look(run).recipe).recipe
    changes: dict[str, Any] = {"tasks": [], **({"limit": limit} if limit is not None else {})}
    changes |= {"score": score} if score is not None else {}
    changes |= {"eval_batch_size": batch_size} if batch_size is not None else {}
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)})
    if threads is not None:
        recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"threads": threads})})
    folder = None if base_only or checkpoint is not None else adapter_folder(run)
    if folder is not None and recipe.start_from is not None:  # it holds both adapters, a checkpoint the new one
        folder, checkpoint = None, recipe.checkpoint.export or "last"
    if folder is not None:  # its own rank: a run that merged into the base exports more than the recipe's
        recipe = recipe.model_copy(update={"adapter": Recipe(**_only_adapter(recipe, folder)).adapter})
    session = open_session(recipe)
    adapter = session.adapter
    algorithm = algorithm_of(recipe)
    state = initial_state(algorithm, adapter, recipe.seed)
    if folder is not None:
        state = replace(state, params=load_tree(adapter, folder))
    elif checkpoint is not None and not base_only:
        state = state_of(run, recipe, adapter, checkpoint)
    federation = session.federation if data is None else _only_tests(session.federation, recipe, data)
    measured = measures(recipe, federation)
    owners = federation.ids if len(federation.ids) <= MOST_LISTED else federation.having("test")
    clients = [Client(owner, ()) for owner in owners]
    runtime = batched(width_of(recipe, session.federation, session.base))
    outcome = one_model(runtime.evaluate(algorithm, adapter, state, clients, measured.own))
    rows = int(federation.sizes("test").sum())
    return Evaluated(data or recipe.data.label, measured.score, rows, outcome)


def _only_adapter(recipe: Recipe, folder: Path) -> dict[str, Any]:
    return {"model": recipe.model, "data": DataRecipe(path="-"), "adapter": _settings(folder)[1], "local_steps": 1}


def _only_tests(federation: Federation, recipe: Recipe, data: str) -> Federation:
    """Other data as a federation of one whose rows are all for testing."""
    settings = recipe.data
    if data in CATALOG:
        source, tests = sources_of(DataRecipe(name=data), recipe.seed)
        source = tests or source
    else:
        same = Path(data).suffix == Path(settings.path).suffix  # other names of columns belong to the run's own files
        source = read(data, columns=settings.columns if same else None, seed=recipe.seed)
    paired = source.kind == "preference"
    if paired and not federation.paired:
        raise UserError(
            f"{data}: pairs of a chosen and a rejected answer; what is measured here are answers to imitate",
            hint="data in another form; a run's own recipe may name one column: data.columns.completion=chosen",
            code="data.preference",
        )
    rows = source.rows
    if source.natural is not None:
        rows = as_rows([rows[row] for parts in source.natural.values() for row in parts.get("test", ())])
    done = tokenised(
        rows,
        federation.tokenizer,
        max_length=settings.max_length,
        chat_template=settings.chat_template,
        cache=settings.cache,
        name=data,
    )
    every = Examples(done.tokens, np.arange(0, len(done.tokens), 2 if paired else 1))
    client = ClientData(Path(data).stem or "all", every[:0], every[:0], every)
    report = replace(federation.report, read_as=source.kind)
    return replace(federation, clients={client.id: client}, rows=rows, task=source.task, report=report)


# ---- exporting -------------------------------------------------------------------------------------------------------


def export_lora(run: Path, destination: Path, *, model: str | None = None, checkpoint: Which | None = None) -> None:
    """Write the adapter as a PEFT folder, checked against the base it is for.

    Raises:
        UserError: no adapter, it does not match the model, or the destination is taken. RunError: the disk is full.
    """
    tuned = open_tuned(run, model=model, checkpoint=checkpoint)

    def write(place: Path) -> None:
        tuned.adapter.export(tuned.tree, place)

    _write_whole(destination, write)


def export_merged(run: Path, destination: Path, *, model: str | None = None, checkpoint: Which | None = None) -> float:
    """Write the base with the adapter added to its weights: an ordinary model folder, in the dtype of the base's own.

    The weights are those of the base's own files in full precision, also where the adapter was trained on them in 8 or
    4 bits: answers then differ from the run's by what quantisation did to the base.

    Returns:
        The largest difference of the written model's logits from the run's, as a share of the largest logit.

    Raises:
        UserError: no adapter, it does not match the model, or the destination is taken.
        RunError: the disk is full, or the written model does not answer as the run does; nothing is left behind.
    """
    # float32: the sum is rounded once, when it is stored; the weights are the original ones, whatever was trained on
    tuned = open_tuned(run, model=model, dtype="float32", quantization="none", checkpoint=checkpoint)
    base = tuned.base
    adapter: Any = tuned.adapter  # every kind merges, or says why it cannot
    stored = _stored_dtype(base)
    probe_BT = _probe(base)
    wanted = _logits(tuned, probe_BT)
    difference = 0.0

    def write(place: Path) -> None:
        nonlocal difference
        adapter.merge(tuned.tree)
        merged: Any = base.model.to(stored)
        merged.save_pretrained(place)
        load_tokenizer(base.name, pad=False).save_pretrained(place)
        again = load_base(str(place), dtype=stored, device=base.device)
        with torch.no_grad():
            found = again.model(input_ids=probe_BT).logits.double()
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if not difference <= MERGE_TOLERANCE[stored]:
            raise RunError(
                f"the merged model answers otherwise than the run: logits differ by {difference:.2g} of the largest",
                "export the adapter instead: --format lora",
                "export.differs",
            )

    _write_whole(destination, write)
    return difference


def _stored_dtype(base: Base) -> torch.dtype:
    """The dtype of the base's own files; float32 stands for float16, which no model is loaded in here."""
    config = json.loads((Path(base.folder or base.name) / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _probe(base: Base) -> Tensor:
    """A few token ids of the vocabulary, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    size = int(getattr(base.model.config, "vocab_size", 2))
    return torch.randint(0, size, (2, 16), generator=generator).to(base.device)


def _logits(tuned: Tuned, probe_BT: Tensor) -> Tensor:
    with torch.no_grad(), tuned.adapter.bound({name: leaf[None] for name, leaf in tuned.tree.items()}) as model:
        logits: Tensor = model(input_ids=probe_BT).logits.double()
        return logits


def _write_whole(destination: Path, write: Any) -> None:
    """Let `write` fill a folder that appears at the destination whole or not at all."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists already; nothing was written", "name another folder", "file.exists")
    if not destination.resolve().parent.is_dir():
        parent = destination.parent
        raise UserError(f"{parent}: no such folder", f"mkdir -p {parent}", "file.folder")
    place = temporary_beside(destination)
    try:
        with full_disk_explained(destination):
            place.mkdir()
            write(place)
            if destination.is_dir():
                destination.rmdir()
            place.rename(destination)
    finally:
        shutil.rmtree(place, ignore_errors=True)
