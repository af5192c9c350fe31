"""EleutherAI's lm-evaluation-harness (extra `eval`) as tasks: by name, or a task of one's own as a YAML file.

Its fourteen thousand files are read once, and their names kept in the user's cache: the harness itself takes seconds to
import, prints, and is wanted only when it is run (`harness_run`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.data.places import user_cache
from fedloom.errors import UserError, suggest
from fedloom.evaluate.tasks.base import Answer, Item, ItemScore, Task, TaskSettings

if TYPE_CHECKING:
    from fedloom.evaluate.tasks.run import Answerer, TaskResult

__all__ = [
    "LESS_IS_BETTER",
    "PREFIX",
    "Known",
    "expanded",
    "is_installed",
    "is_known",
    "is_path",
    "known",
    "require",
    "task_of",
    "unsafe",
]

PREFIX = "lm_eval:"
LESS_IS_BETTER = re.compile("perplexity|bits_per|brier|_stderr")  # metrics
MEAN = "mean"  # of a group's tasks, where the group itself has no sum: of the first metric of each
# What the harness measures where a task does not say.
DEFAULT_METRICS = {
    "multiple_choice": "acc",
    "loglikelihood": "perplexity",
    "loglikelihood_rolling": "word_perplexity",
    "generate_until": "exact_match",
}


class Known(NamedTuple):
    """What the harness says of a name."""

    kind: str  # TASK, PY_TASK, GROUP or TAG
    path: str  # of its file; "" for a tag
    members: list[str]  # of a group or a tag
    metric: str  # the one to report first; "" where only running tells
    data: str  # its data set
    unsafe: bool = False  # it runs what a model writes


def require() -> None:
    """Raise unless the harness is installed."""
    if not is_installed():
        raise UserError(
            "the lm-evaluation-harness is not installed", "pip install 'fedloom[eval]'", "task.harness_missing"
        )


def is_known(name: str) -> bool:
    """Whether the harness is installed and has a task, group or tag of this name."""
    return is_installed() and (_cache().exists() or _is_written_anywhere(name)) and name in known()


def is_path(name: str) -> bool:
    """Whether a name is one of a YAML file or of a folder of these, which must be there."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml") and not ("/" in name and path.exists()):
        return False
    if not path.exists():
        raise UserError(f"there is no task file {name}", code="task.unknown")
    return True


def expanded(name: str) -> list[str]:
    """The tasks that a name stands for: one, or those of a tag or of a folder.

    Raises:
        UserError: the harness is not installed, or there is no such task.
    """
    require()
    name = name.removeprefix(PREFIX)
    if not is_path(name):
        _check(name)
        return [PREFIX + one for one in known()[name].members] if known()[name].kind == "TAG" else [PREFIX + name]
    path = Path(name).expanduser()
    if not path.is_dir():
        return [PREFIX + name]
    own, within = _in_folder(path)
    tops = [one for title, one in own.items() if title not in within and one.kind != "TAG"]
    return [PREFIX + one.path for one in tops]


def _check(name: str) -> None:
    if name not in known():
        raise UserError(
            f"the harness has no task {name!r}{suggest(name, known())}",
            "lm-eval ls tasks; a task of your own: --tasks lm_eval:./my_task.yaml",
            "task.unknown",
        )


def task_of(name: str) -> Task:
    """A task of the harness.

    Args:
        name: a task or group of the harness, or a YAML file.

    Raises:
        UserError: the harness is not installed, there is no such task, or the name stands for several.
    """
    parts = expanded(name)
    name = name.removeprefix(PREFIX)
    if len(parts) != 1 or parts[0] != PREFIX + name:
        listed = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
        raise UserError(f"{PREFIX}{name} stands for several tasks: {listed}", "name one of them", "task.several")
    if is_path(name):
        from fedloom.evaluate.harness_run import configuration

        config = configuration(Path(name).expanduser())
        title = str(config.get("task") if isinstance(config.get("task"), str) else config.get("group"))
        one = described(config, "GROUP" if "group" in config else "TASK", name)
    else:
        _check(name)
        title, one = name, known()[name]
    for part in (name, *([] if is_path(name) else one.members)):
        if (one if part == name else known().get(part, one)).unsafe:
            raise unsafe(part)
    kept: list[Any] = []  # the harness's own tasks, with their data

    def load(source: Path | None, settings: TaskSettings) -> Sequence[Item]:
        from fedloom.evaluate.harness_run import Loaded

        kept[:] = [Loaded.of(name, source, settings)]
        return list(kept[0].items())

    def run(
        answerer: Answerer,
        *,
        source: Path | None,
        settings: TaskSettings,
        out: Path | None,
        about: Mapping[str, Any] | None = None,
    ) -> TaskResult:
        from fedloom.evaluate.harness_run import run_harness

        if not kept or kept[0].asked != (name, source, settings):
            load(source, settings)
        return run_harness(kept[0], answerer, out=out, about=about)

    return Task(
        PREFIX + title,
        f"{title} of the lm-evaluation-harness",
        one.metric,
        f"huggingface.co/datasets/{one.data}" if one.data.count("/") == 1 else "as its YAML file says",
        load,
        _not_by_itself,
        _not_by_itself,
        run=run,
    )


def unsafe(name: str) -> UserError:
    return UserError(
        f"{PREFIX}{name} runs programs that a model writes, and the harness does so without a sandbox",
        "fedloom's own tasks run them in one: humaneval, mbpp",
        "task.unsafe",
    )


def _not_by_itself(items: Sequence[Item], values: Sequence[Answer] | Sequence[ItemScore]) -> Any:
    raise NotImplementedError("the harness judges what it asked itself: `run`")


def is_installed() -> bool:
    """Whether the harness is there (without importing it)."""
    return importlib.util.find_spec("lm_eval") is not None


# ---- names -----------------------------------------------------------------------------------------------------------


@functools.cache
def known() -> Mapping[str, Known]:
    """Every task, group and tag that comes with the harness."""
    require()
    cache, stamp = _cache(), _stamp()
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            return {name: Known(*values) for name, values in kept["tasks"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it is of another version
    from fedloom.evaluate.harness_run import index_of

    found = index_of()
    _keep(cache, {"stamp": stamp, "tasks": found})
    return found


def _cache() -> Path:
    return user_cache() / "lm_eval_tasks.json"


def _home() -> Path:
    [home] = importlib.util.find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(home) / "tasks"


def _files() -> Iterator[Path]:
    for place, _, files in os.walk(_home()):
        yield from (Path(place) / file for file in files if file.endswith(".yaml"))


def _is_written_anywhere(name: str) -> bool:
    """Whether any of the harness's files has the name as a word: reading them takes a tenth of understanding them."""
    word = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
    return any(word.search(file.read_bytes()) for file in _files())


def _stamp() -> list[int | str]:
    """What changes with any of the harness's task files."""
    number, newest, folder = 0, 0, ""
    for file in _files():
        if folder != str(file.parent):
            folder = str(file.parent)
            newest = max(newest, os.stat(folder).st_mtime_ns)
        number += 1
    return [version("lm_eval"), str(_home()), number, newest, *Known._fields]


def _keep(path: Path, value: Any) -> None:
    """Write the file whole, or leave it: a cache that cannot be written costs time only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


def described(config: Mapping[str, Any], kind: str, path: str) -> Known:
    """What a task's or a group's file says."""
    if kind == "GROUP":
        sums = config.get("aggregate_metric_list") or {"metric": MEAN}
        first = sums[0] if isinstance(sums, list) else sums
        return Known(kind, path, named_by(config), str(first["metric"]), "")
    listed = config.get("metric_list") or [{"metric": DEFAULT_METRICS.get(str(config.get("output_type")), "")}]
    metric = listed[0].get("metric") if isinstance(listed[0], Mapping) else ""
    filters = [str(one.get("name")) for one in config.get("filter_list") or [] if isinstance(one, Mapping)]
    several = len(filters) > 1 and "none" not in filters
    metric = metric if isinstance(metric, str) and not metric.startswith("/") else ""  # the path of a function
    metric = f"{metric},{filters[0]}" if several else metric
    unsafe = str(config.get("unsafe_code", False)).lower() != "false"
    return Known(kind, path, [], metric, str(config.get("dataset_path") or ""), unsafe)


def named_by(config: Mapping[str, Any] | None) -> list[str]:
    """The tasks that a group names and does not define itself."""
    members = (config or {}).get("task") or []
    named = [{"task": one} if isinstance(one, str) else dict(one) for one in members if isinstance(one, str | Mapping)]
    return [str(one.get("task") or one.get("group")) for one in named if "dataset_path" not in one]


def _in_folder(folder: Path) -> tuple[dict[str, Known], set[str]]:
    """The tasks and groups of a folder, and the names of those that are in a group of it."""
    from fedloom.evaluate.harness_run import index_of

    own = index_of(folder)
    if not own:
        raise UserError(f"{folder} holds no task of the harness (*.yaml)", code="task.unknown")
    return own, {member for one in own.values() if one.kind == "GROUP" for member in one.members}
