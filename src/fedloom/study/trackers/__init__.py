"""Trackers: where a run's figures go besides its own folder, each through the library that its users already have.

Every arm is a tracked run of its own, all of one fedloom run in one group: metrics have the same names in all arms, so
a tracker's own page lays them over one another, and a step is a round. A tracker is a function of what is tracked that
returns `Tracker`; a new one is a file here and a line in `TRACKERS`.

`rounds.jsonl` and `result.json` stay what a run is judged by. A tracker that cannot be opened stops a run before it
starts; one that fails later is named once and left out from then on, and the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module, util
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.errors import UserError
from fedloom.study.folder import json_text, read_json, write_atomic
from fedloom.study.recipe import Recipe, resolved_json

__all__ = ["TRACKERS", "Tracked", "Tracker", "Trackers", "flat_config", "metrics_of", "require_trackers"]


class Tracked(NamedTuple):
    """What a tracker is told when it is opened."""

    folder: Path  # the run's; what a tracker writes by itself goes to `folder / "trackers"`
    project: str
    group: str  # the run's name
    arm: str
    config: Mapping[str, Any]  # the resolved recipe
    id: str | None  # what the tracker called this arm's run before it was interrupted
    first_round: int  # rounds below it were logged before


class Tracker(NamedTuple):
    """An open tracked run."""

    id: str  # by which it is found again after an interruption
    log: Callable[[int, Mapping[str, float]], None]  # round, metrics
    end: Callable[[Mapping[str, float], bool], None]  # figures of the whole arm; whether it finished
    where: str  # how to look at it, for people


class _Library(NamedTuple):
    home: str  # module here
    needs: str  # package whose absence is told before the run
    extra: str


TRACKERS: Mapping[str, _Library] = {
    "trackio": _Library("trackio_local", "trackio", "trackio"),
    "tensorboard": _Library("tensorboard_files", "tensorboard", "tensorboard"),
    "mlflow": _Library("mlflow_store", "mlflow", "mlflow"),
    "wandb": _Library("wandb_runs", "wandb", "wandb"),
}


def require_trackers(names: Sequence[str]) -> None:
    """See that the libraries are there, before anything is loaded or written.

    Raises:
        UserError: a library is not installed; every missing one is named.
    """
    missing = [name for name in names if util.find_spec(TRACKERS[name].needs) is None]
    if missing:
        extras = ",".join(TRACKERS[name].extra for name in missing)
        raise UserError(
            f"report_to: {', '.join(missing)}: not installed",
            f"pip install 'fedloom[{extras}]', or report_to=none (rounds.jsonl and report.html are always written)",
            code="report_to.missing",
        )


class Trackers:
    """All trackers of one run, and what each has been told so far (in trackers.json, for a run that is resumed)."""

    def __init__(self, names: Sequence[str], folder: Path, project: str, recipe: Recipe) -> None:
        self.names, self.folder, self.project, self.recipe = list(names), folder, project, recipe
        self.open: dict[str, Tracker] = {}
        self.said: set[str] = set()
        self.arm = ""
        self.say: Callable[[str], None] = lambda text: None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *problem: object) -> None:
        self.end({}, finished=False)  # nothing is open any more where all went well

    @property
    def _book(self) -> Path:
        return self.folder / "trackers.json"

    def _known(self) -> dict[str, dict[str, dict[str, Any]]]:
        return dict(read_json(self._book)) if self._book.exists() else {}

    def begin(self, arm: str, say: Callable[[str], None]) -> None:
        """Open every tracker for an arm.

        Raises:
            UserError: one of them cannot be opened, with the library's own reason.
        """
        self.arm, self.say = arm, say
        known = self._known().get(arm, {})
        for name in self.names:
            before = known.get(name, {})
            tracked = Tracked(
                self.folder,
                self.project,
                self.folder.resolve().name,
                arm,
                resolved_json(self.recipe),
                before.get("id"),
                int(before.get("logged", -1)) + 1,
            )
            opener = import_module(f"fedloom.study.trackers.{TRACKERS[name].home}").open_tracker
            try:
                self.open[name] = opener(tracked)
            except Exception as error:
                raise UserError(
                    f"report_to: {name} cannot be opened: {_reason(error)}",
                    "mend its settings, or report_to=none",
                    code="report_to.open",
                ) from error
            if name not in self.said:
                self.said.add(name)
                say(f"tracking  {name}: {self.open[name].where}")
            self._note(name, tracked.first_round - 1)

    def round(self, line: Mapping[str, Any]) -> None:
        """Log a line of rounds.jsonl. A round that was logged before an interruption is not logged twice."""
        known = self._known().get(self.arm, {}) if self.open else {}
        metrics = metrics_of(line)
        for name in list(self.open):
            if line["round"] <= known.get(name, {}).get("logged", -1):
                continue
            if self._try(name, lambda one: one.log(int(line["round"]), metrics)):
                self._note(name, int(line["round"]))

    def end(self, outcome: Mapping[str, Any], *, finished: bool = True) -> None:
        """Close the arm's trackers with its final figures."""
        figures = metrics_of(outcome)
        for name in list(self.open):
            self._try(name, lambda one: one.end(figures, finished))
            self.open.pop(name, None)

    def _try(self, name: str, what: Callable[[Tracker], None]) -> bool:
        try:
            what(self.open[name])
        except Exception as error:  # a library's own: whatever it is, it must not cost the run
            self.say(f"note      {name} failed and gets nothing more of this arm: {_reason(error)}")
            with suppress(Exception):
                self.open[name].end({}, False)
            del self.open[name]
            return False
        return True

    def _note(self, name: str, logged: int) -> None:
        known = self._known()
        known.setdefault(self.arm, {})[name] = {"id": self.open[name].id, "logged": logged}
        write_atomic(self._book, json_text(known, where="trackers.json") + "\n")


_METRICS = {
    "train_loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "tokens": "train/tokens",
    "tokens_per_second": "train/tokens_per_second",
    "seconds": "train/seconds",
    "clients": "train/clients",
    "val_loss": "val/loss",
    "bytes_up_per_client": "bytes/up_per_client",
    "bytes_down_per_client": "bytes/down_per_client",
    "loss": "test/loss",
    "perplexity": "test/perplexity",
}
_REWARDS = {  # TRL's names, behind val/ or test/
    "preference_accuracy": "rewards/accuracies",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins",
}


def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of rounds.jsonl, or an arm's result, as flat numbers; what was not measured is left out.

    >>> metrics_of({"round": 3, "val_loss": 1.5, "score": None, "tasks": {"gsm8k": {"accuracy": 0.25}}})
    {'val/loss': 1.5, 'task/gsm8k/accuracy': 0.25}
    """
    found: dict[str, float] = {}
    side = "val" if "round" in line else "test"
    for key, value in line.items():
        name = _METRICS.get(key) or (f"{side}/{key}" if key.startswith("score") and key != "score_per_client" else None)
        name = name or (f"{side}/{_REWARDS[key]}" if key in _REWARDS else None)
        if name and isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    if isinstance(line.get("failed"), Mapping):
        found["train/failed"] = float(len(line["failed"]))
    for task, metrics in (line.get("tasks") or {}).items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found[f"task/{task}/{metric}"] = float(value)
    return found


def flat_config(config: Mapping[str, Any]) -> dict[str, str | float]:
    """The recipe with dotted keys and plain values, as trackers want their parameters."""
    flat: dict[str, str | float] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": item for inner, item in flat_config(value).items()})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[key] = value
        else:
            flat[key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
