"""What a run needs before its first round: host, base model, data, adapter, plan; and the checks that fail early."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom import tree
from fedloom.data.batches import Batches, collate
from fedloom.data.federation import PARTS, Federation, prepare
from fedloom.data.listing import spread
from fedloom.data.pair_batches import PairBatches, Pairs, collate_pairs
from fedloom.data.tokens import pad_id_of
from fedloom.errors import RunError, UserError
from fedloom.models.causal import positions_of
from fedloom.models.load import Base, load_base
from fedloom.models.quantised import stored_bytes
from fedloom.ops.host import tune_host
from fedloom.ops.names import CONTROL, apart
from fedloom.rounds import initial_state
from fedloom.runtimes import Room
from fedloom.runtimes.cohort import train_block
from fedloom.runtimes.lead import Lead
from fedloom.runtimes.room import OUT_OF_MEMORY
from fedloom.runtimes.team import Team, device_of
from fedloom.study import checkpoint
from fedloom.study.arm_tasks import Benchmark, open_benchmarks
from fedloom.study.build import (
    adapter_of,
    algorithm_of,
    check_start,
    clients_in_a_pass,
    message_bytes,
    population_of,
    started,
    uploads_per_round,
    width_of,
)
from fedloom.study.choose import LAST
from fedloom.study.costs import Flops, peak_memory_bytes, training_flops
from fedloom.study.folder import temporary_beside
from fedloom.study.measure import Measures, OnScored, measures, score_of
from fedloom.study.objections import objections
from fedloom.study.progress import amount, byte_text, duration
from fedloom.study.recipe import Recipe
from fedloom.study.settings import ZEROTH_DEFAULTS
from fedloom.types import Adapter, Client, Site

LOCAL_CLIENTS = 10_000  # each has a model, and each model is tested on the rows of all
PLANNED_CLIENTS = 1000  # whose batches are looked at for the plan; of more, as many, evenly spread
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


def open_session(recipe: Recipe, *, smoke: bool = False, team: Team | None = None) -> Session:
    """Load the model, prepare the data, put the adapter on.

    In a team every process does, on its own device; the leader prepares the data first, the others find it prepared.

    Raises:
        UserError: model, data, split, adapter or benchmarks are not as they should be; nothing was written.
    """
    host = tune_host(recipe.runtime.threads, 1 if team is None else team.local_size)
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
    _check_cohort(recipe, federation, 1 if team is None else team.size)
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


# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanReport:
    """What a run will do and cost, found without training. Bytes are exact; memory and time come from a short probe."""

    model: str
    dtype: str
    dtype_reason: str
    device: str
    threads: int
    total_parameters: int
    trainable_parameters: int
    adapter: str
    method: str
    clients: int
    clients_per_round: int
    rounds: int
    steps_per_round: int
    rows: dict[str, int]
    tokens: dict[str, int]
    bytes_up_per_client_round: int
    bytes_down_per_client_round: int
    bytes_total: int
    score: str
    benchmarks: dict[str, int]
    arms: list[str]
    clients_per_batch: int
    data: str
    tokens_per_second: float | None
    train_seconds: float | None
    peak_memory_bytes: int
    quantization: str = "none"
    weight_bytes: int = 0  # of the frozen model, as it lies in memory
    loss: str = ""  # on pairs, in words; of answers to imitate there is one only

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _stored(self) -> str:
        if self.quantization == "none":
            return ""
        return f"layers in {self.quantization} ({byte_text(self.weight_bytes)} in all), computed in "

    @property
    def lines(self) -> list[str]:
        """For people."""
        method = f"{self.method}, {self.loss}" if self.loss else self.method
        share = 100 * self.trainable_parameters / self.total_parameters
        lines = [
            f"model     {self.model}, {amount(self.total_parameters)} parameters, {self._stored()}{self.dtype_reason}; "
            f"{self.device}" + (f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""),
            f"adapter   {self.adapter}: {amount(self.trainable_parameters)} trainable parameters ({share:.2f} %)",
            f"data      {self.data}",
            f"tokens    {amount(self.tokens['train'])} to train on, {amount(self.tokens['train_target'])} with loss; "
            f"{amount(self.tokens['test'])} to test on; score: {self.score}",
            f"work      {method}: {self.rounds} rounds x {self.clients_per_round} of {self.clients} clients x "
            f"{self.steps_per_round} steps; arms: {', '.join(self.arms)}",
            f"bytes     up {byte_text(self.bytes_up_per_client_round)}, down "
            f"{byte_text(self.bytes_down_per_client_round)} per client and round; "
            f"{byte_text(self.bytes_total)} in all",
        ]
        if self.benchmarks:
            items = ", ".join(f"{name} {count:,} items" for name, count in self.benchmarks.items())
            lines.insert(-2, f"tasks     {items}, put to each arm's model")
        if self.train_seconds is not None and self.tokens_per_second is not None:
            lines.append(
                f"time      about {duration(self.train_seconds)} of training at {amount(self.tokens_per_second)} "
                f"tokens/s; memory so far {byte_text(self.peak_memory_bytes)}"
            )
        return lines


def plan(session: Session, *, probe: bool = True) -> PlanReport:
    """What the session's run will do and cost.

    `probe` times a step with typical batches, after one with the longest row in every place: what does not fit in
    memory, or has no gradient, fails here and not at night.
    """
    recipe, federation, adapter = session.recipe, session.federation, session.adapter
    algorithm = algorithm_of(recipe)
    state = initial_state(algorithm, adapter, recipe.seed)
    population = population_of(federation, recipe, "federated")
    ids = population.ids
    shown = [ids[place] for place in spread(len(ids), PLANNED_CLIENTS)]
    cohort = uploads_per_round(recipe, len(ids))
    told = () if recipe.runtime.kind == "buffered" else tuple(ids[:cohort])  # nobody is told of others there
    steps = population.steps_of(federation.sizes("train"))
    up, down = message_bytes(algorithm, adapter, state, Client(ids[0], ()), told, int(steps.max()))
    speed = _probe(session) if probe else None
    report = federation.report
    seconds = None
    if speed is not None:
        per_round = sum(population.batches(client, 0).num_tokens for client in shown) / len(shown) * cohort
        local = len(ids) / cohort  # the local arm trains everyone in every round
        arms = sum({"federated": 1.0, "global": 1.0, "local": local}.get(arm, 0.0) for arm in recipe.arms)
        seconds = per_round * recipe.rounds * arms / speed
    return PlanReport(
        model=recipe.model,
        dtype=str(session.base.dtype).removeprefix("torch."),
        dtype_reason=session.base.dtype_reason,
        device=session.base.device.type,
        threads=session.threads,
        total_parameters=session.base.num_parameters,
        trainable_parameters=tree.num_elements(apart(state.params, CONTROL)[1]),
        adapter=_adapter_said(recipe),
        method=recipe.method,
        clients=len(ids),
        clients_per_round=cohort,
        rounds=recipe.rounds,
        steps_per_round=round(float(steps.mean())),
        rows={part: int(federation.sizes(part).sum()) for part in PARTS},
        tokens=dict(report.tokens),
        bytes_up_per_client_round=up,
        bytes_down_per_client_round=down,
        bytes_total=(up + down) * cohort * recipe.rounds,
        score=session.measures().score,
        benchmarks={one.task.name: one.items for one in session.benchmarks},
        arms=list(recipe.arms),
        clients_per_batch=clients_in_a_pass(recipe, session.room) if algorithm.client.cohort_axis else 1,
        data=report.said,
        tokens_per_second=speed,
        train_seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        quantization=session.base.quantization,
        weight_bytes=stored_bytes(session.base.model),
        loss=f"DPO on pairs ({recipe.dpo.loss_type}, beta {recipe.dpo.beta:g})" if federation.paired else "",
    )


def _adapter_said(recipe: Recipe) -> str:
    adapter = recipe.adapter
    if adapter.lora_r is not None:
        return f"{adapter.kind} r {adapter.lora_r}"
    if adapter.num_virtual_tokens is not None:
        return f"{adapter.kind}, {adapter.num_virtual_tokens} virtual tokens"
    if adapter.kind == "last_layers":
        more = {"norm": " and the norm", "norm_and_head": ", the norm and the head"}.get(
            adapter.trainable_extra or "", ""
        )
        return f"last_layers, the {adapter.trainable_layers} highest{more}"
    if adapter.kind == "bottleneck":
        size = f"size {adapter.bottleneck_size}" if adapter.bottleneck_size else f"1/{adapter.reduction_factor:g}"
        return f"bottleneck {size} after {(adapter.bottleneck_after or '').replace('_', ' ')}"
    if adapter.num_seeds is not None:
        return f"seed_space, every weight of the model by {adapter.num_seeds:,} seeds"
    return "full, every weight of the model" if adapter.kind == "full" else adapter.kind


def _probe(session: Session) -> float:
    """Tokens per second of one block of clients, after the longest row has been through."""
    recipe, federation, adapter = session.recipe, session.federation, session.adapter
    algorithm = algorithm_of(recipe)
    state = initial_state(algorithm, adapter, recipe.seed)
    population = population_of(federation, recipe, "federated")
    width = clients_in_a_pass(recipe, session.room)
    ids = list(itertools.islice(population.ids, width if algorithm.client.cohort_axis else 1))
    train = federation.pooled("train")
    size = recipe.client.per_device_train_batch_size * recipe.client.gradient_accumulation_steps
    pad_id = pad_id_of(federation.tokenizer)
    pairs = Pairs(train) if federation.paired else None
    longest = (train if pairs is None else pairs).lengths
    place = int(longest.argmax())
    worst = collate([train[place]] * size, pad_id) if pairs is None else collate_pairs([pairs[place]] * size, pad_id)

    def run(batches: dict[str, Sequence[Any]]) -> float:
        block = [Client(client, batches[client]) for client in ids]
        sites = [Site(recipe.seed, 0, client, tuple(ids)) for client in ids]
        start = time.perf_counter()
        train_block(algorithm, adapter, state, block, sites)  # a loss that is not finite is round 1's to tell
        return time.perf_counter() - start

    while True:
        try:
            run({client: [worst] for client in ids})
            break
        except RunError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            if len(ids) == 1:
                again = "" if recipe.runtime.gradient_checkpointing else "runtime.gradient_checkpointing=true, or "
                raise RunError(
                    f"out of memory with the longest row ({int(longest.max())} tokens) in every place of "
                    f"{recipe.client.per_device_train_batch_size} rows of one client",
                    hint=f"{again}lower client.per_device_train_batch_size or data.max_length",
                    code="run.memory",
                ) from None
        session.room.halve(len(ids))
        ids = ids[: session.room.width]
    typical: dict[str, Batches | PairBatches] = {client: population.batches(client, 0)[:2] for client in ids}
    tokens = sum(batches.num_tokens for batches in typical.values())
    return tokens / max(run(dict(typical)), 1e-6)


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
