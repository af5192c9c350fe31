"""The form of result.json, which other tools read: names here stay as they are once released."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import Annotated, NotRequired, TypedDict  # noqa: UP035  pydantic asks for this one below 3.12

from fedloom.data.listing import listed

__all__ = [
    "ARMS",
    "ArmCosts",
    "ArmResult",
    "Costs",
    "EqualSamples",
    "Outcome",
    "Result",
    "SampledArm",
    "Scores",
    "build_result",
    "check_result",
    "perplexity",
    "scores",
    "skipped_leaves",
    "versions",
]

ARMS = ("base", "local", "federated", "global")  # in the order in which tables and pictures show them

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


@with_config(extra="forbid", allow_inf_nan=False)
class Scores(TypedDict):
    """One measurement of an arm. A score is between 0 and 1; a loss is the mean over answer tokens, in nats.

    None where nothing was measured (a recipe without a score, say). Per client: the worst is the lowest score and the
    highest loss; the decile is the mean over the worst tenth of the clients (rounded down, at least one); std is that
    of the whole population (divided by n). A weighted mean counts a client by its rows (scores) or answer tokens
    (losses), a plain mean counts each client once. Figures are over all clients; of more than 1,000 with test rows as
    many, evenly spread, are named.
    """

    loss: float | None
    score: Share | None
    score_per_client: dict[str, Share | None]
    score_worst: Share | None
    score_std: Amount | None
    score_plain_mean: NotRequired[Share | None]
    score_weighted_mean: NotRequired[Share | None]
    score_decile: NotRequired[Share | None]
    perplexity: NotRequired[Amount | None]  # exp of `loss`
    loss_per_client: NotRequired[dict[str, float | None]]
    loss_plain_mean: NotRequired[float | None]
    loss_weighted_mean: NotRequired[float | None]
    loss_worst: NotRequired[float | None]
    loss_decile: NotRequired[float | None]
    loss_std: NotRequired[Amount | None]
    # Of pairs of answers (data.type preference), where a loss is a mean over pairs and there is no perplexity: the
    # share whose chosen answer has the higher reward (a tie counts half), and mean rewards beta * log pi/ref.
    preference_accuracy: NotRequired[Share]
    preference_accuracy_per_client: NotRequired[dict[str, Share | None]]
    reward_chosen: NotRequired[float]
    reward_rejected: NotRequired[float]
    reward_margin: NotRequired[float]


@with_config(extra="forbid", allow_inf_nan=False)
class ArmResult(Scores):
    """An arm on the common test set (the union of the clients' test sets), and on each client's own.

    `local` has one model per client: its `score` is the mean over them, its `score_per_client` names them. For the
    other arms `score_per_client` is the one model on each client's part of the common test set.
    """

    own_test: Scores


@with_config(extra="forbid", allow_inf_nan=False)
class Costs(TypedDict):
    """What the run cost: the federated arm's costs, and what the arms share.

    Bytes are those of serialised payloads. Seconds are wall-clock time by phase; the phases do not overlap.
    """

    bytes_up_per_client_round: Amount
    bytes_down_per_client_round: Amount
    train_tokens: Count
    train_seconds: Amount
    tokens_per_second: Amount
    peak_memory_bytes: Count  # of the whole run
    trainable_parameters: Count
    total_parameters: Count
    trainable_share: NotRequired[Share]
    prepare_seconds: NotRequired[Amount]  # model, data, plan: before the first arm
    samples: NotRequired[Count]
    flops: NotRequired[Amount]
    communication_seconds: NotRequired[Amount]
    evaluate_seconds: NotRequired[Amount]


@with_config(extra="forbid", allow_inf_nan=False)
class ArmCosts(TypedDict):
    """The same of one arm. What an arm does not have (the base trains nothing) is 0."""

    bytes_up_per_client_round: Amount
    bytes_down_per_client_round: Amount
    train_tokens: Count
    train_seconds: Amount  # local training, averaging, the server's step
    tokens_per_second: Amount
    evaluate_seconds: NotRequired[Amount]  # validation, test, benchmark tasks
    communication_seconds: NotRequired[Amount]  # making and reading messages, where the runtime sends any
    checkpoint_seconds: NotRequired[Amount]
    simulated_seconds: NotRequired[Amount]  # of the federated arm, where every client has its own machine
    rounds: NotRequired[Count]
    samples: NotRequired[Count]  # examples trained on, all clients together
    samples_per_model: NotRequired[Amount]  # of them, what one model has seen: for `local` the mean over its models
    padded_tokens: NotRequired[Count]  # of padded rows; packed rows need fewer
    flops: NotRequired[Amount]  # of training, an estimate on real tokens
    flops_padded: NotRequired[Amount]  # the same on padded tokens
    peak_memory_bytes: NotRequired[Count]
    peak_memory_of: NotRequired[Literal["arm", "process"]]  # "process": the highest since the process began
    trainable_share: NotRequired[Share]
    skipped_steps: NotRequired[Count]  # local steps in float16 that were not made, as their gradient overflowed


@with_config(extra="forbid", allow_inf_nan=False)
class Outcome(TypedDict):
    """How an arm ended, and which of its states was tested."""

    rounds: Count  # done
    planned_rounds: Count
    stopped_early: bool
    best_round: Count | None
    best_by: str  # a key of validation, "TASK/METRIC", or "last": nothing to choose by, so the last round is the best
    best_value: float | None
    round: Count  # the state that was tested (and exported)


@with_config(extra="forbid", allow_inf_nan=False)
class SampledArm(TypedDict):
    """An arm after the first round in which its model had seen enough samples."""

    round: Count
    samples: Amount  # that one model has seen by then; fewer than asked for where the whole run has fewer
    result: ArmResult


@with_config(extra="forbid", allow_inf_nan=False)
class EqualSamples(TypedDict):
    """Arms compared after one model has seen the same number of samples: as many as a local model sees in the run."""

    samples: Count
    arms: dict[str, SampledArm]


@with_config(extra="forbid", allow_inf_nan=False)
class Result(TypedDict):
    """result.json."""

    schema: Literal[1]
    fedloom_version: str
    seed: int
    status: Literal["done", "stopped", "running"]
    arms: dict[str, ArmResult]
    equal_samples: NotRequired[EqualSamples]
    tasks: NotRequired[dict[str, dict[str, dict[str, float]]]]  # arm -> benchmark task -> metric -> value
    outcomes: NotRequired[dict[str, Outcome]]
    costs: Costs
    costs_per_arm: dict[str, ArmCosts]
    skipped: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    versions: dict[str, str]
    recipe: dict[str, Any]


_RESULT: TypeAdapter[Result] = TypeAdapter(Result)


def scores(
    per_client: Mapping[str, float | None],
    *,
    loss: float | None,
    score: float | None = None,
    losses: Mapping[str, float | None] | None = None,
    score_weights: Mapping[str, float] | None = None,
    loss_weights: Mapping[str, float] | None = None,
    preference: Mapping[str, float] | None = None,
    preferences: Mapping[str, Mapping[str, float]] | None = None,
) -> Scores:
    """Scores of one arm from its clients' scores; `score` is their mean unless it is given.

    `score` differs from that mean where clients' test sets differ in size and one model is scored on their union.

    Args:
        losses: the clients' losses, for the same figures of the loss.
        score_weights, loss_weights: how much a client counts in the weighted means; without them these are left out.
        preference, preferences: figures of pairs of answers, of all clients together and of each; empty where the rows
            are no pairs.
    """
    found: Scores = {
        "loss": loss,
        "score": _mean(per_client) if score is None else score,
        "score_per_client": listed(per_client),
        "score_worst": min(_known(per_client), default=None),
        "score_std": _std(per_client),
        "score_plain_mean": _mean(per_client),
        "score_decile": _worst_tenth(per_client, highest=False),
        "perplexity": None if preference else perplexity(loss),
    }
    if preference:
        found.update(preference)  # type: ignore[typeddict-item]
        found["preference_accuracy_per_client"] = listed(
            {client: figures.get("preference_accuracy") for client, figures in (preferences or {}).items()}
        )
    if score_weights is not None:
        found["score_weighted_mean"] = _mean(per_client, score_weights)
    if losses is not None:
        found["loss_per_client"] = listed(losses)
        found["loss_plain_mean"] = _mean(losses)
        found["loss_worst"] = max(_known(losses), default=None)
        found["loss_decile"] = _worst_tenth(losses, highest=True)
        found["loss_std"] = _std(losses)
        if loss_weights is not None:
            found["loss_weighted_mean"] = _mean(losses, loss_weights)
    return found


def perplexity(loss: float | None) -> float | None:
    """exp of a loss in nats; None where there is none, or it is beyond what a number holds."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def _known(values: Mapping[str, float | None]) -> list[float]:
    return [value for value in values.values() if value is not None]


def _mean(values: Mapping[str, float | None], weights: Mapping[str, float] | None = None) -> float | None:
    """None when nothing is known, or what is known weighs nothing. Shares of 1 stay at most 1, rounding aside."""
    known = [(value, 1.0 if weights is None else weights[name]) for name, value in values.items() if value is not None]
    whole = math.fsum(weight for _, weight in known)
    if not whole:
        return None
    mean = math.fsum(value * weight for value, weight in known) / whole
    return min(max(mean, min(value for value, _ in known)), max(value for value, _ in known))


def _std(values: Mapping[str, float | None]) -> float | None:
    known, mean = _known(values), _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known)) if mean is not None else None


def _worst_tenth(values: Mapping[str, float | None], *, highest: bool) -> float | None:
    known = sorted(_known(values), reverse=highest)
    worst = known[: max(1, len(known) // 10)]
    return math.fsum(worst) / len(worst) if worst else None


def versions(
    packages: Sequence[str] = ("torch", "transformers", "tokenizers", "safetensors", "numpy"),
) -> dict[str, str]:
    """Versions of Python and of the packages that figures may depend on; those that are not installed are left out."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("fedloom", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def skipped_leaves(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was left out, as (place, how much or why); zeros and empty parts are no news."""

    def leaves(place: str, value: Any) -> list[tuple[str, Any]]:
        if isinstance(value, Mapping):
            parts = (leaves(f"{place}, {key}" if place else str(key), item) for key, item in value.items())
            return [leaf for part in parts for leaf in part]
        return [(place.replace("_", " "), value)] if value else []

    return leaves("", result.get("skipped") or {})


def build_result(
    *,
    seed: int,
    arms: Mapping[str, ArmResult],
    costs: Costs,
    costs_per_arm: Mapping[str, ArmCosts],
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    recipe: Mapping[str, Any],
    skipped: Mapping[str, Any] | None = None,
    status: Literal["done", "stopped", "running"] = "done",
    equal_samples: EqualSamples | None = None,
    tasks: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    outcomes: Mapping[str, Outcome] | None = None,
) -> Result:
    """The content of result.json, checked.

    Raises:
        ValueError: a part does not have its form; differences are named.
    """
    known = versions()
    return check_result(
        {
            "schema": 1,
            "fedloom_version": known.get("fedloom", "unknown"),
            "seed": seed,
            "status": status,
            "arms": dict(arms),
            **({} if equal_samples is None else {"equal_samples": equal_samples}),
            **({} if tasks is None else {"tasks": {arm: dict(found) for arm, found in tasks.items()}}),
            **({} if outcomes is None else {"outcomes": dict(outcomes)}),
            "costs": dict(costs),
            "costs_per_arm": dict(costs_per_arm),
            "skipped": dict(skipped or {}),
            "data": dict(data),
            "model": dict(model),
            "versions": known,
            "recipe": dict(recipe),
        }
    )


def check_result(value: Mapping[str, Any]) -> Result:
    """`value` if it has the form of result.json.

    Raises:
        ValueError: it has not; differences are named with their place.
    """
    try:
        return _RESULT.validate_python(dict(value), strict=False)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("result.json would be wrong: " + "; ".join(wrong[:20]) + more) from None
