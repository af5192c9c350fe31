"""A few passes of a run, made for their time and memory: the largest of all, some of one round, some of evaluation.

They are passes of the run itself, with its clients, batches and parts, so whatever makes a pass faster or leaner is in
what is measured. Nothing of them stays. A pass that will not fit by what smaller ones took is not made: a CPU's memory
does not end with an error, but with the process.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedloom.data.batches import eval_batches
from fedloom.data.listing import spread
from fedloom.data.pair_batches import Pairs, eval_pair_batches
from fedloom.data.tokens import Examples, pad_id_of
from fedloom.errors import FedloomError, RunError
from fedloom.evaluate.generate import generate
from fedloom.evaluate.loss import stack_batches
from fedloom.evaluate.scores import SCORES
from fedloom.evaluate.tasks.base import Item, TaskSettings
from fedloom.evaluate.tasks.run import answerer_of, limited, run_task
from fedloom.models.frozen import FrozenBlocks
from fedloom.ops.host import KEPT_SHAPES
from fedloom.ops.memory import held_bytes
from fedloom.ops.shapes import makes_code, rounded
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched
from fedloom.runtimes.cohort import train_block
from fedloom.runtimes.room import OUT_OF_MEMORY
from fedloom.study import checkpoint
from fedloom.study.arm_tasks import settings_of
from fedloom.study.build import algorithm_of, population_of, population_weight_of, rank_of
from fedloom.study.costs import peak_memory_bytes, reset_peak_memory
from fedloom.study.forecast import Cost, KeptRows, Line, fitted, line_through
from fedloom.study.passes import ArmWork, Decoding, Passes, Step, some_clients
from fedloom.tree import stack
from fedloom.types import Algorithm, Batch, Client, ClientUpdate, LossFn, Site, State, Tree

if TYPE_CHECKING:
    from fedloom.study.session import Session

__all__ = ["Meter", "Probe", "Trained", "faster_width"]

# Of products in half precision on a CPU (`ops.shapes`), with LoRA, forward and backward.
SHAPES_OF_A_PASS, SHAPES_OF_ATTENTION, PROBED, CODE_BYTES = 20, 8, 3, 2**20
TIMED_STEPS = 3  # of the round that is timed: a short one, a middling one, a long one
SMALL_SHARE = 8  # the smaller pass of the two that foretell the largest has an eighth of its rows
PROBED_ITEMS = 16  # of a benchmark
MADE_ROWS = 8  # whose way through frozen blocks is timed, of all lengths
MOST_PROBED_TOKENS = 24  # of answers; longer ones are reckoned
GAIN = 1.03  # a wider pass has to be faster by this to be taken

Clock = Callable[[], Cost]


def now() -> Cost:
    """Both clocks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Cost(time.perf_counter(), time.process_time())


class Meter:
    """The peak of memory since it was last set back, and over all that was measured with it."""

    def __init__(self) -> None:
        self.highest = peak_memory_bytes()
        self.own = True  # whether a peak can be told from the ones before it
        self.began = held_bytes()

    def begin(self) -> None:
        self.highest = max(self.highest, peak_memory_bytes())
        self.own = reset_peak_memory() and self.own
        self.began = held_bytes()

    @property
    def most(self) -> int:
        """The peak so far, of all that was measured."""
        self.highest = max(self.highest, peak_memory_bytes())
        return self.highest

    @property
    def added(self) -> int:
        """What was added at most since `begin`."""
        return max(0, peak_memory_bytes() - self.began)


@dataclass
class Trained:
    """What the probe of training found."""

    points: list[tuple[Passes, Cost]]
    step: Line
    per_client_round: Cost
    resident: int
    largest_bytes: int  # that the largest pass adds
    bytes_each: float  # of a pass, whatever its size
    bytes_per_client: int  # its parameters, gradients and optimiser
    bytes_per_token: float  # of a pass, padding counted
    width: int
    measured: bool
    notes: list[str] = field(default_factory=list)

    def bytes_of(self, step: Step) -> int:
        """What the step's pass adds, on the line through those that were made."""
        return bytes_on(self.bytes_each, self.bytes_per_client, self.bytes_per_token, step)


def bytes_on(each: float, per_client: float, per_token: float, step: Step) -> int:
    return int(each + per_client * step.clients + per_token * step.pass_tokens)


class Probe:
    """Probes of one session. `room` is what may be held in all; None where nobody knows."""

    def __init__(self, session: Session, room: int | None, clock: Clock = now) -> None:
        self.session, self.room, self.clock = session, room, clock
        self.recipe = session.recipe
        self.meter = Meter()
        # one piece of a batch is one pass: what goes through the model at once
        one_piece = self.recipe.client.model_copy(update={"gradient_accumulation_steps": 1})
        self.one_piece = self.recipe.model_copy(update={"client": one_piece})
        self.algorithm = algorithm_of(
            self.one_piece, population_weight=population_weight_of(self.recipe, session.federation)
        )
        self.state = initial_state(self.algorithm, session.adapter, self.recipe.seed)
        rows = getattr(getattr(session.adapter, "causal", None), "rows", None)
        self.frozen: FrozenBlocks | None = getattr(rows, "frozen", None)  # whose output is kept of each row
        self.kept_before = 0  # bytes of it, when the resident memory was looked at

    # ---- training ----------------------------------------------------------------------------------------------------

    def passes_of(self, arm: str, step: Step, rows: int | None = None) -> list[Client]:
        """The clients of a step with one batch each: a piece of the step's, or its first `rows` rows."""
        population = population_of(self.session.federation, self.recipe, arm)
        rows = rows or -(-step.rows // step.pieces)
        clients = []
        for client in step.ids:
            batch = population.batches(client, step.round)[step.place]
            rank = rank_of(self.recipe, client) if arm == "federated" else None
            cut = {name: leaf[:rows] for name, leaf in batch.items()}
            clients.append(Client(client, [cut], 1.0, rank))
        return clients

    def make(self, clients: Sequence[Client]) -> tuple[Passes, Cost]:
        """One optimiser step of a block, when shapes like its have been there before: most steps find them so.

        Raises:
            RunError: it does not fit in memory, or has no gradient.
        """
        took: list[Cost] = []
        ids = tuple(client.id for client in clients)
        sites = [Site(self.recipe.seed, 0, client.id, ids) for client in clients]
        for _ in range(2 if self._makes_code() else 1):
            train_block(self._timed(took), self.session.adapter, self.state, clients, sites)
        return passes_through([client.batches[0] for client in clients]), took[-1]

    def _makes_code(self) -> bool:
        return makes_code(self.session.base.device, self.session.base.dtype)

    def code_to_come(self, arms: Mapping[str, ArmWork]) -> int:
        """Bytes of the code of products of which no pass here has made any, roughly."""
        if not self._makes_code():
            return 0
        base = self.session.base
        steps = [step for work in arms.values() for step in work.steps]
        tokens = {rounded(step.pass_tokens, base.device, base.dtype) for step in steps}
        lengths = {rounded(step.tokens, base.device, base.dtype) for step in steps}
        shapes = (len(tokens) - PROBED) * SHAPES_OF_A_PASS + (len(lengths) - PROBED) * SHAPES_OF_ATTENTION
        return max(0, min(KEPT_SHAPES, shapes)) * CODE_BYTES

    def ready(self, clients: Sequence[Client]) -> None:
        """Have at hand what frozen blocks make of these rows, as a run has in every pass but a row's first."""
        if self.frozen is None:
            return
        for client in clients:
            for batch in client.batches:
                self.session.adapter.nll(stack([self.state.params]), stack_batches([batch], self.session.base.device))

    def making(self) -> Line:
        """What frozen blocks take to make a row's states, by its tokens."""
        assert self.frozen is not None
        train = self.session.federation.pooled("train")
        order = train.lengths.argsort(kind="stable")
        points = []
        for place in spread(len(order), MADE_ROWS):
            ids = [int(token) for token in train[int(order[place])].input_ids]
            row_T = torch.tensor(ids, device=self.session.base.device)
            for _ in range(2):  # rows of a length that was there before are faster, and most are
                start = self.clock()
                self.frozen.make(row_T)
                points.append((Passes(1, len(ids), len(ids)), self.clock() - start))
        return fitted(points[1:])

    def bytes_of_a_state(self) -> int:
        """Of one token."""
        assert self.frozen is not None
        states_TD = self.frozen.make(torch.zeros(1, dtype=torch.int64, device=self.session.base.device))
        return states_TD.numel() * states_TD.element_size()

    def still_to_keep(self, rows: KeptRows) -> int:
        """Bytes of states that come on top of what was resident."""
        assert self.frozen is not None
        wanted = min(self.frozen.budget_bytes, int(rows.distinct.real * self.bytes_of_a_state()))
        return max(0, wanted - self.kept_before)

    def _timed(self, took: list[Cost]) -> Algorithm:
        def step(loss: LossFn, state: Any, batch_CBT: Batch) -> Any:
            start = self.clock()
            moved = self.algorithm.client.step(loss, state, batch_CBT)
            took.append(self.clock() - start)
            return moved

        update: ClientUpdate = self.algorithm.client._replace(step=step)
        return replace(self.algorithm, client=update)

    def training(self, works: Callable[[int], Mapping[str, ArmWork]], steps: int = TIMED_STEPS) -> Trained:
        """The largest pass and some others. `works` counts the arms' work with so many clients in a pass.

        Where a pass would be too wide for the memory by what smaller ones took, the session's room is made narrower.

        Raises:
            RunError: not even one client fits, or training has no gradient.
        """
        notes: list[str] = []
        width = self.session.room.width
        arms = works(width)
        arm, largest = largest_of(arms)
        self.make(self.passes_of(arm, largest._replace(ids=largest.ids[:1]), 1))  # warm
        own = self.client_bytes()
        resident = self._resident()
        self.kept_before = 0 if self.frozen is None else self.frozen.bytes
        points: list[tuple[Passes, Cost]] = []
        memory: list[tuple[float, float]] = []

        def tried(clients: Sequence[Client]) -> None:
            self.ready(clients)
            self.meter.begin()
            points.append(self.make(clients))
            beside = max(0.0, float(self.meter.added - own * len(clients)))
            memory.append((points[-1][0].padded, beside))

        tried(self.passes_of(arm, largest._replace(ids=largest.ids[:1]), 1))
        rows = -(-largest.rows // largest.pieces)
        few = max(1, len(largest.ids) * rows // SMALL_SHARE)
        small = self.passes_of(arm, largest._replace(ids=largest.ids[: max(1, few // rows)]), min(few, rows))
        if few > 1:
            tried(small)
        each, per_token = line_through(memory) if len(memory) > 1 else (0.0, memory[0][1] / memory[0][0])
        measured = True
        while True:
            needs = bytes_on(each, own, per_token, largest)
            if self.room is not None and resident + needs > self.room and width > 1 and self._may_narrow():
                width = max(1, min(width - 1, int((self.room - resident - each) / max(1.0, needs - each) * width)))
                notes.append(f"memory is for {width} clients in a pass, {byte_text_of(self.room)} in all")
                self.session.room.width = width
            elif self.room is not None and resident + needs > self.room:
                measured = False
                break
            else:
                try:
                    tried(self.passes_of(arm, largest))
                    break
                except RunError as error:
                    if error.code != OUT_OF_MEMORY:
                        raise
                    if len(largest.ids) == 1:
                        raise self._too_large(largest) from None
                    self.session.room.halve(len(largest.ids))
                    width = self.session.room.width
            arms = works(width)
            arm, largest = largest_of(arms)
        most = self.meter.added if measured else needs
        full_arm, fullest = fullest_of(arms)
        if measured and fullest.text > 1.05 * largest.text:  # rows without padding may take most there
            tried(self.passes_of(full_arm, fullest))
            most = max(most, self.meter.added)
        if len(memory) > 1:
            each, per_token = line_through(memory)
        self.meter.begin()
        overhead = self._round(arms, points, steps) if measured else Cost()
        most = max(most, self.meter.added)
        return Trained(
            points,
            fitted(points[1:] if len(points) > 2 else points),
            overhead,
            resident,
            most,
            each,
            own,
            per_token,
            width,
            measured,
            notes,
        )

    def client_bytes(self) -> int:
        """Of a client in a pass: old and new parameters, the gradient, old and new state of its optimiser."""
        params = self.state.params
        broadcast_C = {name: leaf[None] for name, leaf in params.items()}
        personal_C = {name: leaf[None] for name, leaf in self.algorithm.client.personal(params).items()}
        local = self.algorithm.client.init(broadcast_C, personal_C, [Site(self.recipe.seed, 0, "", ("",))])
        beside = max(0, bytes_in(local) - tree_bytes(params))
        return 3 * tree_bytes(params) + 2 * beside

    @staticmethod
    def largest(arms: Mapping[str, ArmWork]) -> tuple[str, Step]:
        return largest_of(arms)

    @staticmethod
    def first_arm(arms: Mapping[str, ArmWork]) -> str:
        return "federated" if "federated" in arms else next(iter(arms))

    def _may_narrow(self) -> bool:
        return self.recipe.runtime.clients_per_batch in ("auto", "fastest")

    def _resident(self) -> int:
        self.meter.begin()
        return self.meter.began

    def _too_large(self, step: Step) -> RunError:
        again = "" if self.recipe.runtime.gradient_checkpointing else "runtime.gradient_checkpointing=true, or "
        return RunError(
            f"out of memory with the largest batch of the run: {-(-step.rows // step.pieces)} rows of up to "
            f"{step.tokens} tokens of one client",
            hint=f"{again}lower client.per_device_train_batch_size or data.max_length",
            code="run.memory",
        )

    def _round(self, arms: Mapping[str, ArmWork], points: list[tuple[Passes, Cost]], steps: int) -> Cost:
        """Time some steps of a round and the round around them: what it takes for each client beside its steps."""
        arm = self.first_arm(arms)
        round = arms[arm].steps[0].round
        ids = arms[arm].steps[0].ids
        block = [step for step in arms[arm].steps if step.round == round and step.ids == ids]
        block.sort(key=lambda step: step.pass_tokens)
        places = sorted({round_to(share * (len(block) - 1)) for share in (0.1, 0.5, 0.9)[-steps:]})
        chosen = [block[place] for place in places]
        batches: dict[str, list[Batch]] = {client: [] for client in ids}
        weights: dict[str, Client] = {}
        for step in chosen:
            for client in self.passes_of(arm, step):
                batches[client.id] += list(client.batches)
                weights[client.id] = client
        cohort = [weights[client]._replace(batches=batches[client]) for client in ids]
        self.ready(cohort)
        took: list[Cost] = []
        algorithm = self._timed(took)
        start = self.clock()
        try:
            run_round(algorithm, self.session.adapter, batched(len(cohort)), self.state, cohort)
        except FedloomError:  # a loss that is not finite is round 1's to tell
            return Cost()
        whole = self.clock() - start
        for number, cost in enumerate(took):
            points.append((passes_through([client.batches[number] for client in cohort]), cost))
            whole = whole - cost
        return whole.times(1 / len(cohort))

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluation(self, largest: int) -> tuple[Line | None, int]:
        """Passes without a graph over test rows: the line of their time, and what the largest adds to memory.

        Args:
            largest: tokens of the largest pass, padding counted.
        """
        federation, size = self.session.federation, self.recipe.evaluate.eval_batch_size
        pad_id = pad_id_of(federation.tokenizer)
        longest = max(some_clients(federation)[0], key=lambda one: int(one.test.lengths.max(initial=0))).test
        if not len(longest):
            return None, 0
        batches: Sequence[Batch] = (
            eval_pair_batches(Pairs(longest), batch_size=size, pad_id=pad_id)
            if federation.paired
            else eval_batches(longest, batch_size=size, pad_id=pad_id)
        )
        points: list[tuple[Passes, Cost]] = []
        last = batches[len(batches) - 1]
        width = max(1, round_to(largest / passes_through([last]).padded))
        full = width * passes_through([last]).padded
        self.meter.begin()
        for batch, copies in ((first_rows(last, 1), 1), (batches[0], 1), (last, width)):
            if copies * passes_through([batch]).padded > full:
                continue
            tree_C = stack([self.state.params] * copies)
            stacked = stack_batches([batch] * copies, self.session.base.device)
            if self.frozen is not None:
                self.session.adapter.nll(tree_C, stacked)
            start = self.clock()
            self.session.adapter.nll(tree_C, stacked)
            points.append((passes_through([batch] * copies), self.clock() - start))
        return fitted(points[1:]), self.meter.added

    def answers(
        self, decodings: Sequence[Decoding], evaluation: Line, most: int, score: str
    ) -> tuple[Line | None, Cost, int, int]:
        """Writing answers: the line of a token by rows, judging one, tokens of the longest answer, bytes added."""
        federation = self.session.federation
        examples = federation.pooled("test")
        rows = min(max((min(one.slots, one.rows) for one in decodings), default=0), len(examples))
        if not rows:
            return None, Cost(), 0, 0
        number = examples.tokens.targets[examples.numbers]
        order = (examples.lengths - number).argsort(kind="stable").tolist()
        points: list[tuple[Passes, Cost]] = []
        written = length = 0
        tree_C = stack([self.state.params])
        self.meter.begin()
        for many, tokens in ((1, min(most, 4)), (rows, min(most, MOST_PROBED_TOKENS))):
            chosen = order[-many:]
            prompts = [prompt_of(examples, place) for place in chosen]
            start = self.clock()
            [answers] = generate(
                self.session.adapter,
                tree_C,
                [prompts],
                federation.tokenizer,
                max_new_tokens=tokens,
                batch_size=many,
            )
            took = self.clock() - start
            longest = max(map(len, answers))
            steps = min(tokens, longest + 1)  # with the token that ends it
            prompt = many * max(map(len, prompts))
            took = took - evaluation.of(Passes(1, prompt, prompt))
            took = Cost(max(took.wall, 1e-6), max(took.cpu, 1e-6))
            all_written = sum(min(tokens, len(answer) + 1) for answer in answers)
            points.append((Passes(steps, all_written, all_written), took))
            written, length = longest, steps
        added = self.meter.added
        if written >= MOST_PROBED_TOKENS:  # it did not end: then it is taken to write on
            written = most
        row = federation.rows_of(examples)[order[0]]
        start = self.clock()
        if score in SCORES:
            SCORES[score](row, "1")
        judge = self.clock() - start
        added += int(added * max(0, min(most, max(written, 1)) - length) / max(length + 64, 1)) if written else 0
        return fitted(points), judge, written, added

    def tasks(self) -> tuple[dict[str, Cost], int]:
        """What each benchmark takes, put to one model: a few of its items, and the rest as long. And bytes added.

        Its items are asked of the model before it is trained; one that writes more or less by then takes as much more
        or less. Of benchmarks that other programs run (lm-evaluation-harness) nothing is told.
        """
        found: dict[str, Cost] = {}
        self.meter.begin()
        for benchmark in self.session.benchmarks:
            task = benchmark.task
            if task.run is not None:
                continue
            settings = settings_of(self.recipe)
            items = limited(list(task.load(benchmark.source, settings)), settings.limit)
            some = [items[place] for place in spread(len(items), PROBED_ITEMS)]
            points = []
            for asked in (some[:1], some[: max(1, len(some) // 4)], some):
                few = dataclasses.replace(task, load=functools.partial(_items, asked))
                answerer = answerer_of(
                    self.session.adapter,
                    self.state.params,
                    self.session.base.tokenizer,
                    batch_size=self.recipe.evaluate.eval_batch_size,
                    chat_template=self.recipe.data.chat_template,
                )
                start = self.clock()
                run_task(few, answerer, source=benchmark.source, settings=settings, out=None)
                points.append((Passes(1, len(asked), len(asked)), self.clock() - start))
            found[task.name] = fitted(points[1:]).of(Passes(1, len(items), len(items)))
        return found, self.meter.added

    # ---- the rest ----------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Cost:
        """Writing one, in the system's place for temporary files."""
        with tempfile.TemporaryDirectory() as place:
            start = self.clock()
            checkpoint.save(Path(place), self.state, {"try": True}, 1, False)
            return self.clock() - start

    def report(self) -> tuple[Cost, int]:
        """Drawing a report of a run that has a round, and what that loads for good."""
        from fedloom.study.folder import RunFolder
        from fedloom.study.recipe import resolved_yaml
        from fedloom.study.report import write_report

        before = held_bytes()
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder.create(Path(place) / "run", resolved_yaml(self.recipe))
            with folder:
                folder.write_facts({"data": self.session.federation.report.to_json(), "started": time.time()})
                for round in (0, 1):
                    folder.append_round(
                        {"arm": "federated", "round": round, "rounds": self.recipe.rounds, "val_loss": 1.0}
                    )
                start = self.clock()
                write_report(folder.path)
                took = self.clock() - start
        return took, max(0, held_bytes() - before)


def _items(items: Sequence[Item], source: Path | None, settings: TaskSettings) -> Sequence[Item]:
    """A task's loader that has read them already."""
    return items


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads inside one operation, for as long as it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def middling(arms: Mapping[str, ArmWork]) -> tuple[str, Step]:
    """Of the steps with most clients, one of middling length."""
    arm = Probe.first_arm(arms)
    most = max(len(step.ids) for step in arms[arm].steps)
    block = sorted((step for step in arms[arm].steps if len(step.ids) == most), key=lambda step: step.pass_tokens)
    return arm, block[len(block) // 2]


def faster_width(
    probe: Probe, works: Callable[[int], Mapping[str, ArmWork]], most: int, device: str
) -> tuple[int, dict[int, Cost]]:
    """The number of clients in a pass that takes least for each token of text, of 1, 2, 4, ... and `most`.

    A wider pass is tried as long as the last one was faster. Each takes one step of a middling length.

    Returns:
        the width, and what a token took at each width that was tried.
    """
    clients = probe.passes_of(*middling(works(most)))
    took: dict[int, Cost] = {}

    def seconds(width: int) -> float:  # of one thread the CPU's own time says more where others use it too
        return took[width].cpu if device == "cpu" and torch.get_num_threads() == 1 else took[width].wall

    best, width = 0, 1
    while width <= len(clients):
        passes, cost = probe.make(clients[:width])
        took[width] = cost.times(1 / max(passes.real, 1.0))
        if best and seconds(width) * GAIN > seconds(best):
            break
        best, width = width, width + 1 if width == len(clients) else min(2 * width, len(clients))
    return max(1, best), took


def threads_compared(
    probe: Probe, works: Callable[[int], Mapping[str, ArmWork]], width: int, threads: int
) -> tuple[Cost, Cost]:
    """What the same step takes with so many threads and with one."""
    clients = probe.passes_of(*middling(works(width)))
    with torch_threads(1):
        _, one = probe.make(clients)
    with torch_threads(threads):
        _, many = probe.make(clients)
    return many, one


def largest_of(arms: Mapping[str, ArmWork]) -> tuple[str, Step]:
    """The arm with the largest pass, and the step it is of."""
    arm = max(arms, key=lambda name: arms[name].largest.pass_tokens)
    return arm, arms[arm].largest


def fullest_of(arms: Mapping[str, ArmWork]) -> tuple[str, Step]:
    """The arm and step of the pass with most text, whatever its padding."""

    best = {name: max(work.steps, key=lambda step: step.text) for name, work in arms.items()}
    arm = max(best, key=lambda name: best[name].text)
    return arm, best[arm]


def passes_through(batches: Sequence[Batch]) -> Passes:
    """One pass with the batches of several clients side by side."""
    rows = max(batch["input_ids"].shape[0] for batch in batches)
    tokens = max(batch["input_ids"].shape[1] for batch in batches)
    padded = len(batches) * rows * tokens
    return Passes(1, padded, sum(float(batch["lengths"].sum()) for batch in batches), padded)


def first_rows(batch: Batch, rows: int) -> Batch:
    return {name: leaf[:rows] for name, leaf in batch.items()}


def prompt_of(examples: Examples, place: int) -> list[int]:
    """The tokens of an example before its answer."""
    example = examples[place]
    own = len(example.input_ids) - int(examples.tokens.targets[examples.numbers[place]])
    return [int(token) for token in example.input_ids[: max(1, own)]]


def round_to(value: float) -> int:
    return int(value + 0.5)


def byte_text_of(value: int) -> str:
    from fedloom.study.progress import byte_text

    return byte_text(value)


def tree_bytes(tree: Tree) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.values())


def bytes_in(value: Any) -> int:
    """Of all tensors in a client's local state, whatever else is in it."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(bytes_in(part) for part in value.values())
    return sum(bytes_in(part) for part in value) if isinstance(value, tuple | list) else 0


def personal_bytes(algorithm: Algorithm, state: State) -> int:
    """What one client keeps from round to round."""
    return tree_bytes(algorithm.client.personal(state.params))
