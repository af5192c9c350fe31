"""The most memory and the time that a run will take: arithmetic on what was measured and what was counted.

`fedloom.study.passes` counts the passes of a run, `fedloom.study.probe` makes a few of them. Here a straight line is
laid through what these took, and the run is summed up along it.

Memory is resident memory of the process on a CPU, what the allocator of the accelerator has given out on a GPU. Times
are pairs: seconds on the wall, and of the CPU, which tell more where others use the machine too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fedloom.study.passes import ArmWork, Decoding, Passes
from fedloom.study.progress import byte_text, duration
from fedloom.study.recipe import Recipe

__all__ = [
    "Cost",
    "Forecast",
    "KeptRows",
    "Line",
    "Measured",
    "Memory",
    "Suggestion",
    "fitted",
    "forecast",
    "training",
    "validations",
]

REPORT_SECONDS = 30.0  # a run draws its report again after so long, and at its end
FURTHER_REPORT = 0.25  # of the first one's time, which loads what draws the pictures


class Cost(NamedTuple):
    """Seconds on the wall, and of the CPU (all threads together)."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.cpu - other.cpu)

    def times(self, factor: float) -> Cost:
        return Cost(self.wall * factor, self.cpu * factor)


NOTHING = Cost()


def at_once(costs: Iterable[Cost]) -> Cost:
    """Of processes that work at the same time: the slowest one's wall, all of their work."""
    each = list(costs)
    return Cost(max((cost.wall for cost in each), default=0.0), math.fsum(cost.cpu for cost in each))


@dataclass(frozen=True)
class Line:
    """y = each + per_token x: what a pass of x tokens takes. `real`: x leaves padding out, as the passes do."""

    each: Cost
    per_token: Cost
    real: bool = False

    def of(self, passes: Passes) -> Cost:
        return self.each.times(passes.number) + self.per_token.times(passes.real if self.real else passes.padded)


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a + b x with the least squared relative error, neither below 0.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("a line needs a point")
    weights = [1 / max(y, 1e-12) ** 2 for _, y in points]
    total = math.fsum(weights)
    mean_x = math.fsum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = math.fsum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = math.fsum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    if spread > 1e-9 * total * mean_x**2:
        rise = math.fsum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
        if rise < 0:
            return mean_y, 0.0
        if mean_y - rise * mean_x >= 0:
            return mean_y - rise * mean_x, rise
    squares = math.fsum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    products = math.fsum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
    return 0.0, products / squares if squares else 0.0


def fitted(points: Sequence[tuple[Passes, Cost]]) -> Line:
    """The line through some passes that were made, by their tokens with padding or, where that fits better, without."""

    def fit(real: bool) -> tuple[Line, float]:
        x = [(one.real if real else one.padded) / one.number for one, _ in points]
        wall = [cost.wall / one.number for one, cost in points]
        cpu = [cost.cpu / one.number for one, cost in points]
        a, b = line_through(list(zip(x, cpu, strict=True)))
        c, d = line_through(list(zip(x, wall, strict=True)))
        miss = math.fsum((1 - (a + b * one) / max(y, 1e-12)) ** 2 for one, y in zip(x, cpu, strict=True))
        return Line(Cost(c, a), Cost(d, b), real), miss

    padded, real = fit(False), fit(True)
    return real[0] if len(points) > 2 and real[1] < 0.5 * padded[1] else padded[0]


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a run at its fullest, by what they are for."""

    resident: int  # libraries, model and data: what is there before the first pass
    training: int  # what the largest pass of training adds
    evaluation: int = 0  # what the largest one of evaluation adds, writing answers included
    states: int = 0  # models and optimisers that clients keep, beside those in the pass
    report: int = 0  # what drawing the report loads
    loading: int = 0  # the peak until the first pass, all in all
    kept: int = 0  # what frozen blocks make of rows, in the host's memory (runtime.activation_cache_gb)
    code: int = 0  # of products of shapes that are still to come
    measured: bool = True  # whether the largest pass was made; else it is on a line through smaller ones

    @property
    def peak(self) -> int:
        beside = self.report + self.states + self.kept + self.code
        return max(self.loading, self.resident + beside + max(self.training, self.evaluation))

    def total(self, processes: int) -> int:
        """Of so many processes, of which the first one draws the report and keeps what clients keep."""
        other = replace(self, report=0, states=0)
        return self.peak + (processes - 1) * other.peak

    @property
    def dominant(self) -> str:
        """What takes most."""
        parts = {
            "libraries, model and data": self.resident,
            "a pass of training": self.training,
            "evaluation": self.evaluation if self.evaluation > self.training else 0,
            "what clients keep": self.states,
            "kept states of frozen blocks": self.kept,
        }
        return max(parts, key=lambda name: parts[name])

    def to_json(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak,
            "resident_bytes": self.resident,
            "training_bytes": self.training,
            "evaluation_bytes": self.evaluation,
            "states_bytes": self.states,
            "report_bytes": self.report,
            "kept_bytes": self.kept,
            "code_bytes": self.code,
            "loading_bytes": self.loading,
            "measured": self.measured,
            "dominant": self.dominant,
        }


def kept_bytes(personal_bytes: int, models: int) -> int:
    """Of states that stay with clients: a round's new ones are made before the old ones are let go."""
    return 2 * personal_bytes * models


# ---- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a probe took."""

    start: Cost  # from the process's first moment to round 1, as far as it had come
    step: Line  # of training
    per_client_round: Cost = NOTHING  # beside its steps: state made and folded, messages, the server's step
    evaluation: Line | None = None  # passes without a graph
    token: Line | None = None  # writing one token after each row of a batch; x is the number of rows
    judge: Cost = NOTHING  # of one answer
    untrained_answer: int = 0  # tokens that the model writes before it is trained, in the longest row of a batch
    checkpoint: Cost = NOTHING
    report: Cost = NOTHING  # the first
    follower: Cost = NOTHING  # a process's start until it has its model and data
    tasks: Mapping[str, Cost] = field(default_factory=dict)  # each benchmark, put to one model
    making: Line | None = None  # what frozen blocks make of a row, where that is kept


@dataclass(frozen=True)
class Suggestion:
    """Other settings, and what the run would take with them."""

    about: str
    overrides: tuple[str, ...]
    peak_bytes: int | None = None
    seconds: float | None = None

    @property
    def text(self) -> str:
        takes = [byte_text(self.peak_bytes)] if self.peak_bytes is not None else []
        takes += [duration(self.seconds)] if self.seconds is not None else []
        return f"{' '.join(self.overrides)}    # {self.about}" + (f": about {', '.join(takes)}" if takes else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "overrides": list(self.overrides),
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Forecast:
    """What a run will take at most of memory, and of time in all."""

    memory: Memory
    limit: int | None  # bytes there are for each process; None where nobody says
    parts: Mapping[str, Cost] = field(default_factory=dict)  # of the time; "training" alone where little was probed
    whole: bool = True  # whether all parts are in `parts`
    suggestions: tuple[Suggestion, ...] = ()
    advice: tuple[str, ...] = ()
    processes: int = 1

    @property
    def time(self) -> Cost:
        found = Cost()
        for cost in self.parts.values():
            found += cost
        return found

    @property
    def too_much(self) -> bool:
        return self.limit is not None and self.memory.peak > self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "memory": self.memory.to_json(),
            "limit_bytes": self.limit,
            "processes": self.processes,
            "total_bytes": self.memory.total(self.processes),
            "seconds": self.time.wall if self.whole else None,
            "cpu_seconds": self.time.cpu if self.whole else None,
            "parts": {name: {"seconds": cost.wall, "cpu_seconds": cost.cpu} for name, cost in self.parts.items()},
            "suggestions": [one.to_json() for one in self.suggestions],
            "advice": list(self.advice),
        }

    @property
    def memory_line(self) -> str:
        there = "" if self.limit is None else f" of {byte_text(self.limit)}"
        how = "" if self.memory.measured else ", reckoned from smaller passes"
        whole = byte_text(self.memory.total(self.processes))
        each = f" in each of {self.processes} processes, {whole} in all" if self.processes > 1 else ""
        return (
            f"about {byte_text(self.memory.peak)}{there} at most{each}, the largest part {self.memory.dominant}{how}"
            + (": more than there is" if self.too_much else "")
        )

    @property
    def time_line(self) -> str:
        parts = ", ".join(f"{name} {duration(cost.wall)}" for name, cost in self.parts.items() if cost.wall >= 0.05)
        return f"about {duration(self.time.wall)} in all: {parts}"


def validations(recipe: Recipe) -> int:
    """Of one arm, after round 1 and up to the last; what is measured before round 1 is measured once for all arms."""
    every = recipe.evaluate.eval_rounds
    return recipe.rounds // every + (recipe.rounds % every > 0) if every else 1


def saves(recipe: Recipe) -> int:
    """Checkpoints of one arm: before round 1, whenever it is measured, and every so many rounds."""
    every = recipe.evaluate.eval_rounds
    at = {recipe.rounds, *range(recipe.checkpoint.save_rounds, recipe.rounds + 1, recipe.checkpoint.save_rounds)}
    at |= set(range(every, recipe.rounds + 1, every)) if every else set()
    return 1 + len(at)


@dataclass(frozen=True)
class EvaluationWork:
    """What an arm is measured on: each part once."""

    validation: Passes
    test: Passes
    validation_answers: Sequence[Decoding] = ()  # none where they are not scored
    test_answers: Sequence[Decoding] = ()


def tests_of(recipe: Recipe, arm: str, work: ArmWork | None, equal_samples: int | None) -> int:
    """How often an arm goes through the test set: at its end, and when it has seen as much as a local model will."""
    if arm in ("base", "local") or equal_samples is None or work is None:
        return 1
    return 1 + (math.ceil(equal_samples / max(work.samples_per_round, 1e-9)) < recipe.rounds)


def answers(decodings: Iterable[Decoding], measured: Measured, most: int, *, trained: bool) -> Cost:
    """Writing and judging answers; a trained model's are as long as the data's, an untrained one's as they were."""
    found = Cost()
    if measured.token is None or measured.evaluation is None:
        return found
    for one in decodings:
        written = one if trained else one.all_of(min(most, max(measured.untrained_answer, 1)))
        found += measured.evaluation.of(Passes(one.rows / max(one.slots, 1), one.prompts, one.prompts))
        found += measured.token.of(Passes(written.steps, written.answers, written.answers))
        found += measured.judge.times(one.rows)
    return found


def training(work: ArmWork, measured: Measured) -> Cost:
    """All rounds of an arm; of a round that several processes share, the slowest one's wall."""
    whole = measured.step.of(work.passes) + measured.per_client_round.times(work.clients * work.rounds)
    if not work.shares:
        return whole
    rounds = [
        at_once(measured.step.of(one.passes) + measured.per_client_round.times(one.clients) for one in shares)
        for shares in work.shares
    ]
    return Cost(work.scale * math.fsum(cost.wall for cost in rounds), whole.cpu)


def asked(recipe: Recipe, arm: str, models: int) -> int:
    """How often each benchmark is put to a model of the arm's, `models` of which it has once trained."""
    if arm == "base":
        return 1
    every = recipe.evaluate.task_rounds
    return models * (1 if every is None else len({*range(every, recipe.rounds + 1, every), recipe.rounds}))


@dataclass(frozen=True)
class KeptRows:
    """Rows whose states below what is trained are kept (runtime.activation_cache_gb)."""

    distinct: Passes  # each row as a pass of its own
    visits: float  # tokens of all passes that need them
    share: float  # of the distinct rows, those that there is room for

    def takes(self, making: Line) -> Cost:
        """Each row runs through the frozen blocks once, and again in every pass where there was no room for it."""
        again = (1 - self.share) * max(0.0, self.visits - self.distinct.real) / max(self.distinct.real, 1.0)
        return making.of(self.distinct).times(1 + again)


def forecast(
    recipe: Recipe,
    works: Mapping[str, ArmWork],
    measured: Measured,
    evaluations: Mapping[str, Sequence[EvaluationWork]] | None = None,
    *,
    equal_samples: int | None = None,
    most_new_tokens: int = 0,
    models: Mapping[str, int] | None = None,
    kept: KeptRows | None = None,
) -> dict[str, Cost]:
    """Time by part. Without `evaluations` only training is summed.

    Args:
        works: of the arms that train.
        evaluations: of every arm, the work of each process that shares it.
        models: that each arm asks its benchmarks of, where it is not one.
        kept: rows that go through frozen blocks once.
    """
    parts = {"training": sum((training(work, measured) for work in works.values()), Cost())}
    if evaluations is None or measured.evaluation is None:
        return parts
    line, processes = measured.evaluation, len(next(iter(evaluations.values())))

    def written_by(each: Sequence[EvaluationWork], part: str, *, trained: bool) -> Cost:
        return at_once(answers(getattr(one, part), measured, most_new_tokens, trained=trained) for one in each)

    first = next(iter(evaluations.values()))
    evaluated = at_once(line.of(one.validation) for one in first)  # before round 1, once for all arms
    written = written_by(first, "validation_answers", trained=False)
    for arm, each in evaluations.items():
        tests, trained = tests_of(recipe, arm, works.get(arm), equal_samples), arm != "base"
        times = validations(recipe) if trained else 0
        evaluated += at_once(line.of(one.validation.times(times)) for one in each)
        evaluated += at_once(line.of(one.test.times(tests)) for one in each)
        written += written_by(each, "validation_answers", trained=True).times(times)
        written += written_by(each, "test_answers", trained=trained).times(tests)
    if kept is not None and measured.making is not None:
        parts["frozen blocks"] = kept.takes(measured.making)
    parts["evaluation"] = evaluated
    if written.wall:
        parts["answers"] = written
    if measured.tasks:
        one = sum(measured.tasks.values(), Cost())
        times = sum(asked(recipe, arm, (models or {}).get(arm, 1)) for arm in evaluations)
        times += "base" not in evaluations and recipe.evaluate.task_rounds is not None  # before training, once for all
        parts["tasks"] = Cost(one.wall * times / processes, one.cpu * times)
    parts["checkpoints"] = measured.checkpoint.times(saves(recipe) * len(works))
    others = measured.follower.times(processes - 1)
    so_far = measured.start + Cost(measured.follower.wall if processes > 1 else 0.0, others.cpu)
    started = so_far
    for cost in parts.values():
        so_far += cost
    rounds = sum(work.rounds for work in works.values())
    more = min(rounds + len(evaluations), int(so_far.wall / REPORT_SECONDS))  # after rounds and arms
    parts["report"] = measured.report + measured.report.times(FURTHER_REPORT * more)
    return {"start": started, **parts}
