"""The lm-evaluation-harness at work. Imports it: import this in functions only (see `harness`).

The harness makes the questions, judges the answers and sums up; the model answers through this package's operators
(`harness_model`). Randomness is the harness's own (few-shot draws from seed 1234, and so on), so that numbers compare
with published ones; a seed of ours other than 0 moves all of it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import constants
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import std as bars

from fedloom.data.places import data_home
from fedloom.errors import FedloomError, RunError, UserError
from fedloom.evaluate.harness import MEAN, PREFIX, Known, described, is_path, known, named_by, unsafe
from fedloom.evaluate.harness_model import HarnessModel, RecordedModel, Said
from fedloom.evaluate.tasks.base import Item, TaskSettings, Write, check_settings
from fedloom.evaluate.tasks.run import Answerer, ModelAnswerer, TaskResult, header_of, write_lines
from fedloom.hub import hub_is_offline

__all__ = ["Loaded", "configuration", "index_of", "rescored", "run_harness"]

CUT = "cut_on_the_left"  # items whose question lost its start to fit
RESAMPLES = 1000  # for errors without a formula; the harness's 100,000 take minutes in one process
PACKAGED = ("json", "csv", "parquet", "text", "arrow")  # readers of local files, where a data set's name would stand

logger = logging.getLogger("fedloom")


@dataclass(frozen=True)
class Loaded:
    """A task or group as the harness has it, with its data."""

    name: str
    source: Path | None
    settings: TaskSettings
    title: str  # the harness's own name for it
    tasks: dict[str, Any]
    groups: dict[str, Any]

    @classmethod
    def of(cls, name: str, source: Path | None, settings: TaskSettings) -> Loaded:
        """Load by name, or from a YAML file.

        Args:
            source: a copy of the task's data set, in place of the cache or the hub.

        Raises:
            UserError: there is no such task, its data cannot be had, or a setting is of no use.
            RunError: the harness failed.
        """
        check_settings(PREFIX + name, settings, "num_fewshot", "max_new_tokens", extra=("apply_chat_template",))
        _wants_template(settings)
        path = Path(name).expanduser() if is_path(name) else None
        with _quiet(), _own_randomness(settings.seed), _explained(PREFIX + name):
            manager, spec = (_all_tasks(), name) if path is None else _beside(path)
            with contextlib.ExitStack() as stack:
                if path is None:  # which may fetch more than data: a metric, say
                    stack.enter_context(_offline())
                stack.enter_context(_data_at_hand(PREFIX + name, source, None if path is None else path.parent))
                found = manager.load([spec])
            tasks, groups = dict(found["tasks"]), dict(found.get("groups") or {})
            for one, task in tasks.items():
                _prepare(one, task, settings)
        within = {child for group in groups.values() for child in group.child_names}
        [title] = [one for one in groups or tasks if one not in within]
        return cls(name, source, settings, title, tasks, groups)

    @property
    def asked(self) -> tuple[str, Path | None, TaskSettings]:
        return self.name, self.source, self.settings

    def items(self) -> Iterator[Item]:
        """One per document; what is asked about it, the harness says when it runs."""
        for name, task in self.tasks.items():
            for number in range(min(len(task.eval_docs), self.settings.limit or len(task.eval_docs))):
                yield Item(f"{name}/{number}", Write("", 1), None, name)


def run_harness(
    loaded: Loaded, answerer: Answerer, *, out: Path | None = None, about: Mapping[str, Any] | None = None
) -> TaskResult:
    """Measure what was loaded, and write the file of items to `out`.

    Raises:
        UserError: it does not suit the model. RunError: the harness failed, or what it measured is no number.
    """
    if not isinstance(answerer, ModelAnswerer):
        raise TypeError("the harness asks about tokens, which only a model's own answerer knows")
    started = time.perf_counter()
    settings = loaded.settings
    templated = _wants_template(settings)
    model = HarnessModel(answerer, max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    found = _evaluated(loaded, model, templated)
    result = _result(loaded, found["results"])
    notes = {CUT: len(model.cut)} if model.cut else {}
    result = replace(result, seconds=time.perf_counter() - started, notes=notes, file=out)
    if out is not None:
        header = header_of(result, settings, loaded.source, about)
        header |= {"harness": {"version": version("lm_eval"), "asked_for": loaded.name, "chat_template": templated}}
        write_lines(out, [header, *_lines(found["samples"], model)])
    return result


def rescored(header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], out: Path | None = None) -> TaskResult:
    """Judge the answers of a file of items again: the harness asks, and the file answers.

    Raises:
        UserError: the task or its data are not here, or have changed since.
    """
    said: dict[tuple[str, int], list[Said]] = {}
    for line in lines:
        said[line["group"], _number(line)] = [
            Said(kind, (line["prompt"] if context is None else context, *rest), answer)
            for (kind, context, *rest), answer in zip(line["requests"], line["answers"], strict=True)
        ]
    source = None if header["source"] is None else Path(header["source"])
    loaded = Loaded.of(header["harness"]["asked_for"], source, TaskSettings(**header["settings"]))
    found = _evaluated(loaded, RecordedModel(said, header["harness"]["chat_template"]), False)
    result = _result(loaded, found["results"])
    result = replace(result, seconds=float(header["seconds"]), notes=dict(header["notes"]), file=out)
    if out is not None:
        scores = _scores(found["samples"])
        again = [{**line, "scores": scores[line["group"], _number(line)]} for line in lines]
        write_lines(out, [{**header, "summary": result.summary}, *again])
    return result


def _number(line: Mapping[str, Any]) -> int:
    """Of an item in its task."""
    return int(str(line["id"]).rpartition("/")[2])


def _evaluated(loaded: Loaded, model: Any, templated: bool) -> dict[str, Any]:
    settings = loaded.settings
    with _quiet(), _own_randomness(settings.seed), _explained(PREFIX + loaded.name):
        for task in loaded.tasks.values():  # which are measured again in a later round
            task.set_fewshot_seed(seed=1234 + settings.seed)
        found: dict[str, Any] = evaluate(
            lm=model,
            task_dict={"tasks": loaded.tasks, "groups": loaded.groups},
            limit=settings.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=True,
            apply_chat_template=templated,
            fewshot_as_multiturn=templated,
        )
    return found


# ---- finding ---------------------------------------------------------------------------------------------------------


def index_of(folder: Path | None = None) -> dict[str, Known]:
    """The tasks, groups and tags in a folder's YAML files, or of the harness."""
    with _quiet():
        manager = TaskManager() if folder is None else TaskManager(include_defaults=False, include_path=str(folder))
    found = {}
    for name, entry in manager.task_index.items():
        if entry.kind is Kind.TAG:
            found[name] = Known(entry.kind.name, "", sorted(entry.tags), "", "")
        else:
            found[name] = described(entry.cfg or {}, entry.kind.name, str(entry.yaml_path))
    return found


@functools.cache
def _all_tasks() -> Any:
    """The harness's own manager, from the names that are known, in place of reading all files again."""
    index = {
        name: Entry(name, Kind[one.kind], Path(one.path) if one.path else None, None, set(one.members))
        for name, one in known().items()
    }
    with _replaced(TaskIndex, "build", lambda self, paths: index):
        return TaskManager()


def _beside(path: Path) -> tuple[Any, str]:
    """Who knows what a YAML file names (a task names nothing, a group tasks beside it or the harness's), and what is to
    be loaded."""
    config = configuration(path)
    if "group" not in config:
        return TaskManager(include_defaults=False), str(path)
    here = TaskManager(include_defaults=False, include_path=str(path.parent))
    alone = set(named_by(config)) <= set(here.task_index)
    return here if alone else TaskManager(include_path=str(path.parent)), str(config["group"])


def configuration(path: Path) -> dict[str, Any]:
    """What a YAML file says.

    Raises:
        UserError: it is no task and no group.
    """
    with _explained(f"{PREFIX}{path}"):
        config: dict[str, Any] = load_yaml(path, resolve_func=False)
    if not isinstance(config.get("task"), str) and "group" not in config:
        raise UserError(f"{path} names neither a task nor a group", "task: MY_NAME names it", "task.harness")
    return config


def _prepare(name: str, task: Any, settings: TaskSettings) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise unsafe(name)
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{PREFIX}{name} asks about pictures or sound, and this is a text model", code="task.harness")
    fixed, wanted = task.get_config("num_fewshot"), settings.num_fewshot
    if wanted is not None and fixed == 0 != wanted:  # the harness's own rule
        logger.warning("%s%s: num_fewshot stays 0, as the task itself says", PREFIX, name)
    elif wanted is not None or fixed is None:
        task.set_config(key="num_fewshot", value=wanted or 0)


def _wants_template(settings: TaskSettings) -> bool:
    """Whether questions are laid out as in training; by default they are raw text, as in the harness."""
    said = str(settings.extra.get("apply_chat_template", False)).lower()
    if said not in ("true", "false"):
        raise UserError(f"apply_chat_template is {said}, must be true or false", code="task.settings")
    return said == "true"


# ---- data ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _data_at_hand(name: str, source: Path | None, beside: Path | None) -> Iterator[None]:
    """Within it the harness's data sets come from `source`, else from a copy below `data_home()`, else from the cache
    or the hub; a hub out of reach is an error at once. Files that a task names lie beside its YAML file, or here."""
    original = datasets.load_dataset

    def load(path: str, name_of_part: str | None = None, **more: Any) -> Any:
        part = more.pop("name", name_of_part)
        which = f"{path} ({part})" if part else path
        local = source or data_home() / "hub" / path
        if source is not None and not source.expanduser().exists():
            raise UserError(f"{name}: there is no {source}", f"its data set is {path}", "data.missing")
        if source is None and beside is not None and (beside / path).is_dir():
            local = beside / path
        if source is None and (path in PACKAGED or Path(path).expanduser().exists()):
            files = {"data_files": _resolved(more["data_files"], beside)} if more.get("data_files") else {}
            return original(path, name=part, **{**more, **files})
        if local.exists():
            try:
                return original(str(local), name=part, **more)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{name}: {local} is no copy of its data set {which}: {_first(error)}",
                    f"hf download {path} --repo-type dataset --local-dir {local}",
                    "data.format",
                ) from error
        with _offline():
            try:
                return original(path, name=part, **more)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{name}: its data set {which} is not on this machine, and cannot be had: {_first(error)}",
                    f"on a machine with a network: hf download {path} --repo-type dataset --local-dir DIR\n"
                    f"  and put DIR at {local}, or say --tasks {name}=DIR",
                    "data.missing",
                ) from error

    with _replaced(datasets, "load_dataset", load):
        yield


def _resolved(files: Any, beside: Path | None) -> Any:
    """Names of files, relative to the task's own folder where they lie there."""
    if isinstance(files, str):
        near = None if beside is None else beside / files
        return str(near) if near is not None and near.exists() else files
    if isinstance(files, Mapping):
        return {split: _resolved(some, beside) for split, some in files.items()}
    return [_resolved(one, beside) for one in files]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Within it nobody tries a hub that is out of reach: the clients' retries take half a minute."""
    switches = [
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (constants, "HF_HUB_OFFLINE"),
    ]
    if "evaluate" in sys.modules:  # which brings most of transformers, and few tasks ask for it
        switches.append((sys.modules["evaluate.config"], "HF_EVALUATE_OFFLINE"))
    with contextlib.ExitStack() as stack:
        if hub_is_offline():
            stack.enter_context(_environment("HF_EVALUATE_OFFLINE", "1"))
            for holder, name in switches:
                stack.enter_context(_replaced(holder, name, True))
        yield


# ---- the harness kept quiet, and the same each time ------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no advice, no other processes. What was printed is a warning where it says so."""
    printed = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "evaluate")}
    no_bar = functools.partialmethod(bars.tqdm.__init__, disable=True)
    with (
        _replaced(bars.tqdm, "__init__", no_bar),
        _environment("DISABLE_MULTIPROC", "1"),
        contextlib.redirect_stdout(printed),
    ):
        had_bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if had_bars:
                datasets.enable_progress_bars()
    for line in printed.getvalue().splitlines():
        logger.log(logging.WARNING if line.lower().startswith("warning") else logging.DEBUG, "the harness: %s", line)


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """The harness's seeds while it works; everybody else's state afterwards."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(1234 + seed)
        torch.manual_seed(1234 + seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What goes wrong in the harness, as an error that names the task."""
    try:
        yield
    except (FedloomError, KeyboardInterrupt, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{name}: a file cannot be had: {_first(error)}", code="data.missing") from error
    except ImportError as error:
        raise UserError(
            f"{name} needs more than the harness has here: {_first(error)}",
            "the task's README in the harness may say what",
            "task.harness_missing",
        ) from error
    except Exception as error:
        raise RunError(
            f"{name} failed in the harness: {type(error).__name__}: {_first(error)}",
            "--debug shows where",
            "task.harness",
        ) from error


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(holder)[name]  # as it stands there: a static method is no function
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- results ---------------------------------------------------------------------------------------------------------


def _result(loaded: Loaded, results: Mapping[str, Any]) -> TaskResult:
    parts = {name: _plain(results[name]) for name in loaded.tasks}
    firsts = {name: first for name, part in parts.items() if (first := _first_metric(part))}
    own = _plain(results[loaded.title])
    if loaded.groups and not own and len(firsts) == len(parts):  # a group without a sum
        own = {MEAN: math.fsum(parts[name][first] for name, first in firsts.items()) / len(parts)}
    metric = _first_metric(own)
    if metric is None or not math.isfinite(own[metric]):
        what = "no number" if metric is None else f"{metric} = {own[metric]}"
        raise RunError(f"{PREFIX}{loaded.title} measured {what}", "the answers may say why: --out DIR", "task.harness")
    summary = {key: value for key, value in own.items() if math.isfinite(value)}
    for name, part in parts.items() if loaded.groups else ():
        value = part.get(metric if metric != MEAN else firsts[name], math.nan)
        if math.isfinite(value):
            summary[f"{metric}/{name}"] = value
    items = sum(int(results[name]["sample_len"]) for name in loaded.tasks)
    return TaskResult(PREFIX + loaded.title, metric, summary, items, {}, 0.0)


def _first_metric(summary: Mapping[str, float]) -> str | None:
    return next((key for key in summary if "_stderr" not in key), None)


def _plain(results: Mapping[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" as "acc"; the filter is named where there are several."""
    keys = [key for key in results if "," in key]
    alone = len({key.partition(",")[2] for key in keys}) == 1
    return {
        key.partition(",")[0] if alone else key.removesuffix(",none"): float(results[key])
        for key in keys
        if isinstance(results[key], int | float)
    }


def _scores(samples: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, float]]:
    """The numbers of each item; what is not one number (a sum and a count, say) is made of the answers again."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name, own in samples.items():
        alone = len({sample["filter"] for sample in own}) == 1
        for sample in own:
            end = "" if alone or sample["filter"] == "none" else f",{sample['filter']}"
            scores = found.setdefault((name, int(sample["doc_id"])), {})
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, int | float) and math.isfinite(value):
                    scores[metric + end] = float(value)
    return found


def _lines(samples: Mapping[str, Any], model: HarnessModel) -> Iterator[dict[str, Any]]:
    """An item each: what was asked, what was answered. A request is [kind, context or null for the prompt, more...]."""
    targets = {(name, int(one["doc_id"])): one["target"] for name, own in samples.items() for one in own}
    for (name, document), scores in _scores(samples).items():
        said = model.said[name, document]
        prompt = str(said[0].arguments[0])
        yield {
            "id": f"{name}/{document}",
            "group": name,
            "prompt": prompt,
            "reference": _as_json(targets[name, document]),
            "requests": [
                [one.kind, None if one.arguments[0] == prompt else one.arguments[0], *one.arguments[1:]] for one in said
            ],
            "answers": [one.answer for one in said],
            "scores": scores,
        }


def _as_json(value: Any) -> Any:
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else str(value)
