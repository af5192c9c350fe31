"""The form of result.json, which other tools read: names here stay as they are once released."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import Annotated, NotRequired, TypedDict  # noqa: UP035  pydantic asks for this one below 3.12

__all__ = [
    "ARMS",
    "ArmCosts",
    "ArmResult",
    "Costs",
    "Result",
    "Scores",
    "build_result",
    "check_result",
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

    None where nothing was measured (a recipe without a score, say).
    """

    loss: float | None
    score: Share | None
    score_per_client: dict[str, Share | None]
    score_worst: Share | None  # over the clients
    score_std: Amount | None  # over the clients, of the whole population (divided by n)


@with_config(extra="forbid", allow_inf_nan=False)
class ArmResult(Scores):
    """An arm on the common test set (the union of the clients' test sets), and on each client's own.

    `local` has one model per client: its `score` is the mean over them, its `score_per_client` names them.
    """

    own_test: Scores


@with_config(extra="forbid", allow_inf_nan=False)
class Costs(TypedDict):
    """What the run cost. Bytes are those of serialised payloads; seconds are wall-clock time spent training."""

    bytes_up_per_client_round: Amount
    bytes_down_per_client_round: Amount
    train_tokens: Count
    train_seconds: Amount
    tokens_per_second: Amount
    peak_memory_bytes: Count
    trainable_parameters: Count
    total_parameters: Count


@with_config(extra="forbid", allow_inf_nan=False)
class ArmCosts(TypedDict):
    """The same of one arm. What an arm does not have (the base trains nothing) is 0."""

    bytes_up_per_client_round: Amount
    bytes_down_per_client_round: Amount
    train_tokens: Count
    train_seconds: Amount
    tokens_per_second: Amount
    evaluate_seconds: NotRequired[Amount]
    rounds: NotRequired[Count]


@with_config(extra="forbid", allow_inf_nan=False)
class Result(TypedDict):
    """result.json."""

    schema: Literal[1]
    fedloom_version: str
    seed: int
    status: Literal["done", "stopped", "running"]
    arms: dict[str, ArmResult]
    costs: Costs
    costs_per_arm: dict[str, ArmCosts]
    skipped: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    versions: dict[str, str]
    recipe: dict[str, Any]


_RESULT: TypeAdapter[Result] = TypeAdapter(Result)


def scores(per_client: Mapping[str, float | None], *, loss: float | None, score: float | None = None) -> Scores:
    """Scores of one arm from its clients' scores; `score` is their mean unless it is given.

    `score` differs from that mean where clients' test sets differ in size and one model is scored on their union.
    """
    known = [value for value in per_client.values() if value is not None]
    mean = math.fsum(known) / len(known) if known else None
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known)) if mean is not None else None
    return {
        "loss": loss,
        "score": mean if score is None else score,
        "score_per_client": dict(per_client),
        "score_worst": min(known) if known else None,
        "score_std": std,
    }


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
