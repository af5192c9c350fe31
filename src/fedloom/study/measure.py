"""What is measured of an arm: loss and score, on each client's own rows and on the common test set.

The common test set is the union of the clients' test sets. One model for all is run over each client's part, and the
parts are added; where each client has its own model, each of them is run over every client's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fedloom.data.batches import eval_batches
from fedloom.data.federation import Federation
from fedloom.data.pair_batches import Pairs, eval_pair_batches
from fedloom.data.tokens import pad_id_of
from fedloom.evaluate.loss import add_metrics, loss_evaluation, mean_loss
from fedloom.evaluate.preference import preference_evaluation, preference_figures
from fedloom.evaluate.scores import Scored, auto_score, mean_score, score_evaluation
from fedloom.study.recipe import Recipe
from fedloom.study.result import ArmResult, Scores, scores
from fedloom.types import Adapter, Client, Evaluation, Metrics, Tree

DEFAULT_NEW_TOKENS = 256

OnScored = Callable[[str, Scored], None]  # the client whose row it is, what was answered


class Measures(NamedTuple):
    """The evaluations of a run. `own_*` give a client's metrics; `common` gives them per owner, as `OWNER/metric`."""

    validation: Evaluation
    own: Evaluation
    common: Evaluation
    score: str

    def table(self) -> dict[str, Evaluation]:
        """By name, as they are asked for over a wire."""
        return {one.name: one for one in (self.validation, self.own, self.common)}


def score_of(recipe: Recipe, federation: Federation) -> str:
    """The name of the score: the recipe's, or what fits the data."""
    wanted = recipe.evaluate.score
    return auto_score(federation.task, federation.rows) if wanted == "auto" else wanted


def measures(recipe: Recipe, federation: Federation, on_scored: OnScored | None = None) -> Measures:
    """Evaluations over prepared data. Validation is scored when that is asked for, or the best is chosen by a score."""
    score = score_of(recipe, federation)
    pad_id = pad_id_of(federation.tokenizer)
    task = federation.task
    settings = recipe.evaluate
    new_tokens = settings.max_new_tokens or (task.max_new_tokens if task is not None else DEFAULT_NEW_TOKENS)

    def part(name: str, what: str, scored: bool) -> Evaluation:
        """Loss, and score if asked for, on `what` of each client."""

        def examples(client: str):  # type: ignore[no-untyped-def]
            return getattr(federation.clients[client], what)

        size = {"batch_size": settings.eval_batch_size, "pad_id": pad_id}
        if federation.paired:
            loss = preference_evaluation(name, lambda client: eval_pair_batches(Pairs(examples(client)), **size))
        else:
            loss = loss_evaluation(name, lambda client: eval_batches(examples(client), **size))
        if not scored:
            return loss
        told = on_scored
        judged = score_evaluation(
            name,
            lambda client: federation.rows_of(examples(client)),
            score,
            federation.tokenizer,
            max_new_tokens=new_tokens,
            batch_size=settings.eval_batch_size,
            chat_template=federation.chat_template,
            limit=settings.limit,
            on_scored=None if told is None else (lambda one: told(one.client, one)),
        )

        def run(adapter: Adapter, tree_C: Tree, clients: Sequence[Client]) -> list[Metrics]:
            pairs = zip(loss.run(adapter, tree_C, clients), judged.run(adapter, tree_C, clients), strict=True)
            return [{**a, **b} for a, b in pairs]

        return Evaluation(name, run)

    scoring = score != "none"
    by_score = (settings.best_by or "").startswith("score")
    owners = list(federation.clients)

    own = part("own", "test", scoring)

    def run_common(adapter: Adapter, tree_C: Tree, clients: Sequence[Client]) -> list[Metrics]:
        """Each client's model in turn, as one that all owners have: their rows then share its passes."""
        everyone = [Client(owner, ()) for owner in owners]
        rows: list[Metrics] = []
        for c in range(len(clients)):
            one_C = {name: leaf[c : c + 1].expand(len(owners), *leaf.shape[1:]) for name, leaf in tree_C.items()}
            found = own.run(adapter, one_C, everyone)
            rows.append({f"{number}/{key}": value for number, row in enumerate(found) for key, value in row.items()})
        return rows

    return Measures(
        part("validation", "validation", scoring and (settings.score_validation or by_score)),
        own,
        Evaluation("common", run_common),
        score,
    )


def one_model(per_client: Mapping[str, Metrics]) -> ArmResult:
    """Scores of an arm with one model, from its metrics on each client's test set."""
    total = add_metrics(per_client.values())
    common = summary(per_client, loss=_finite(mean_loss(total)), score=mean_score(total))
    return {**common, "own_test": _plain_mean(per_client)}


def model_each(per_model: Mapping[str, Metrics], owners: Sequence[str]) -> ArmResult:
    """Scores of an arm with one model per client, from every model's metrics on every client's test set."""
    by_owner: dict[str, dict[str, dict[str, float]]] = {}
    for model, row in per_model.items():
        parts: dict[str, dict[str, float]] = {}
        for key, value in row.items():
            number, _, name = key.partition("/")
            parts.setdefault(owners[int(number)], {})[name] = value
        by_owner[model] = parts
    whole = {model: add_metrics(parts.values()) for model, parts in by_owner.items()}
    losses = [mean_loss(row) for row in whole.values()]
    common = summary(whole, loss=_finite(math.fsum(losses) / len(losses)))
    return {**common, "own_test": _plain_mean({model: parts[model] for model, parts in by_owner.items()})}


def summary(per_client: Mapping[str, Metrics], *, loss: float | None, score: float | None = None) -> Scores:
    """All figures over clients, from each one's metrics; `score` is their plain mean unless it is given."""
    return scores(
        {client: mean_score(row) for client, row in per_client.items()},
        loss=loss,
        score=score,
        losses={client: _finite(mean_loss(row)) for client, row in per_client.items()},
        score_weights={client: row.get("scored", 0.0) for client, row in per_client.items()},
        loss_weights={client: row.get("target_tokens", 0.0) for client, row in per_client.items()},
        preferences={client: dict(preference_figures(row)) for client, row in per_client.items()},
        preference=preference_figures(add_metrics(per_client.values())),
    )


def _plain_mean(per_client: Mapping[str, Metrics]) -> Scores:
    """Each client's model on its own test set: the mean over clients, whatever their sizes."""
    losses = [mean_loss(row) for row in per_client.values() if row.get("target_tokens") or row.get("nonfinite")]
    mean = math.fsum(losses) / len(losses) if losses else math.nan
    found = summary(per_client, loss=_finite(mean))
    each = [figures for row in per_client.values() if (figures := preference_figures(row))]
    for key in each[0] if each else ():  # clients alike, as score and loss are here
        found[key] = math.fsum(figures[key] for figures in each) / len(each)  # type: ignore[literal-required]
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
