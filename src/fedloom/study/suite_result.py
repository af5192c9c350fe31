"""The form of suite.json, which other tools read: names here stay as they are once released. Imports no torch.

suites/NAME/suite.yaml          the suite as it was asked for
            suite.json          this
            table.md, table.csv the same for people and for spreadsheets
            cells/ID.yaml       a cell's resolved recipe
            runs/ID/            a cell's run folder, named by its content (elsewhere with `run_store`)
            logs/ID.log         what a cell's process said
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import Annotated, NotRequired, TypedDict  # noqa: UP035  pydantic asks for this one below 3.12

from fedloom.errors import UserError
from fedloom.study.folder import json_text, read_json, write_atomic

__all__ = [
    "COSTS",
    "METRICS",
    "SUITE_FILE",
    "Cell",
    "Comparison",
    "Difference",
    "Metric",
    "Row",
    "SuiteResult",
    "check_suite",
    "is_suite",
    "read_suite",
    "write_suite",
]

SUITE_FILE = "suite.json"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]

# rounds: every arm as it ends, after the same rounds and steps. samples: every arm at the first point where each of its
# models has seen as many samples as the arm that has seen the fewest at its end.
Comparison = Literal["rounds", "samples"]
Unit = Literal["share", "nats", "number"]  # a share is shown in per cent
Better = Literal["higher", "lower"]

# What a row costs, with the unit, in the order of tables. Means over the seeds; what was not measured is left out.
COSTS: Mapping[str, tuple[str, str]] = {
    "bytes_up_per_client_round": ("up per client and round", "bytes"),
    "bytes_down_per_client_round": ("down per client and round", "bytes"),
    "bytes_up": ("up in all", "bytes"),
    "bytes_down": ("down in all", "bytes"),
    "train_seconds": ("training", "seconds"),
    "communication_seconds": ("communication", "seconds"),
    "evaluate_seconds": ("evaluation", "seconds"),
    "simulated_seconds": ("simulated time", "seconds"),
    "simulated_seconds_to_loss": ("simulated time to the validation loss that all reach", "seconds"),
    "simulated_seconds_to_score": ("simulated time to the validation score that all reach", "seconds"),
    "train_tokens": ("tokens trained on", "tokens"),
    "tokens_per_second": ("tokens per second", "tokens"),
    "peak_memory_bytes": ("peak memory", "bytes"),
    "flops": ("computation", "FLOP"),
    "trainable_share": ("trained share of the parameters", "share"),
    "samples_per_model": ("samples a model has seen", "samples"),
    "rounds": ("rounds", "rounds"),
}

# What may be tabulated: title, unit, which way is better. `own_test.` in front is of each client on its own test rows,
# where score and loss are means over the clients. `tasks.TASK.METRIC` is a metric of a benchmark task.
METRICS: Mapping[str, tuple[str, Unit, Better]] = {
    "score": ("score", "share", "higher"),
    "loss": ("loss", "nats", "lower"),
    "perplexity": ("perplexity", "number", "lower"),
    "score_worst": ("worst client", "share", "higher"),
    "score_decile": ("worst tenth", "share", "higher"),
    "score_plain_mean": ("score, clients alike", "share", "higher"),
    "score_weighted_mean": ("score, clients by size", "share", "higher"),
    "score_std": ("score std over clients", "share", "lower"),
    "loss_worst": ("worst client's loss", "nats", "lower"),
    "loss_decile": ("worst tenth's loss", "nats", "lower"),
    "loss_plain_mean": ("loss, clients alike", "nats", "lower"),
    "loss_weighted_mean": ("loss, clients by size", "nats", "lower"),
    "loss_std": ("loss std over clients", "nats", "lower"),
    "preference_accuracy": ("pairs ranked right", "share", "higher"),
    "reward_margin": ("reward margin", "number", "higher"),
    "reward_chosen": ("reward of the chosen", "number", "higher"),
    "reward_rejected": ("reward of the rejected", "number", "lower"),
}


@with_config(extra="forbid", allow_inf_nan=False)
class Metric(TypedDict):
    """What a metric is, so that a reader need not know it.

    `name` is its place in an arm's result: score, loss, perplexity, own_test.score_worst, tasks.gsm8k.accuracy.
    """

    name: str
    title: str
    unit: Unit
    better: Better


@with_config(extra="forbid", allow_inf_nan=False)
class Cell(TypedDict):
    """One run of the suite: settings and a seed."""

    id: str  # of the content: resolved recipe, data, model, code
    settings: dict[str, Any]  # what the grid sets, by name: {"recipe": "builtin_code", "adapter": "lora"}
    seed: int
    run: str  # the run folder, from the suite's folder
    status: Literal["waiting", "running", "done", "failed", "stopped"]
    seconds: Amount | None  # of wall-clock time in all its processes; None before it has begun
    cpu_seconds: NotRequired[Amount]  # of processor time in all its processes; on a shared machine the better measure
    peak_memory_bytes: NotRequired[Count]  # of its process
    reason: NotRequired[str]  # of a failure: the last lines of its log


@with_config(extra="forbid", allow_inf_nan=False)
class Row(TypedDict):
    """One metric of one arm with one choice of settings, over the seeds that have it."""

    settings: dict[str, Any]
    arm: str
    comparison: Comparison
    metric: str
    n: Count
    mean: float | None
    std: Amount | None  # of a sample (divided by n - 1); None for n < 2
    values: dict[str, float]  # by seed
    costs: dict[str, Amount]  # see COSTS


@with_config(extra="forbid", allow_inf_nan=False)
class Difference(TypedDict):
    """The mean over seeds of `a` less `b`, with the interval of a paired t-test.

    `by` is what a and b are values of: "arm" (then `arm` is left out), or a setting (then `settings` has the others,
    and `arm` is the arm in which they are compared).
    """

    settings: dict[str, Any]
    by: str
    arm: NotRequired[str]
    a: str
    b: str
    comparison: Comparison
    metric: str
    n: Count
    mean: float
    low: float | None  # None for n < 2: one seed has no interval
    high: float | None
    level: Share  # 0.95
    p: Share | None
    p_holm: Share | None  # adjusted for all differences of the same metric, comparison and `by`
    resolved: bool  # the interval does not contain 0
    resolved_holm: bool  # p_holm is at most 1 - level


@with_config(extra="forbid", allow_inf_nan=False)
class SuiteResult(TypedDict):
    """suite.json. It is there from the start, and is written anew whenever a cell ends."""

    schema: Literal[1]
    name: str
    status: Literal["running", "done", "failed", "stopped"]
    fedloom_version: str
    arms: list[str]
    seeds: list[int]
    settings: dict[str, list[Any]]  # what the grid varies, in the suite's order
    metrics: list[Metric]  # in the order of tables
    cells: list[Cell]
    table: list[Row]
    differences: list[Difference]
    notes: list[str]  # what a reader of the table must know
    seconds: Amount  # wall-clock, of all calls together
    jobs: Count  # cells at once, at most
    versions: dict[str, str]
    machine: dict[str, Any]
    suite: dict[str, Any]  # the suite file's content


_SUITE: TypeAdapter[SuiteResult] = TypeAdapter(SuiteResult)


def check_suite(value: Mapping[str, Any]) -> SuiteResult:
    """`value` if it has the form of suite.json.

    Raises:
        ValueError: it has not; differences are named with their place.
    """
    try:
        return _SUITE.validate_python(dict(value), strict=False)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("suite.json would be wrong: " + "; ".join(wrong[:20]) + more) from None


def is_suite(folder: Path) -> bool:
    """Whether a suite was run in this folder."""
    return (folder / SUITE_FILE).is_file()


def read_suite(folder: Path) -> SuiteResult:
    """The content of a suite folder's suite.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / SUITE_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is no suite folder: it has no {SUITE_FILE}",
            "run one with `fedloom run SUITE.yaml`",
            code="suite.missing",
        )
    value = read_json(path)
    try:
        return check_suite(value if isinstance(value, Mapping) else {})
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", code="file.damaged") from error


def write_suite(folder: Path, value: Mapping[str, Any]) -> None:
    """Write suite.json, whole.

    Raises:
        ValueError: it does not have its form. RunError: the disk is full.
    """
    write_atomic(folder / SUITE_FILE, json_text(check_suite(value), where=SUITE_FILE) + "\n")
