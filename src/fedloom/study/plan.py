"""What a run will do and cost, found before it is run: counted where that can be, from a few passes where not."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedloom import tree
from fedloom.data.federation import PARTS
from fedloom.models.quantised import stored_bytes
from fedloom.ops.host import available_cores
from fedloom.ops.memory import room_bytes
from fedloom.ops.names import CONTROL, apart
from fedloom.rounds import initial_state
from fedloom.runtimes.cohort import has_own_model
from fedloom.study.build import (
    algorithm_of,
    clients_in_a_pass,
    message_bytes,
    population_of,
    samples_of_a_local_model,
    uploads_per_round,
)
from fedloom.study.costs import peak_memory_bytes
from fedloom.study.forecast import (
    Cost,
    EvaluationWork,
    Forecast,
    KeptRows,
    Measured,
    Memory,
    Suggestion,
    forecast,
    kept_bytes,
    validations,
)
from fedloom.study.measure import DEFAULT_NEW_TOKENS
from fedloom.study.passes import ArmWork, Passes, arm_work, decodings, evaluation_passes
from fedloom.study.probe import Probe, Trained, faster_width, now, personal_bytes, threads_compared
from fedloom.study.progress import amount, byte_text, duration
from fedloom.study.recipe import Recipe
from fedloom.study.result import ARMS
from fedloom.study.session import Session
from fedloom.study.suggest import ways_to_fit
from fedloom.types import Client

__all__ = ["PlanReport", "plan"]

WORTH = 25  # a run has to train so much longer than trying widths takes


@dataclass(frozen=True)
class PlanReport:
    """What a run will do and cost, found without training. Bytes are exact; memory and time come from probes."""

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
    peak_memory_bytes: int  # of the run, where it was probed; else what was held so far
    held_bytes: int  # the most that was held until now
    quantization: str = "none"
    weight_bytes: int = 0  # of the frozen model, as it lies in memory
    forecast: Forecast | None = None
    notes: tuple[str, ...] = ()
    loss: str = ""  # on pairs, in words; of answers to imitate there is one only

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "forecast": None if self.forecast is None else self.forecast.to_json()}

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
            f"{self.steps_per_round} steps, {self.clients_per_batch} in a pass; arms: {', '.join(self.arms)}",
            f"bytes     up {byte_text(self.bytes_up_per_client_round)}, down "
            f"{byte_text(self.bytes_down_per_client_round)} per client and round; "
            f"{byte_text(self.bytes_total)} in all",
        ]
        if self.benchmarks:
            items = ", ".join(f"{name} {count:,} items" for name, count in self.benchmarks.items())
            lines.insert(-2, f"tasks     {items}, put to each arm's model")
        found = self.forecast
        if found is None:
            return lines
        lines.append(f"memory    {found.memory_line}")
        if self.train_seconds is not None and self.tokens_per_second is not None:
            speed = f"{amount(self.tokens_per_second)} tokens/s"
            if found.whole:
                lines.append(f"time      {found.time_line}; {speed}")
            else:
                without = "; evaluation and benchmarks come on top" if self.benchmarks else ""
                lines.append(f"time      about {duration(self.train_seconds)} of training at {speed}{without}")
        lines += [f"note      {note}" for note in (*self.notes, *found.advice)]
        lines += [f"try       {one.text}" for one in found.suggestions]
        return lines


def plan(
    session: Session, *, probe: bool = True, whole: bool = False, limit: int | None = None, processes: int = 1
) -> PlanReport:
    """What the session's run will do and cost.

    `probe` makes the largest pass of the run and a few steps: what does not fit in memory, or has no gradient, fails
    here and not at night. Where it is for memory or for a trial to say how many clients go in a pass, the session's
    room is set so.

    Args:
        whole: probe evaluation, answers, checkpoints and the report too, and what could be faster.
        limit: bytes that the run may take, where that is less than there are.
        processes: that share the work (`--nproc`); each holds a model, and takes its part of what there is.

    Raises:
        RunError: not even one client fits, or training has no gradient.
    """
    recipe, federation, adapter = session.recipe, session.federation, session.adapter
    algorithm = algorithm_of(recipe)
    state = initial_state(algorithm, adapter, recipe.seed)
    population = population_of(federation, recipe, "federated")
    ids = population.ids
    cohort = uploads_per_round(recipe, len(ids))
    told = () if recipe.runtime.kind == "buffered" else tuple(ids[:cohort])  # nobody is told of others there
    steps = population.steps_of(federation.sizes("train"))
    up, down = message_bytes(algorithm, adapter, state, Client(ids[0], ()), told, int(steps.max()))
    report = federation.report
    planner = _Planner(session, limit, processes) if probe and set(recipe.arms) != {"base"} else None
    found = None if planner is None else planner.found(whole)
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
        tokens_per_second=None if planner is None else planner.tokens_per_second,
        train_seconds=None if found is None else found.parts["training"].wall,
        peak_memory_bytes=peak_memory_bytes() if found is None else found.memory.peak,
        held_bytes=peak_memory_bytes() if planner is None else planner.probe.meter.most,
        quantization=session.base.quantization,
        weight_bytes=stored_bytes(session.base.model),
        forecast=found,
        notes=() if planner is None else tuple(planner.notes),
        loss=f"DPO on pairs ({recipe.dpo.loss_type}, beta {recipe.dpo.beta:g})" if federation.paired else "",
    )


class _Planner:
    """The probes of one plan, and what follows from them."""

    def __init__(self, session: Session, limit: int | None, processes: int) -> None:
        self.session, self.recipe, self.federation = session, session.recipe, session.federation
        self.processes = processes
        room = room_bytes()
        self.limit = limit if room is None else room if limit is None else min(room, limit)
        if self.limit is not None and session.base.device.type == "cpu":  # else each has an accelerator of its own
            self.limit //= processes
        self.loading = peak_memory_bytes()
        self.opened = process_age()
        self.probe = Probe(session, self.limit)
        self.counted: dict[int, dict[str, ArmWork]] = {}
        self.notes: list[str] = []
        self.tokens_per_second: float | None = None

    def works(self, width: int) -> Mapping[str, ArmWork]:
        """What each arm trains on, with so many clients in a pass."""
        if width not in self.counted:
            arms = [arm for arm in self.recipe.arms if arm != "base"]
            axis = self.probe.algorithm.client.cohort_axis
            self.counted[width] = {
                arm: arm_work(self.recipe, self.federation, arm, width, side_by_side=axis, processes=self.processes)
                for arm in arms
            }
        return self.counted[width]

    def found(self, whole: bool) -> Forecast:
        trained = self.probe.training(self.works, steps=3 if whole else 2)
        self.notes += trained.notes
        suggestions: list[Suggestion] = []
        if self.recipe.runtime.clients_per_batch == "fastest" and trained.measured:
            self._take_the_fastest(trained)
        width = self.session.room.width
        works = self.works(width)
        measured = Measured(process_age(), trained.step, trained.per_client_round, follower=self.opened)
        memory = Memory(
            resident=trained.resident,
            training=trained.largest_bytes,
            states=self._states(works),
            loading=self.loading,
            measured=trained.measured,
            code=self.probe.code_to_come(works),
        )
        evaluations: dict[str, list[EvaluationWork]] | None = None
        most = self._new_tokens()
        kept = None if self.probe.frozen is None else self._kept_rows(works)
        if kept is not None:
            on_host = self.session.base.device.type == "cpu"  # else the memory that is told is the accelerator's
            memory = replace(memory, kept=self.probe.still_to_keep(kept) if on_host else 0)
            measured = replace(measured, making=self.probe.making())
        if whole:
            measured, memory = self._probe_the_rest(measured, memory, most)
            if measured.evaluation is not None:
                evaluations = self._evaluations(width, most)
        equal = self._equal_samples()
        parts = forecast(
            self.recipe,
            works,
            measured,
            evaluations,
            equal_samples=equal,
            most_new_tokens=most,
            models=self._models(),
            kept=kept,
        )
        real = sum(work.real_tokens for work in works.values())
        self.tokens_per_second = real / max(parts["training"].wall, 1e-6)
        found = Forecast(memory, self.limit, parts, whole and evaluations is not None, processes=self.processes)
        if found.too_much:
            suggestions += ways_to_fit(self.session, self.probe, trained, found, self.works)
        advice: tuple[str, ...] = ()
        if whole and trained.measured:
            advice = self._busy(trained)
            if not found.too_much:
                suggestions += self._faster(trained, found)
        return replace(found, suggestions=tuple(suggestions), advice=advice)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _states(self, works: Mapping[str, ArmWork]) -> int:
        """Bytes of what clients keep, in the arm that keeps most."""
        most = 0
        for arm, work in works.items():
            algorithm = self.probe.algorithm if arm == "federated" else algorithm_of(self.recipe, arm)
            each = personal_bytes(algorithm, self.probe.state)
            seen = work.models if arm == "local" else min(len(self.federation.clients), work.clients * work.rounds)
            most = max(most, kept_bytes(each, seen))
        return most

    def _probe_the_rest(self, measured: Measured, memory: Memory, most: int) -> tuple[Measured, Memory]:
        width = self.session.room.width
        tests = evaluation_passes(self.recipe, self.federation, "test", width)
        line, added = self.probe.evaluation(tests.largest)
        score = self.session.measures().score
        if line is not None and score != "none":
            writing = decodings(self.recipe, self.federation, "test", width, most)
            token, judge, untrained, written = self.probe.answers(writing, line, most, score)
            measured = replace(measured, token=token, judge=judge, untrained_answer=untrained)
            added = max(added, written)
        if self.session.benchmarks:
            tasks, asking = self.probe.tasks()
            measured = replace(measured, tasks=tasks)
            added = max(added, asking)
            self.notes += [
                f"{one.task.name} is not in the time: another program puts its questions (lm-evaluation-harness)"
                for one in self.session.benchmarks
                if one.task.name not in tasks
            ]
        report, report_bytes = self.probe.report()
        measured = replace(measured, evaluation=line, checkpoint=self.probe.checkpoint(), report=report)
        return measured, replace(memory, evaluation=added, report=report_bytes)

    def _new_tokens(self) -> int:
        task = self.federation.task
        own = task.max_new_tokens if task is not None else DEFAULT_NEW_TOKENS
        return self.recipe.evaluate.max_new_tokens or own

    def _evaluations(self, width: int, most: int) -> dict[str, list[EvaluationWork]]:
        recipe, federation = self.recipe, self.federation
        scored = self.session.measures().score != "none"
        by_score = (recipe.evaluate.best_by or "").startswith("score")
        validated = scored and (recipe.evaluate.score_validation or by_score)
        found: dict[str, list[EvaluationWork]] = {}
        for arm in (name for name in ARMS if name in recipe.arms):
            own = arm == "local"
            found[arm] = [
                EvaluationWork(
                    evaluation_passes(recipe, federation, "validation", width, of=of),
                    evaluation_passes(recipe, federation, "test", width, own_models=own, of=of),
                    decodings(recipe, federation, "validation", width, most, of=of) if validated else (),
                    decodings(recipe, federation, "test", width, most, own_models=own, of=of) if scored else (),
                )
                for of in ((number, self.processes) for number in range(self.processes))
            ]
        return found

    def _models(self) -> dict[str, int]:
        """Models that each arm has once trained."""
        most = min(self.recipe.evaluate.task_clients or len(self.federation.clients), len(self.federation.clients))
        own = has_own_model(self.probe.algorithm.client, self.probe.state.params)
        return {arm: most if arm == "local" or (arm == "federated" and own) else 1 for arm in self.recipe.arms}

    def _kept_rows(self, works: Mapping[str, ArmWork]) -> KeptRows:
        """Rows whose states below what is trained are kept: of every set, as far as they are met."""
        lengths = {part: self.federation.pooled(part).lengths for part in PARTS}
        trained = sum(work.real_tokens for work in works.values())
        share = min(1.0, trained / max(1.0, float(lengths["train"].sum())))
        number, tokens, visits = 0.0, 0.0, trained
        times = {"validation": 1 + len(works) * validations(self.recipe), "test": len(self.recipe.arms)}
        for part, own in lengths.items():
            met = share if part == "train" else 1.0
            number, tokens = number + met * len(own), tokens + met * float(own.sum())
            visits += times.get(part, 0) * float(own.sum())
        needed = max(1.0, tokens * self.probe.bytes_of_a_state())
        assert self.probe.frozen is not None
        return KeptRows(Passes(number, tokens, tokens), visits, min(1.0, self.probe.frozen.budget_bytes / needed))

    def _equal_samples(self) -> int | None:
        arms = self.recipe.arms
        compared = self.recipe.evaluate.equal_samples and "local" in arms and bool({"federated", "global"} & set(arms))
        return samples_of_a_local_model(self.federation, self.recipe) if compared else None

    # ---- what could be faster ----------------------------------------------------------------------------------------

    def _widest(self, trained: Trained) -> int:
        """Clients in a pass that the memory holds, and that there are."""
        cohort = uploads_per_round(self.recipe, len(self.federation.clients))
        if self.limit is None:
            return cohort
        width = trained.width
        while width < cohort:
            wider = min(cohort, 2 * width)
            _, step = self.probe.largest(self.works(wider))
            if trained.resident + trained.bytes_of(step) > self.limit:
                break
            width = wider
        return width

    def _take_the_fastest(self, trained: Trained) -> None:
        """Set the room to the fastest width, where the run is long enough for it to pay."""
        widest = self._widest(trained)
        trains = sum((trained.step.of(work.passes) for work in self.works(trained.width).values()), Cost()).wall
        alone = self.works(1)[self.probe.first_arm(self.works(1))]
        tokens = float(np.median([step.pass_tokens for step in alone.steps]))
        line = trained.step
        trial = line.per_token.wall * 2 * widest * tokens + line.each.wall * math.log2(2 * widest)
        if trains < WORTH * trial:
            self.notes.append(
                f"clients_per_batch fastest: the run is too short to try widths for {duration(trial)}; "
                f"{trained.width} by rule"
            )
            return
        best, took = faster_width(self.probe, self.works, widest, self.session.base.device.type)
        self.session.room.width = best
        said = ", ".join(f"{width}: {1 / max(cost.wall, 1e-12):,.0f}" for width, cost in took.items())
        self.notes.append(f"clients_per_batch fastest: {best} (tokens/s with so many clients in a pass: {said})")

    def _faster(self, trained: Trained, found: Forecast) -> list[Suggestion]:
        """Other widths and thread counts, tried; those that are faster."""
        suggestions = []
        kind = self.session.base.device.type
        if self.recipe.runtime.kind in ("batched", "buffered") and self.probe.algorithm.client.cohort_axis:
            widest = min(self._widest(trained), max(8, 2 * trained.width))
            best, took = faster_width(self.probe, self.works, widest, kind)
            now_takes = took.get(trained.width)
            if now_takes is not None and best != trained.width:
                gain = now_takes.wall / took[best].wall
                if gain > 1.1:
                    rest = found.time.wall - found.parts["training"].wall
                    suggestions.append(
                        Suggestion(
                            f"{gain:.2f} times the speed of training, tried on one step",
                            (f"runtime.clients_per_batch={best}",),
                            seconds=rest + found.parts["training"].wall / gain,
                        )
                    )
        if kind == "cpu" and self.session.threads > 1:
            many, one = threads_compared(self.probe, self.works, trained.width, self.session.threads)
            if many.wall > 1.1 * one.wall:
                suggestions.append(
                    Suggestion(
                        f"a step took {duration(one.wall)} with one thread and {duration(many.wall)} with "
                        f"{self.session.threads}",
                        ("runtime.threads=1",),
                    )
                )
        return suggestions

    def _busy(self, trained: Trained) -> tuple[str, ...]:
        """Whether others use the processor, by the clocks of the steps that were made."""
        if self.session.base.device.type != "cpu":
            return ()
        threads = self.session.threads * self.processes
        wall = sum(cost.wall for _, cost in trained.points)
        cpu = sum(cost.cpu for _, cost in trained.points)
        cores = available_cores()
        notes = []
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if wall > 1.3 * cpu or load > cores + threads:
            notes.append(
                f"the machine is busy (load {load:.1f} on {cores} core{'s' * (cores > 1)}; a step took {wall:.1f} s on "
                f"the wall for {cpu:.1f} s of work): the times are those of a machine that stays so"
            )
        if threads > cores:
            way = f"runtime.threads={cores}" if self.processes == 1 else f"--nproc {cores}"
            notes.append(
                f"{threads} threads{' of all processes' * (self.processes > 1)}, but {cores} core{'s' * (cores > 1)}: "
                f"they wait for one another; {way}"
            )
        return tuple(notes)


def process_age() -> Cost:
    """Since the process's first moment, on both clocks."""
    here = now()
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat, open("/proc/uptime") as uptime:
            born = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return Cost(max(here.cpu, float(uptime.read().split()[0]) - born), here.cpu)
    except (OSError, ValueError, AttributeError):
        return Cost(here.cpu, here.cpu)


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
