"""What a run needs before its first round: host, base model, data, adapter, plan; and the checks that fail early."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedloom.data.federation import Federation, prepare
from fedloom.data.pair_batches import Pairs
from fedloom.errors import RunError, UserError
from fedloom.models.load import Base, load_base
from fedloom.models.rows import positions_of
from fedloom.ops.host import tune_host
from fedloom.ops.names import CONTROL, apart
from fedloom.rounds import initial_state
from fedloom.runtimes import Room
from fedloom.runtimes.lead import Lead
from fedloom.runtimes.team import Team, device_of
from fedloom.study import checkpoint
from fedloom.study.arm_tasks import Benchmark, open_benchmarks
from fedloom.study.build import (
    adapter_of,
    algorithm_of,
    check_start,
    started,
    uploads_per_round,
    width_of,
)
from fedloom.study.choose import LAST
from fedloom.study.costs import Flops, training_flops
from fedloom.study.folder import temporary_beside
from fedloom.study.measure import Measures, OnScored, measures, score_of
from fedloom.study.objections import objections
from fedloom.study.recipe import Recipe
from fedloom.study.settings import ZEROTH_DEFAULTS
from fedloom.types import Adapter

LOCAL_CLIENTS = 10_000  # each has a model, and each model is tested on the rows of all
SMOKE_CLIENTS, SMOKE_ROWS, SMOKE_STEPS, SMOKE_ITEMS = 2, 8, 2, 2


def device_name() -> str:
    return device_of(None).type


def make_base(recipe: Recipe, team: Team | None = None) -> Base:
    """The recipe's base model, freshly loaded, with what the run starts from in its weights."""
    base = load_base(
        recipe.model,
        dtype=recipe.dtype,
        quantization=recipe.quantization,
        trust_remote_code=recipe.trust_remote_code,
        device=device_of(team),
    )
    return started(base, recipe)


@dataclass
class Session:
    """A recipe with its model and data. Nothing has been written yet."""

    recipe: Recipe
    base: Base
    federation: Federation
    adapter: Adapter
    threads: int
    room: Room  # clients in one pass, as far as is known by now
    benchmarks: Sequence[Benchmark] = ()
    best_by: str = LAST  # what a best state is chosen by; LAST where there is nothing
    lead: Lead | None = None  # of the processes that share the work, where there are several
    flops: Flops | None = None  # of training, where they were found while the base was whole

    @property
    def owners(self) -> Sequence[str]:
        return self.federation.ids

    def training_flops(self) -> Flops:
        if self.flops is not None:
            return self.flops
        params = initial_state(algorithm_of(self.recipe), self.adapter, self.recipe.seed).params
        gradients = self.recipe.client.kind not in ZEROTH_DEFAULTS
        return training_flops(self.adapter, apart(params, CONTROL)[1], gradients=gradients)

    def measures(self, on_scored: OnScored | None = None) -> Measures:
        return measures(self.recipe, self.federation, on_scored)

    def data_digest(self) -> str:
        """Of every token and who holds it, so that a resumed run is sure to see the same data."""
        return self.federation.digest()


def open_session(recipe: Recipe, *, smoke: bool = False, team: Team | None = None, processes: int = 1) -> Session:
    """Load the model, prepare the data, put the adapter on.

    In a team every process does, on its own device; the leader prepares the data first, the others find it prepared.

    Args:
        processes: on this host, which share its cores, where it is asked without a team what one of several would do.

    Raises:
        UserError: model, data, split, adapter or benchmarks are not as they should be; nothing was written.
    """
    host = tune_host(recipe.runtime.threads, processes if team is None else team.local_size)
    algorithm_of(recipe)  # a wrong composition is told before anything is loaded
    benchmarks = open_benchmarks(recipe)
    base = make_base(recipe, team)
    with _leader_first(team):
        federation = prepare(recipe.data, recipe.split, base.tokenizer, recipe.seed)
    recipe = for_rows(recipe, federation)
    _check_positions(base, recipe, federation)
    best_by = _chosen_by(recipe, federation)
    if smoke:
        federation = federation.small(max(SMOKE_CLIENTS, 1 if team is None else team.size), SMOKE_ROWS)
        recipe = smoke_recipe(recipe)
        best_by = _chosen_by(recipe, federation)
    _check_cohort(recipe, federation, processes if team is None else team.size)
    adapter = adapter_of(base, recipe)
    check_start(recipe, adapter)
    room = Room(width_of(recipe, federation, base))
    return Session(recipe, base, federation, adapter, host.threads, room, benchmarks, best_by)


def _chosen_by(recipe: Recipe, federation: Federation) -> str:
    """What the best state is chosen by with this data.

    Raises:
        UserError: the recipe chooses by what this data does not have.
    """
    settings = recipe.evaluate
    wanted = settings.best_by
    if wanted is not None and "/" in wanted:
        return wanted
    if wanted is None or not federation.sizes("validation").any():
        if settings.early_stopping_patience is not None:
            raise UserError(
                f"evaluate.early_stopping_patience {settings.early_stopping_patience}, but no client has a validation "
                "row: there is nothing to stop by",
                hint="a larger data.val_set_size, or early_stopping_patience=null",
                code="evaluate.best_by",
            )
        return LAST
    if wanted == "preference_accuracy" and not federation.paired:
        raise UserError(
            f"evaluate.best_by {wanted}, but these rows are answers to imitate, not pairs",
            hint="evaluate.best_by=loss, or rows with a chosen and a rejected answer",
            code="evaluate.best_by",
        )
    if wanted.startswith("score") and score_of(recipe, federation) == "none":
        raise UserError(
            f"evaluate.best_by {wanted}, but these rows have no score of their own (evaluate.score auto found none)",
            hint="evaluate.best_by=loss, or name a score: evaluate.score=exact",
            code="evaluate.best_by",
        )
    return wanted


def smoke_recipe(recipe: Recipe) -> Recipe:
    """One round of a few steps through every part that the recipe has."""
    steps = {"local_steps": min(recipe.local_steps, SMOKE_STEPS)} if recipe.local_steps is not None else {}
    return recipe.model_copy(
        update={
            "rounds": 1,
            "clients_per_round": None,
            "client": recipe.client.model_copy(update={"warmup_rounds": 0}),
            "evaluate": recipe.evaluate.model_copy(
                update={
                    "eval_rounds": 1,
                    "early_stopping_patience": None,
                    "early_stopping_threshold": None,
                    "task_limit": SMOKE_ITEMS if recipe.evaluate.tasks else None,
                    "task_rounds": None if recipe.evaluate.task_rounds is None else 1,
                    "task_clients": None if recipe.evaluate.task_clients is None else SMOKE_CLIENTS,
                }
            ),
            "runtime": recipe.runtime.model_copy(update={"client_dropout": 0.0, "buffer_size": None}),
            **steps,
        }
    )


def for_rows(recipe: Recipe, federation: Federation) -> Recipe:
    """The recipe with the loss that its rows ask for, where `data.type: auto` left that to them.

    Raises:
        UserError: it does not go together with pairs, or has settings of a loss on pairs and no pairs.
    """
    if not federation.paired:
        given = [key for key, value in recipe.dpo if value is not None]
        if given:
            raise UserError(
                f"dpo.{given[0]} would have no effect: {federation.report.source} was read as "
                f"{federation.report.read_as}, answers to imitate; it compares pairs of answers",
                hint="leave it out, or data with a chosen and a rejected answer to each prompt",
                code="data.preference",
            )
        return recipe
    if recipe.data.type == "preference":
        return recipe
    values = recipe.model_dump()
    values["data"]["type"] = "preference"
    settled = Recipe.model_validate(values, context={"compose": False})
    wrong = [f"{one.keys[0]}: {one.message}" for one in objections(settled)]
    if wrong:
        raise UserError(
            f"{federation.report.source} was read as preference data (pairs of a chosen and a rejected answer):\n  - "
            + "\n  - ".join(wrong),
            hint="to imitate the chosen answers instead: data.columns.completion=chosen, or output=chosen for rows "
            "with an instruction; data.type=chat data.columns.messages=chosen where chosen is a whole conversation",
            code="data.preference",
        )
    return settled


@contextlib.contextmanager
def _leader_first(team: Team | None) -> Iterator[None]:
    if team is not None and not team.leads:
        team.barrier()
    yield
    if team is not None and team.leads:
        team.barrier()


def _check_cohort(recipe: Recipe, federation: Federation, processes: int) -> None:
    wanted, there = recipe.clients_per_round, len(federation.clients)
    if isinstance(wanted, int) and wanted > there:
        raise UserError(
            f"clients_per_round {wanted}, but the split has {there} clients: at most {there}",
            hint=f"clients_per_round={there}, or a split with more clients",
            code="recipe.clients_per_round",
        )
    if "local" in recipe.arms and there > LOCAL_CLIENTS:
        raise UserError(
            f"arms: local trains a model for each of {there:,} clients and tests each on the rows of all: at most "
            f"{LOCAL_CLIENTS:,} clients",
            hint="arms=[federated], or a smaller split.clients",
            code="recipe.arms",
        )
    cohort = uploads_per_round(recipe, there)
    trained = max({"federated": cohort, "local": there}.get(arm, 1) for arm in recipe.arms)
    if processes > trained:
        more = f", or clients_per_round={processes}" if there >= processes and "federated" in recipe.arms else ""
        raise UserError(
            f"{processes} processes, but a round trains {trained} client{'s' * (trained != 1)}: the others would have "
            "nothing to do",
            hint=(f"--nproc {trained}" if trained > 1 else "one process") + more,
            code="processes.cohort",
        )


def _check_positions(base: Base, recipe: Recipe, federation: Federation) -> None:
    positions = positions_of(base.model)
    parts = [federation.pooled(part) for part in ("train", "validation", "test")]
    longest = max(int((Pairs(one) if federation.paired else one).lengths.max(initial=0)) for one in parts)
    if isinstance(positions, int) and longest > positions:
        raise UserError(
            f"the longest example has {longest} tokens, but {recipe.model} has {positions} positions",
            hint=f"data.max_length={positions}",
            code="data.max_length",
        )


def try_checkpoint(session: Session, folder: Path) -> None:
    """Write the first state as a checkpoint and read it back.

    Raises:
        RunError: it cannot be written where the run will lie, or does not come back as it was.
    """
    state = initial_state(algorithm_of(session.recipe), session.adapter, session.recipe.seed)
    place = temporary_beside(folder / "try")
    try:
        checkpoint.save(place, state, {"try": True}, 1, False)
        back, _ = checkpoint.load(place, state)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    same = all(torch.equal(back.params[name], leaf) for name, leaf in state.params.items())
    if not same:
        raise RunError("a checkpoint does not come back as it was written", code="checkpoint.check")


def shown_prompt(session: Session) -> list[str]:
    """One training example as the model will see it, with what ends it."""
    federation = session.federation
    train = next(iter(federation.clients.values())).train
    stop = f"(stops at {federation.report.stop})"

    def short(text: str) -> str:
        return text if len(text) <= 300 else text[:150] + " [...] " + text[-150:]

    def shown(side: int, shade: str) -> str:
        example = Pairs(train)[0].rejected if side else train[0]
        return short("".join(text for text, is_ in federation.preview(example, side=side) if is_ == shade))

    lines = [f"prompt    {shown(0, 'masked')!r}"]
    if not federation.paired:
        return [*lines, f"answer    {shown(0, 'trained')!r} {stop}"]
    return [*lines, f"chosen    {shown(0, 'trained')!r} {stop}", f"rejected  {shown(1, 'trained')!r}"]
