"""The runner: arms one after the other, a checkpoint after each round, a result at the end; resumable at any moment."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fedloom.data.batches import Batches
from fedloom.data.clients import Clients
from fedloom.data.listing import MOST_LISTED, listed
from fedloom.data.pair_batches import PairBatches
from fedloom.errors import FedloomError, RunError, UserError
from fedloom.evaluate.loss import add_metrics, mean_loss, require_finite
from fedloom.evaluate.preference import preference_figures
from fedloom.evaluate.scores import mean_score
from fedloom.evaluate.tasks.run import Answerer, answerer_of
from fedloom.ops.host import settled
from fedloom.personal import OnDisk
from fedloom.rounds import federate, initial_state
from fedloom.runtimes import batched
from fedloom.runtimes.clock import speeds
from fedloom.runtimes.cohort import SKIPPED, TOGETHER, client_model, has_own_model
from fedloom.runtimes.distributed import distributed
from fedloom.runtimes.fedbuff import clock_of
from fedloom.study import checkpoint
from fedloom.study.arm_tasks import Figures, mean_figures, measure, merged_counts, place_of
from fedloom.study.build import (
    algorithm_of,
    evaluation_load_of,
    export_adapter,
    global_pieces,
    personal_of,
    population_of,
    population_weight_of,
    rank_of,
    runtime_of,
    samples_of_a_local_model,
    sampling_of,
    schedule_of,
    start_digest,
)
from fedloom.study.choose import LAST, Best, value_of
from fedloom.study.costs import Flops, Work, peak_memory_bytes, reset_peak_memory, work_of
from fedloom.study.folder import RunFolder, temporary_beside
from fedloom.study.measure import Measures, model_each, one_model
from fedloom.study.plan import plan
from fedloom.study.processes import Processes
from fedloom.study.progress import Display, Silent, byte_text
from fedloom.study.recipe import Recipe, resolved_json, resolved_yaml
from fedloom.study.report import write_report
from fedloom.study.result import (
    ARMS,
    ArmCosts,
    ArmResult,
    Costs,
    EqualSamples,
    Outcome,
    SampledArm,
    build_result,
    versions,
)
from fedloom.study.session import (
    Session,
    make_base,
    shown_prompt,
    try_checkpoint,
)
from fedloom.study.team_tasks import TeamAnswerer
from fedloom.study.trackers import Trackers, require_trackers
from fedloom.types import Algorithm, Client, Metrics, RoundReport, Runtime, State, Tree

log = logging.getLogger("fedloom")

REPORT_SECONDS = 30.0  # the report is written at most this often while a run goes on, and at its end
MAX_BAD_SHARE = 0.0  # of validation tokens whose loss is not finite


@dataclass
class Totals:
    """What an arm has done and cost so far; saved with each checkpoint, so that a resumed run counts on."""

    best: Best
    models: int = 1  # the local arm has one per client
    tokens: float = 0.0
    padded_tokens: float = 0.0
    samples: float = 0.0
    flops: float = 0.0
    flops_padded: float = 0.0
    seconds: float = 0.0  # of rounds, communication left out
    simulated_seconds: float = 0.0  # of the federated arm
    communication_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    client_rounds: int = 0
    failed: int = 0
    skipped_steps: float = 0.0  # in float16, where a gradient overflowed
    peak_memory: int = 0
    stopped_early: bool = False
    equal: dict[str, Any] | None = None  # a `SampledArm`, once the model had seen enough samples

    @property
    def samples_per_model(self) -> float:
        return self.samples / self.models

    def count(self, report: RoundReport, flops: Flops, work: Callable[[str], Work]) -> None:
        spoken = report.metrics.get("communication_seconds", 0.0)
        self.tokens += report.metrics["tokens"]
        self.padded_tokens += report.metrics["padded_tokens"]
        self.samples += report.metrics["examples"]
        self.seconds += report.seconds - spoken
        self.communication_seconds += spoken
        self.bytes_up += report.metrics["bytes_up"]
        self.bytes_down += report.metrics["bytes_down"]
        self.client_rounds += uploads_of(report)
        self.failed += len(report.failed)
        self.skipped_steps += report.metrics.get(SKIPPED, 0.0)
        for client, row in report.clients.items():
            shape = work(client)
            # where its batches were those of an earlier round, their shape is as that of its batches now
            ratio = 1.0 if row["tokens"] == shape.tokens else row["tokens"] / max(shape.tokens, 1.0)
            targets = row["target_tokens"] if shape.targets is None else shape.targets * ratio
            padded = row["padded_tokens"]
            much = {"targets": targets, "rows": shape.rows * ratio, "steps": row["steps"]}
            self.flops += flops.of(tokens=row["tokens"], pairs=shape.pairs * ratio, **much)
            self.flops_padded += flops.of(tokens=padded, pairs=padded * shape.padded_pairs_per_token, **much)

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Totals:
        """From what `asdict` gave; what an older version did not count starts from nothing."""
        known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        return cls(**{**known, "best": Best(**saved["best"])})


def uploads_of(report: RoundReport) -> int:
    """One per client that finished; where clients do not wait for one another, one may have sent several."""
    return int(report.metrics.get("uploads", len(report.clients)))


@dataclass
class Stop:
    """Asked for by Ctrl-C or SIGTERM: once is after this round, twice is now."""

    asked: bool = False
    hear: Display = field(default_factory=Silent)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.hear.message("stopping after this round; once more stops now")


@contextlib.contextmanager
def listening(stop: Stop) -> Iterator[None]:
    """Route the two signals to `stop`, where this is possible (only a process's main thread may)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_recipe(
    recipe: Recipe,
    *,
    source: str = "",
    resume: Path | None = None,
    smoke: bool = False,
    display: Display | None = None,
    nproc: int | None = None,
) -> Path:
    """Run a recipe from its plan to its result; `resume` goes on with a run that was stopped or killed.

    With `nproc` so many processes share the work; under torchrun its processes do, and this is its process 0.

    Returns:
        The run folder.

    Raises:
        UserError: something about the recipe, the model, the data or the folder; nothing was written.
        RunError: the run could not go on (or was stopped, with exit code 130); what it had is kept and resumable.
    """
    display = display or Silent()
    with contextlib.ExitStack() as stack:
        team = Processes(stack, nproc)
        return _run(recipe, source, resume, smoke, display, team)


def _run(recipe: Recipe, source: str, resume: Path | None, smoke: bool, display: Display, processes: Processes) -> Path:
    if resume is not None and (done := RunFolder.look(resume).read_result()) and done["status"] == "done":
        display.message(f"{resume} is finished; nothing is left to do")
        display.end(done)
        return resume
    path = resume or Path(recipe.output_dir + ("-smoke" if smoke else ""))
    smoke = smoke or bool(resume is not None and RunFolder.look(resume).read_facts().get("smoke"))
    require_trackers(trackers_of(recipe))
    start = time.perf_counter()
    session = processes.open(recipe, smoke)
    stop = Stop(hear=display)
    if resume is None:
        if smoke:  # a smoke run is for looking whether all works, so it never stands in the way of the next
            path = _free(path)
        folder = RunFolder.create(path, resolved_yaml(session.recipe))
    else:
        folder = RunFolder.resume(path)
    with folder, listening(stop), settled():
        try:
            runner = _Runner(session, folder, display, stop, source, smoke, start)
            with runner.trackers:
                return runner.go(resumed=resume is not None)
        except KeyboardInterrupt:
            raise _stopped(folder, processes.option) from None
        except RunError as error:
            folder.log(f"failed: {error}")
            if not error.hint and error.code != "run.stopped":
                error.hint = f"what it had is kept; go on with: fedloom run --resume {folder.path}{processes.option}"
            raise


def trackers_of(recipe: Recipe) -> list[str]:
    return [] if recipe.report_to == "none" else list(recipe.report_to)


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that is not there."""
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.name}-{number}")
        number += 1
    return free


def _stopped(folder: RunFolder, option: str) -> RunError:
    folder.log("stopped")
    return RunError(
        "stopped",
        hint=f"go on with: fedloom run --resume {folder.path}{option}",
        code="run.stopped",
        exit_code=130,
    )


class _Runner:
    """One run's state while it goes on."""

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        display: Display,
        stop: Stop,
        source: str,
        smoke: bool,
        started: float,
    ) -> None:
        self.session, self.folder, self.display, self.stop, self.source = session, folder, display, stop, source
        self.smoke, self.started = smoke, started
        self.recipe = session.recipe
        self.measures: Measures = session.measures()
        self.best_by = session.best_by
        self.reported = time.monotonic()
        self.own_peaks = False  # whether each arm's peak of memory can be told from the ones before it
        self.left_out: dict[str, dict[str, int]] = {}  # of the last benchmarks
        self.untouched: Mapping[str, Metrics] | None = None  # validation before training: the same in all arms
        arms = self.recipe.arms
        compared = self.recipe.evaluate.equal_samples and "local" in arms and bool({"federated", "global"} & set(arms))
        self.equal_samples = samples_of_a_local_model(session.federation, self.recipe) if compared else None
        session.room.hear = self._narrowed
        self.lead = session.lead
        self.num_processes = 1 if self.lead is None else self.lead.team.size
        if self.lead is not None:
            self.lead.hear = self._narrowed
        self.trackers = Trackers(trackers_of(self.recipe), folder.path, self.recipe.project or "", self.recipe)

    def go(self, *, resumed: bool) -> Path:
        arms: list[str] = [arm for arm in ARMS if arm in self.recipe.arms]
        if not resumed or not self.folder.read_facts():
            self._begin(arms)
        else:
            self._same_data()
            self.session.room.width = self.folder.read_facts().get("clients_per_batch", self.session.room.width)
        shared = "" if self.num_processes == 1 else f", {self.num_processes} processes"
        self.folder.log(("resumed" if resumed else f"started from {self.source or 'a program'}") + shared)
        last = self.folder.checkpoints
        done: dict[str, int] = {arm: (checkpoint.rounds(last(arm)) or [-1])[-1] for arm in arms}
        self.folder.keep_rounds({**done, "base": 0} if self.folder.read_stage("base") else done)
        for arm in arms:
            if self.folder.read_stage(arm) is not None:
                continue
            self.display.arm(arm, 0 if arm == "base" else self.recipe.rounds)
            self.trackers.begin(arm, self.display.message)
            self.own_peaks = reset_peak_memory()
            if arm == "base":
                self._base()
            else:
                self._train(arm)
            self._report()
        result = self._finish(arms)
        self.display.end(result)
        return self.folder.path

    # ---- before round 1 ----------------------------------------------------------------------------------------------

    def _begin(self, arms: Sequence[str]) -> None:
        report = self.session.federation.report
        session, number = self.session, self.num_processes
        planned = plan(session) if self.lead is None else self.lead.alone(lambda: plan(session, processes=number))
        self.display.plan(planned.lines)
        for line in shown_prompt(self.session):
            self.display.message(line)
        if self.num_processes > 1:
            self.display.message(f"shared    by {self.num_processes} processes, {self.session.threads} thread(s) each")
        for note in report.notes:
            self.display.message(f"note      {note}")
        forecast = planned.forecast
        if forecast is not None and forecast.limit is not None and forecast.too_much:
            self._narrowed(
                f"this run may need {byte_text(forecast.memory.peak)} of memory, and there are "
                f"{byte_text(forecast.limit)}; `fedloom plan` says how it would fit"
            )
        if self.best_by == LAST:
            self.display.message("note      no validation rows: the last state of an arm counts as its best")
        try_checkpoint(self.session, self.folder.path)
        self.folder.write_facts(
            {
                "model": {
                    "name": self.recipe.model,
                    "dtype": planned.dtype,
                    "quantization": planned.quantization,
                    "weight_bytes": planned.weight_bytes,
                    "total_parameters": planned.total_parameters,
                    "trainable_parameters": planned.trainable_parameters,
                },
                "data": report.to_json(),
                "data_digest": self.session.data_digest(),
                **({} if self.recipe.start_from is None else {"start_digest": start_digest(self.recipe)}),
                "versions": versions(),
                "arms": {arm: 0 if arm == "base" else self.recipe.rounds for arm in arms},
                "started": time.time(),
                "smoke": self.smoke,
                "prepare_seconds": time.perf_counter() - self.started,
                "prepare_peak_memory_bytes": max(self._peak_memory(), planned.held_bytes),
                "clients_per_batch": self.session.room.width,
                "bytes_up": planned.bytes_up_per_client_round,
                "bytes_down": planned.bytes_down_per_client_round,
            }
        )

    def _same_data(self) -> None:
        facts = self.folder.read_facts()
        if facts.get("data_digest") != self.session.data_digest():
            raise UserError(
                f"the data of {self.folder.path} is not what the run began with "
                f"({facts.get('data', {}).get('source', self.recipe.data.path)} has changed)",
                hint="put the old file back, or start anew with another output_dir",
                code="run.data_changed",
            )
        if facts.get("start_digest") != start_digest(self.recipe):
            raise UserError(
                f"{self.recipe.start_from} is not what the run began with (start_from has changed)",
                hint="put the old adapter back, or start anew with another output_dir",
                code="run.start_changed",
            )
        if facts.get("versions", {}).get("torch") != versions().get("torch"):
            self.display.message(
                f"note      the run began with torch {facts.get('versions', {}).get('torch')}, this is "
                f"{versions().get('torch')}: the last digits may differ"
            )

    def _narrowed(self, text: str) -> None:
        if facts := self.folder.read_facts():  # a resumed run goes on as narrow
            self.folder.write_facts({**facts, "clients_per_batch": self.session.room.width})
        self.folder.log(text)
        self.display.message(f"note      {text}")

    # ---- the arms ----------------------------------------------------------------------------------------------------

    def _base(self) -> None:
        algorithm = algorithm_of(self.recipe)
        state = initial_state(algorithm, self.session.adapter, self.recipe.seed)
        totals = Totals(Best(self.best_by))
        val = self._validate("base", algorithm, self._plain_runtime("base"), state, totals)
        tasks = self._tasks("base", algorithm, state, totals) if self.recipe.evaluate.task_rounds else None
        self._line("base", 0, None, totals, val, tasks)
        self._stage("base", algorithm, self._plain_runtime("base"), state, totals)

    def _plain_runtime(self, arm: str) -> Runtime:
        if self.lead is None:
            return batched(self.session.room)
        load = evaluation_load_of(self.session.federation)
        return distributed(self.lead, arm, self.session.room, evaluation_load=load)

    def _peak_memory(self) -> int:
        """Of the process that had most."""
        return max(peak_memory_bytes(), 0 if self.lead is None else self.lead.peak_elsewhere)

    def _train(self, arm: str) -> None:
        pieces = global_pieces(self.recipe, self.session.federation, self.session.room) if arm == "global" else 1
        adapter, recipe, federation = self.session.adapter, self.recipe, self.session.federation
        algorithm = algorithm_of(recipe, arm, pieces=pieces, population_weight=population_weight_of(recipe, federation))
        runtime = runtime_of(
            recipe,
            federation,
            arm,
            self.session.base,
            lambda: make_base(recipe),
            self.measures.table(),
            self.session.room,
            self.lead,
        )
        sharers = 1 if arm == "global" else self.num_processes
        population = Watched(population_of(federation, recipe, arm), self.display, sharers)
        state = initial_state(algorithm, adapter, recipe.seed)
        saved = self.folder.checkpoints(arm)
        own = personal_of(recipe, algorithm, state.params, len(population.ids), saved / checkpoint.PERSONAL)
        state = replace(state, personal=own)
        flops = self.session.training_flops()
        totals = Totals(Best(self.best_by), models=len(population.ids) if arm == "local" else 1)
        every, tasks_every = recipe.evaluate.eval_rounds, recipe.evaluate.task_rounds
        if checkpoint.rounds(saved):
            state, extra = checkpoint.load(saved, state)
            totals = Totals.read(extra["totals"])
            self.folder.keep_rounds(self._rounds_kept(arm, state.round))
        else:
            val = self._validate(arm, algorithm, self._plain_runtime(arm), state, totals)
            tasks = self._tasks(arm, algorithm, state, totals) if tasks_every else None
            best = self._choose(arm, state.round, totals, val, tasks)
            self._line(arm, 0, None, totals, val, tasks)
            self._save(arm, state, totals, best)
        if isinstance(state.personal, OnDisk):  # what came after the checkpoint is done again
            state.personal.store.cut(state.round)
        population.starts(arm, len(sampling_of(recipe, arm, len(population.ids)).cohort(population.ids, 0, 0)))
        rounds = federate(
            algorithm,
            adapter,
            runtime,
            state,
            population,
            rounds=state.round if totals.stopped_early else recipe.rounds,
            sampling=sampling_of(recipe, arm, len(population.ids)),
        )
        for state, report in rounds:
            totals.count(report, flops, population.work_of)
            if arm == "federated":
                totals.simulated_seconds = self._simulated(state, report, totals)
            last = report.round == recipe.rounds
            val = tasks = None
            if last or (every and report.round % every == 0):
                val = self._validate(arm, algorithm, runtime, state, totals)
            if tasks_every and (last or report.round % tasks_every == 0):
                tasks = self._tasks(arm, algorithm, state, totals)
            best = self._choose(arm, report.round, totals, val, tasks)
            if arm != "local" and not last and not totals.stopped_early:  # then its outcome is what is compared
                self._after_equal_samples(arm, algorithm, runtime, state, totals, best)
            self._line(arm, report.round, report, totals, val, tasks)
            measured = val is not None or tasks is not None
            if last or measured or report.round % recipe.checkpoint.save_rounds == 0 or self.stop.asked:
                self._save(arm, state, totals, best)
            self._report()
            if totals.stopped_early:
                break
            if self.stop.asked and not last:
                raise KeyboardInterrupt
        self._stage(arm, algorithm, runtime, state, totals)
        if self.stop.asked:
            raise KeyboardInterrupt

    def _simulated(self, state: State, report: RoundReport, totals: Totals) -> float:
        """Simulated time after this round: its own clock's, or the slowest client's time on top."""
        clock = clock_of(state)
        if clock is not None:
            return clock
        speed_of = speeds(self.recipe.runtime.client_speeds, self.recipe.seed)
        return totals.simulated_seconds + max(row["steps"] * speed_of(id) for id, row in report.clients.items())

    def _rounds_kept(self, arm: str, round: int) -> dict[str, int]:
        """Other arms' lines stay; this arm's end where its checkpoint is (an older one, if the last was damaged)."""
        others = {line["arm"]: self.recipe.rounds for line in self.folder.read_rounds()}
        return {**others, arm: round}

    def _validate(
        self, arm: str, algorithm: Algorithm, runtime: Runtime, state: State, totals: Totals
    ) -> Mapping[str, Metrics] | None:
        """Validation metrics of each client; None without validation rows."""
        clients = [Client(id, ()) for id in self.session.federation.having("validation")]
        if not clients:
            return None
        if state.round == 0 and self.untouched is not None:
            return self.untouched
        start = time.perf_counter()
        self.display.advance(0, 1, f"{arm}: validation")
        found = runtime.evaluate(algorithm, self.session.adapter, state, clients, self.measures.validation)
        require_finite(found, f"validation after round {state.round}", limit=MAX_BAD_SHARE)
        if state.round == 0:
            self.untouched = found
        totals.evaluate_seconds += time.perf_counter() - start
        return found

    def _tasks(self, arm: str, algorithm: Algorithm, state: State, totals: Totals) -> Figures | None:
        """The benchmarks' figures; where each client has its own model, their mean. None without benchmarks."""
        benchmarks, adapter, recipe = self.session.benchmarks, self.session.adapter, self.recipe
        if not benchmarks:
            return None
        start = time.perf_counter()
        adapter.sync(state.base)

        def model(tree: Tree, said: str) -> Any:
            def answerer(task: str) -> Answerer:
                def tell(done: int, total: int, what: str) -> None:
                    self.display.advance(done, total, f"{said}: {task} {what}")

                size, layout = recipe.evaluate.eval_batch_size, recipe.data.chat_template
                tokenizer = self.session.base.tokenizer
                if self.lead is not None:
                    return TeamAnswerer(self.lead, arm, state, adapter, tree, tokenizer, size, layout, tell)
                return answerer_of(adapter, tree, tokenizer, batch_size=size, chat_template=layout, on_progress=tell)

            return answerer

        place = place_of(self.folder.path, arm, state.round)
        named: dict[str, Any] = {"arm": arm if state.round else "base", "round": state.round}
        each = arm == "local" or has_own_model(algorithm.client, state.params)  # a model per client
        if not each or state.round == 0:  # before training they are all the same
            figures, self.left_out = measure(benchmarks, recipe, model(state.params, arm), place, named)
        else:
            several, self.left_out = [], {}
            for number, owner in enumerate(self.session.owners[: recipe.evaluate.task_clients]):
                rank = rank_of(recipe, owner) if arm == "federated" else None
                tree = client_model(algorithm, adapter, state, Client(owner, (), rank=rank))
                own, left_out = measure(
                    benchmarks,
                    recipe,
                    model(tree, f"{arm}, {owner}"),
                    place,
                    {**named, "client": owner},
                    part=f".client_{number:04d}",
                )
                several.append(own)
                self.left_out = merged_counts([self.left_out, left_out])
            figures = mean_figures(several)
        totals.evaluate_seconds += time.perf_counter() - start
        return figures

    def _choose(
        self, arm: str, round: int, totals: Totals, val: Mapping[str, Metrics] | None, tasks: Figures | None
    ) -> bool:
        """Whether this is the arm's best state so far; and whether it has waited long enough for a better one."""
        settings = self.recipe.evaluate
        value = value_of(self.best_by, val, tasks)
        best = totals.best.see(value, round, totals.samples_per_model, settings.early_stopping_threshold or 0.0)
        patience = settings.early_stopping_patience
        if patience is not None and totals.best.waited >= patience and round < self.recipe.rounds:
            totals.stopped_early = True
            by = settings.early_stopping_threshold
            self.display.message(
                f"{arm}: stopped early after round {round}: {self.best_by} was not better"
                + (f" by more than {by:g}" if by else "")
                + f" for {totals.best.waited} evaluations; the best state is that after round {totals.best.round}"
            )
        return best

    def _after_equal_samples(
        self, arm: str, algorithm: Algorithm, runtime: Runtime, state: State, totals: Totals, best: bool
    ) -> None:
        """Test the arm after the first round in which its model has seen as many samples as a local model will."""
        if self.equal_samples is None or totals.equal is not None or totals.samples_per_model < self.equal_samples:
            return
        seen = totals.samples_per_model
        if self.recipe.checkpoint.export == "best" and not best:  # the best of what these samples gave
            state, seen = self._best_state(arm, state), totals.best.samples
        result = self._test(arm, algorithm, runtime, state, totals, f"{arm}: test after {self.equal_samples} samples")
        totals.equal = {"round": state.round, "samples": seen, "result": result}

    def _best_state(self, arm: str, like: State) -> State:
        return checkpoint.load(self.folder.checkpoints(arm), like, "best")[0]

    def _save(self, arm: str, state: State, totals: Totals, best: bool) -> None:
        start = time.perf_counter()
        totals.peak_memory = max(totals.peak_memory, self._peak_memory())
        extra = {"totals": asdict(totals), "arm": arm}
        checkpoint.save(self.folder.checkpoints(arm), state, extra, self.recipe.checkpoint.save_total_limit, best)
        totals.checkpoint_seconds += time.perf_counter() - start

    def _line(
        self,
        arm: str,
        round: int,
        report: RoundReport | None,
        totals: Totals,
        val: Mapping[str, Metrics] | None,
        tasks: Figures | None,
    ) -> None:
        total = None if val is None else add_metrics(val.values())
        line: dict[str, Any] = {
            "arm": arm,
            "round": round,
            "rounds": 0 if arm == "base" else self.recipe.rounds,
            "val_loss": mean_loss(total) if total is not None else None,
            "score": mean_score(total) if total is not None else None,
        }
        if val is not None:
            named = listed(val)
            each = {client: mean_loss(row) for client, row in named.items()}
            line["val_loss_per_client"] = {
                client: loss if math.isfinite(loss) else None for client, loss in each.items()
            }
            scored = {client: mean_score(row) for client, row in named.items()}
            if any(score is not None for score in scored.values()):
                line["score_per_client"] = scored
            line |= preference_figures(total or {})
        if tasks is not None:
            line["tasks"] = tasks
        if report is not None:
            sent = arm == "federated"
            done = max(1, uploads_of(report))
            line |= {
                "cohort": len(report.cohort),
                "clients": uploads_of(report),
                "failed": dict(report.failed),
                "train_loss": mean_loss(report.metrics),
                "bytes_up_per_client": report.metrics["bytes_up"] / done if sent else 0,
                "bytes_down_per_client": report.metrics["bytes_down"] / done if sent else 0,
                "tokens": int(report.metrics["tokens"]),
                **({SKIPPED: int(report.metrics[SKIPPED])} if SKIPPED in report.metrics else {}),
                "samples": int(report.metrics["examples"]),
                "samples_seen": totals.samples_per_model,
                "seconds": report.seconds,
                "communication_seconds": report.metrics.get("communication_seconds", 0.0),
                "tokens_per_second": report.metrics["tokens"] / max(report.seconds, 1e-9),
                "slowest": self._slowest(report),
                "learning_rate": self.recipe.client.learning_rate
                * float(schedule_of(self.recipe)(torch.tensor([report.round - 0.5], dtype=torch.float64))),
            }
        if report is not None and arm == "federated":
            line["simulated_seconds"] = totals.simulated_seconds
            if "staleness" in report.metrics:
                line["staleness"] = report.metrics["staleness"] / uploads_of(report)
        self.folder.append_round(line)
        self.display.round(line)
        self.trackers.round(line)

    def _slowest(self, report: RoundReport) -> list[Any] | None:
        """[client, its time over the median's]; only where each client is timed by itself."""
        if self.recipe.runtime.kind in ("batched", "buffered") or len(report.clients) < 2:
            return None
        seconds = sorted((row["seconds"], client) for client, row in report.clients.items())
        median = seconds[len(seconds) // 2][0]
        return [seconds[-1][1], seconds[-1][0] / max(median, 1e-9)]

    def _test(
        self, arm: str, algorithm: Algorithm, runtime: Runtime, state: State, totals: Totals, what: str
    ) -> ArmResult:
        """The arm on the test sets."""
        start = time.perf_counter()
        federation = self.session.federation
        owners = federation.ids if arm == "local" or len(federation.ids) <= MOST_LISTED else federation.having("test")
        clients = [Client(owner, ()) for owner in owners]
        self.display.advance(0, len(clients), what)
        # the pooled model is everyone's model, so the global arm is evaluated like the base and the federated one
        evaluation = self.measures.common if arm == "local" else self.measures.own
        found: dict[str, Metrics] = {}
        width = self.session.room.width if arm == "local" else max(self.session.room.width, TOGETHER)
        width *= self.num_processes
        for first in range(0, len(clients), width):
            block = clients[first : first + width]
            found.update(runtime.evaluate(algorithm, self.session.adapter, state, block, evaluation))
            self.display.advance(len(found), len(clients), what)
        totals.evaluate_seconds += time.perf_counter() - start
        return model_each(found, owners) if arm == "local" else one_model(found)

    def _stage(self, arm: str, algorithm: Algorithm, runtime: Runtime, state: State, totals: Totals) -> None:
        """Test the arm's outcome and note that it is done."""
        rounds, seen = state.round, totals.samples_per_model
        if self.recipe.checkpoint.export == "best" and totals.best.round not in (None, state.round):
            state, seen = self._best_state(arm, state), totals.best.samples
        result = self._test(arm, algorithm, runtime, state, totals, f"{arm}: test")
        tasks = self._tasks(arm, algorithm, state, totals)
        if arm == "federated" or (arm == "global" and "federated" not in self.recipe.arms):
            self._export(state)
        outcome: Outcome = {
            "rounds": rounds,
            "planned_rounds": 0 if arm == "base" else self.recipe.rounds,
            "stopped_early": totals.stopped_early,
            "best_round": totals.best.round,
            "best_by": totals.best.by,
            "best_value": totals.best.value,
            "round": state.round,
        }
        if totals.skipped_steps:
            self.display.message(
                f"note      {arm}: {totals.skipped_steps:.0f} local steps overflowed in float16 and were not made"
            )
        compared = totals.equal or {"round": state.round, "samples": seen, "result": result}
        totals.peak_memory = max(totals.peak_memory, self._peak_memory())
        self.folder.write_stage(
            arm,
            {
                "result": result,
                "costs": self._arm_costs(arm, totals, rounds),
                "failed_client_rounds": totals.failed,
                "best_round": totals.best.round,
                **({} if arm == "base" else {"outcome": outcome}),
                **({} if tasks is None else {"tasks": tasks, "tasks_left_out": self.left_out}),
                **({} if self.equal_samples is None else {"equal_samples": compared}),
            },
        )
        self.trackers.end({**result, **({} if tasks is None else {"tasks": tasks})})

    def _arm_costs(self, arm: str, totals: Totals, rounds: int) -> ArmCosts:
        sent = totals.client_rounds if arm == "federated" else 0
        facts = self.folder.read_facts()["model"]
        return {
            "bytes_up_per_client_round": totals.bytes_up / sent if sent else 0.0,
            "bytes_down_per_client_round": totals.bytes_down / sent if sent else 0.0,
            "train_tokens": int(totals.tokens),
            "train_seconds": totals.seconds,
            "tokens_per_second": totals.tokens / totals.seconds if totals.seconds else 0.0,
            "evaluate_seconds": totals.evaluate_seconds,
            "communication_seconds": totals.communication_seconds,
            "checkpoint_seconds": totals.checkpoint_seconds,
            **({"simulated_seconds": totals.simulated_seconds} if arm == "federated" else {}),  # type: ignore[typeddict-item]
            "rounds": rounds,
            "samples": int(totals.samples),
            "samples_per_model": totals.samples_per_model,
            "padded_tokens": int(totals.padded_tokens),
            "flops": totals.flops,
            "flops_padded": totals.flops_padded,
            "peak_memory_bytes": totals.peak_memory,
            "peak_memory_of": "arm" if self.own_peaks else "process",
            "trainable_share": 0.0 if arm == "base" else facts["trainable_parameters"] / facts["total_parameters"],
            **({"skipped_steps": int(totals.skipped_steps)} if totals.skipped_steps else {}),  # type: ignore[typeddict-item]
        }

    def _export(self, state: State) -> None:
        """The adapter's folder, or the model's where that is what was trained, appears whole or not at all."""
        adapter = self.session.adapter
        adapter.sync(state.base)
        place = self.folder.model if getattr(adapter, "whole_model", False) else self.folder.adapter
        temporary = temporary_beside(place)
        try:
            export_adapter(adapter, self.recipe, state.params, temporary)
            if place.exists():
                shutil.rmtree(place)
            temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, arms: Sequence[str]) -> Mapping[str, Any]:
        stages = self.folder.read_stages()
        facts = self.folder.read_facts()
        per_arm = {arm: stages[arm]["costs"] for arm in arms}
        main = next((arm for arm in ("federated", "global", "local", "base") if arm in stages), "base")
        own = per_arm[main]
        peaks = [facts.get("prepare_peak_memory_bytes", 0), *(costs["peak_memory_bytes"] for costs in per_arm.values())]
        costs: Costs = {
            "bytes_up_per_client_round": own["bytes_up_per_client_round"],
            "bytes_down_per_client_round": own["bytes_down_per_client_round"],
            "train_tokens": own["train_tokens"],
            "train_seconds": own["train_seconds"],
            "tokens_per_second": own["tokens_per_second"],
            "peak_memory_bytes": max(peaks),
            "trainable_parameters": facts["model"]["trainable_parameters"],
            "total_parameters": facts["model"]["total_parameters"],
            "trainable_share": facts["model"]["trainable_parameters"] / facts["model"]["total_parameters"],
            "prepare_seconds": facts.get("prepare_seconds", 0.0),
            "samples": own["samples"],
            "flops": own["flops"],
            "communication_seconds": own["communication_seconds"],
            "evaluate_seconds": own["evaluate_seconds"],
        }
        report = self.session.federation.report
        tasks = {arm: stages[arm]["tasks"] for arm in arms if "tasks" in stages[arm]}
        left_out = merged_counts([stages[arm].get("tasks_left_out") or {} for arm in tasks])
        result = build_result(
            seed=self.recipe.seed,
            arms={arm: stages[arm]["result"] for arm in arms},
            equal_samples=self._compared(arms, stages),
            tasks=tasks or None,
            outcomes={arm: stages[arm]["outcome"] for arm in arms if "outcome" in stages[arm]},
            costs=costs,
            costs_per_arm=per_arm,
            data=report.to_json(),
            model=facts["model"],
            recipe=resolved_json(self.recipe),
            skipped={
                "rows": dict(report.left_out),
                "answers_cut": report.cut,
                "client_rounds_failed": {arm: stages[arm]["failed_client_rounds"] for arm in arms},
                **({"tasks": left_out} if left_out else {}),
            },
        )
        self.folder.write_result(result)
        self.folder.log("done")
        self._report(force=True)
        return dict(result)

    def _compared(self, arms: Sequence[str], stages: Mapping[str, Any]) -> EqualSamples | None:
        if self.equal_samples is None:
            return None
        found: dict[str, SampledArm] = {arm: stages[arm]["equal_samples"] for arm in arms}
        return {"samples": self.equal_samples, "arms": found}

    def _report(self, *, force: bool = False) -> None:
        if force or time.monotonic() - self.reported > REPORT_SECONDS:
            try:
                write_report(self.folder.path)
            except FedloomError:  # a full disk, a damaged file: the run's own next step would fail as well
                raise
            except Exception as error:  # a picture that cannot be drawn must not cost the run
                text = f"report.html was not written: {type(error).__name__}: {error}"
                self.folder.log(text)
                self.display.message(f"note      {text}; try `fedloom report {self.folder.path}`")
            self.reported = time.monotonic()


class Watched:
    """A population whose batches are counted as they are opened, and tell the display when they are drawn."""

    def __init__(self, inner: Clients, display: Display, sharers: int = 1) -> None:
        """`sharers` processes have a part of each round's batches each, and this one sees its own only."""
        self.inner, self.display, self.sharers = inner, display, sharers
        self.ids = inner.ids
        self.round = -1
        self.done = self.total = 0
        self.what = ""
        self.cohort = 1
        self.work: dict[str, Work] = {}  # of this round's clients

    def starts(self, what: str, cohort: int) -> None:
        self.what, self.cohort = what, cohort

    def open(self, client: str, round: int) -> Client:
        opened = self.inner.open(client, round)
        if round != self.round:
            self.round, self.done, self.total = round, 0, 0
            self.work = {}
        self.total += len(opened.batches)
        assert isinstance(opened.batches, Batches | PairBatches)
        self.work[client] = work_of(opened.batches)
        return opened._replace(batches=_Counted(opened.batches, self))

    def work_of(self, client: str) -> Work:
        """Of the client's batches of this round, whether or not it was asked in it."""
        if client not in self.work:
            batches = self.inner.open(client, self.round).batches
            assert isinstance(batches, Batches)
            self.work[client] = work_of(batches)
        return self.work[client]

    def drawn(self) -> None:
        self.done = min(self.done + self.sharers, self.total)  # a block that did not fit is drawn again
        self.display.advance(self.done, self.total, f"{self.what}: round {self.round + 1}")


class _Counted(Sequence[Any]):
    def __init__(self, batches: Batches | PairBatches, watched: Watched) -> None:
        self.batches, self.watched = batches, watched

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        self.watched.drawn()
        return self.batches[number]

    @property
    def padded_tokens(self) -> float:
        return work_of(self.batches).padded_tokens


__all__ = ["run_recipe"]
