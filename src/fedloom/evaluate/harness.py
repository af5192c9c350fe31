"""EleutherAI's lm-evaluation-harness on a tuned model: any of its tasks by name, or a task of one's own as a YAML file.

The harness (extra `eval`) makes the questions, judges the answers and sums up; the model answers through this package's
operators (`harness_model`). It is imported inside functions: that takes seconds, and it prints.

Randomness is the harness's own (few-shot draws from seed 1234, and so on), so that numbers compare with published ones;
a seed of ours other than 0 moves all of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.data.places import data_home
from fedloom.errors import FedloomError, RunError, UserError, suggest
from fedloom.evaluate.tasks.base import TaskSettings, check_settings
from fedloom.evaluate.tasks.run import ModelAnswerer, TaskResult, header_of, write_lines
from fedloom.models.load import hub_is_offline

__all__ = ["PREFIX", "harness_names", "is_installed", "rescored", "run_harness"]

PREFIX = "lm_eval:"
CUT = "cut_on_the_left"  # items whose question lost its start to fit
RESAMPLES = 1000  # for errors without a formula; the harness's 100,000 take minutes in one process
PACKAGED = ("json", "csv", "parquet", "text", "arrow")  # readers of local files, where a data set's name would stand

Place = Callable[[str], "Path | None"]  # name of a result -> where its file of items goes
logger = logging.getLogger("fedloom")


class Loaded(NamedTuple):
    """Tasks as the harness has them."""

    tasks: dict[str, Any]
    groups: dict[str, Any]

    @property
    def as_given(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "groups": self.groups}


def is_installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def harness_names() -> frozenset[str]:
    """Every task, group and tag of the harness; reading its fourteen thousand files takes some seconds, once."""
    _require()
    return frozenset(_all_tasks().all_tasks)


def run_harness(
    name: str,
    answerer: ModelAnswerer,
    *,
    source: Path | None = None,
    settings: TaskSettings,
    place: Place = lambda name: None,
    about: Mapping[str, Any] | None = None,
) -> list[TaskResult]:
    """Measure a task of the harness: one result, or one per task where a name stands for several without a sum.

    Args:
        name: a task, group or tag of the harness, a YAML file, or a folder of these; "lm_eval:" may stand before it.
        source: a copy of the task's data set, in place of the cache or the hub.
        place: where the file of items of each result goes; None writes none.
        about: what is said of the model in the files.

    Raises:
        UserError: the harness is not installed, there is no such task, its data cannot be had, or a setting is wrong.
        RunError: the harness failed.
    """
    from fedloom.evaluate.harness_model import HarnessModel

    _require()
    name = name.removeprefix(PREFIX)
    check_settings(PREFIX + name, settings, "num_fewshot", "max_new_tokens", extra=("apply_chat_template",))
    model = HarnessModel(answerer, max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    templated = _wants_template(settings, answerer.tokenizer)
    started = time.perf_counter()
    loaded, found = _evaluated(name, source, model, settings, templated)
    seconds = time.perf_counter() - started
    results = []
    for top in _tops(loaded, found["results"]):
        members = _members(loaded, top)
        result = _result(top, members, found["results"], {one for one in model.cut if one[0] in members})
        result = replace(result, seconds=seconds * result.items / max(1, _items(found, loaded.tasks)))
        file = place(result.name)
        if file is not None:
            result = replace(result, file=file)
            said = replace(settings, extra={**settings.extra, "apply_chat_template": templated})
            header = header_of(result, said, source, about) | {"harness": _version(), "asked_for": PREFIX + name}
            write_lines(file, [header, *_lines(found["samples"], members, model)])
        results.append(result)
    return results


def rescored(header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], out: Path | None = None) -> TaskResult:
    """Judge the answers of a file of items again: the harness asks, and the file answers.

    Raises:
        UserError: the task or its data are not here, or have changed since.
    """
    from fedloom.evaluate.harness_model import RecordedModel, Said

    _require()
    wanted = str(header["task"]).removeprefix(PREFIX)
    settings = TaskSettings(**header["settings"])
    said = [
        Said(kind, (line["prompt"] if context is None else context, *rest), answer)
        for line in lines
        for (kind, context, *rest), answer in zip(line["requests"], line["answers"], strict=True)
    ]
    source = None if header["source"] is None else Path(header["source"])
    model = RecordedModel(said)
    loaded, found = _evaluated(
        str(header["asked_for"]).removeprefix(PREFIX), source, model, settings, False, only=wanted
    )
    result = _result(wanted, _members(loaded, wanted), found["results"], set())
    result = replace(result, seconds=float(header["seconds"]), notes={**header["notes"], **result.notes})
    if out is not None:
        scores = _scores(found["samples"], _members(loaded, wanted))
        again = [{**line, "scores": scores[line["group"], int(line["id"].rpartition("/")[2])]} for line in lines]
        write_lines(out, [{**header, "summary": result.summary}, *again])
    return replace(result, file=out)


def _evaluated(
    name: str, source: Path | None, model: Any, settings: TaskSettings, templated: bool, only: str | None = None
) -> tuple[Loaded, dict[str, Any]]:
    with _quiet(), _own_randomness(settings.seed):
        loaded = _loaded(name, source)
        if only is not None:
            loaded = Loaded(
                {one: loaded.tasks[one] for one in _members(loaded, only)},
                {one: group for one, group in loaded.groups.items() if one == only},
            )
        for one, task in loaded.tasks.items():
            _prepare(one, task, settings)
        from lm_eval.evaluator import evaluate

        with _explained(f"{PREFIX}{name}"):
            found: dict[str, Any] = evaluate(
                lm=model,
                task_dict=loaded.as_given,
                limit=settings.limit,
                bootstrap_iters=RESAMPLES,
                log_samples=True,
                apply_chat_template=templated,
                fewshot_as_multiturn=templated,
            )
    return loaded, found


# ---- finding ---------------------------------------------------------------------------------------------------------


def _require() -> None:
    if not is_installed():
        raise UserError(
            "the lm-evaluation-harness is not installed", "pip install 'fedloom[eval]'", "task.harness_missing"
        )


@functools.cache
def _all_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager()


def _loaded(name: str, source: Path | None) -> Loaded:
    """The tasks of a name, a file or a folder, with their data."""
    path = Path(name).expanduser()
    is_path = path.suffix in (".yaml", ".yml") or (len(path.parts) > 1 and path.exists())
    if is_path and not path.exists():
        raise UserError(f"there is no task file {name}", code="task.unknown")
    manager, specs = _of_path(path) if is_path else (_all_tasks(), [name])
    if not is_path and name not in manager.task_index:
        raise UserError(
            f"the harness has no task {name!r}{suggest(name, manager.all_tasks)}",
            "lm-eval ls tasks; a task of your own: --tasks lm_eval:./my_task.yaml",
            "task.unknown",
        )
    with _explained(f"{PREFIX}{name}"), _data_at_hand(f"{PREFIX}{name}", source, path.parent if is_path else None):
        found = manager.load(specs)
    return Loaded(dict(found["tasks"]), dict(found.get("groups") or {}))


def _of_path(path: Path) -> tuple[Any, list[str]]:
    """(who knows the tasks, what to load): a file of one task is read alone, groups need what they name."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    if path.is_file():
        with _explained(f"{PREFIX}{path}"):
            config = load_yaml(path, resolve_func=False)
        if "task" not in config and "group" not in config:
            raise UserError(f"{path} has neither task nor group", "task: MY_NAME names it", "task.harness")
        if "group" not in config:
            return TaskManager(include_defaults=False), [str(path)]
        folder = path.parent
    else:
        folder = path
    here = TaskManager(include_defaults=False, include_path=str(folder))
    own = here.task_index
    if path.is_dir() and not own:
        raise UserError(f"{path} holds no task of the harness (*.yaml)", code="task.unknown")
    groups = {name: _named_by(entry.cfg) for name, entry in own.items() if entry.kind.name == "GROUP"}
    within = {member for members in groups.values() for member in members}
    if within - set(own):  # a group of tasks that come with the harness
        here = TaskManager(include_path=str(folder))
    if path.is_file():
        return here, [str(path)]
    return here, [name for name, entry in own.items() if name not in within and entry.kind.name != "TAG"]


def _named_by(config: Mapping[str, Any] | None) -> list[str]:
    """The tasks that a group names and does not define itself."""
    members = (config or {}).get("task") or []
    named = [{"task": one} if isinstance(one, str) else dict(one) for one in members if isinstance(one, str | Mapping)]
    return [str(one.get("task") or one.get("group")) for one in named if "dataset_path" not in one]


def _prepare(name: str, task: Any, settings: TaskSettings) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"{PREFIX}{name} runs programs that the model writes, and the harness does so without a sandbox",
            "fedloom's own run in one: --tasks humaneval, mbpp",
            "task.unsafe",
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{PREFIX}{name} asks about pictures or sound, and this is a text model", code="task.harness")
    fixed, wanted = task.get_config("num_fewshot"), settings.num_fewshot
    if wanted is not None and fixed == 0 != wanted:  # the harness's own rule
        logger.warning("%s%s: num_fewshot stays 0, as the task itself says", PREFIX, name)
    elif wanted is not None or fixed is None:
        task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=1234 + settings.seed)


def _wants_template(settings: TaskSettings, tokenizer: Any) -> bool:
    said = settings.extra.get("apply_chat_template", False)
    if str(said).lower() not in ("true", "false"):
        raise UserError(f"apply_chat_template is {said!r}, must be true or false", code="task.settings")
    wanted = str(said).lower() == "true"
    if wanted and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "apply_chat_template: the tokenizer has no chat template", "leave the setting out", "task.settings"
        )
    return wanted


# ---- data ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _data_at_hand(name: str, source: Path | None, beside: Path | None) -> Iterator[None]:
    """Within it the harness's data sets come from `source`, else from a copy below `data_home()`, else from the cache
    or the hub; a hub out of reach is an error at once. Files that a task names lie beside its YAML file, or here."""
    import datasets

    original = datasets.load_dataset

    def load(path: str, name_of_part: str | None = None, **more: Any) -> Any:
        part = more.pop("name", name_of_part)
        local = source or data_home() / "hub" / path
        if source is not None and not source.expanduser().exists():
            raise UserError(f"{name}: there is no {source}", f"its data set is {path}", "data.missing")
        if source is None and beside is not None and (beside / path).is_dir():
            local = beside / path
        if source is None and (path in PACKAGED or Path(path).expanduser().exists()):
            files = {"data_files": _resolved(more["data_files"], beside)} if more.get("data_files") else {}
            return original(path, name=part, **{**more, **files})
        if local.exists():
            return original(str(local), name=part, **more)
        with contextlib.ExitStack() as offline:
            if hub_is_offline():
                for holder, key in _switches():
                    offline.enter_context(_replaced(holder, key, True))
            try:
                return original(path, name=part, **more)
            except (OSError, ValueError) as error:
                which = f"{path} ({part})" if part else path
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


def _switches() -> list[tuple[Any, str]]:
    import datasets
    from huggingface_hub import constants

    return [
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (constants, "HF_HUB_OFFLINE"),
    ]


# ---- the harness kept quiet, and the same each time ------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no advice, no other processes. What was printed is a warning where it says so."""
    import datasets
    from tqdm import std

    printed = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "evaluate")}
    bars = functools.partialmethod(std.tqdm.__init__, disable=True)
    with (
        _replaced(std.tqdm, "__init__", bars),
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
    import numpy as np
    import torch

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
            f"{name} needs more than the harness: {_first(error)}",
            f"pip install {error.name}" if error.name else "see the task's README in the harness",
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
    before = getattr(holder, name)
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


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


# ---- results ---------------------------------------------------------------------------------------------------------


def _tops(loaded: Loaded, results: Mapping[str, Any]) -> list[str]:
    """What gets a result of its own: groups that have a sum, and tasks that are in no such group."""

    def shown(name: str) -> list[str]:
        if name not in loaded.groups or any("," in key for key in results.get(name, {})):
            return [name]
        return [one for child in loaded.groups[name].child_names for one in shown(child)]

    children = {child for group in loaded.groups.values() for child in group.child_names}
    return list(
        dict.fromkeys(one for top in (*loaded.groups, *loaded.tasks) if top not in children for one in shown(top))
    )


def _members(loaded: Loaded, name: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    if name not in loaded.groups:
        return [name]
    return [str(task.task_name) for task in loaded.groups[name].get_all_tasks()]


def _items(found: Mapping[str, Any], tasks: Any) -> int:
    return sum(int(found["n-samples"][name]["effective"]) for name in tasks)


def _result(top: str, members: Sequence[str], results: Mapping[str, Any], cut: set[Any]) -> TaskResult:
    own = _plain(results[top])
    metric = next((key for key in own if "_stderr" not in key), None)
    if metric is None or not math.isfinite(own[metric]):
        value = "nothing" if metric is None else f"{metric} = {own[metric]}"
        raise RunError(f"{PREFIX}{top} measured {value}", "look at the answers: --out DIR", "task.harness")
    summary = {key: value for key, value in own.items() if math.isfinite(value)}
    for member in members if members != [top] else []:
        part = _plain(results[member])
        if metric in part and math.isfinite(part[metric]):
            summary[f"{metric}/{member}"] = part[metric]
    items = sum(int(results[member]["sample_len"]) for member in members)
    return TaskResult(PREFIX + top, metric, summary, items, {}, 0.0, {CUT: len(cut)} if cut else {})


def _plain(results: Mapping[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" as "acc"; the filter is named where there are several."""
    keys = [key for key in results if "," in key]
    alone = len({key.partition(",")[2] for key in keys}) == 1
    return {
        key.partition(",")[0] if alone else key.removesuffix(",none"): float(results[key])
        for key in keys
        if isinstance(results[key], int | float)
    }


def _scores(samples: Mapping[str, Any], members: Sequence[str]) -> dict[tuple[str, int], dict[str, float]]:
    """The numbers of each item; what is not one number (a sum and a count, say) is made of the answers again."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for member in members:
        filters = {sample["filter"] for sample in samples[member]}
        for sample in samples[member]:
            end = "" if len(filters) == 1 or sample["filter"] == "none" else f",{sample['filter']}"
            own = found.setdefault((member, int(sample["doc_id"])), {})
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, int | float) and math.isfinite(value):
                    own[metric + end] = float(value)
    return found


def _lines(samples: Mapping[str, Any], members: Sequence[str], model: Any) -> Iterator[dict[str, Any]]:
    """An item each: what was asked, what was answered. A request is [kind, context or null for the prompt, more...]."""
    targets = {(member, int(one["doc_id"])): one["target"] for member in members for one in samples[member]}
    for (member, document), scores in _scores(samples, members).items():
        said = model.said[member, document]
        prompt = str(said[0].arguments[0])
        yield {
            "id": f"{member}/{document}",
            "group": member,
            "prompt": prompt,
            "reference": _as_json(targets[member, document]),
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
