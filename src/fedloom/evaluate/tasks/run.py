"""Ask a model the items of a task, judge the answers, and keep all of it in a file that can be judged again.

The file is JSON lines: the first says what was measured and how, each other one is an item with what the model saw and
answered. It appears whole or not at all.
"""

from __future__ import annotations

import array
import contextlib
import json
import logging
import math
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from fedloom.data.rows import Row
from fedloom.data.tokens import prompt_ids, tokenise
from fedloom.errors import RunError, UserError
from fedloom.evaluate.generate import Opening, decode, write_openings
from fedloom.evaluate.loglikelihood import Continuation, Loglikelihood, loglikelihoods
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.tasks import find_task
from fedloom.evaluate.tasks.base import Answer, Choose, Item, Judged, Request, Task, TaskSettings, Write
from fedloom.models.causal import CausalLM
from fedloom.models.load import stop_ids
from fedloom.models.rows import positions_of
from fedloom.seeds import seed_of
from fedloom.types import Tree

__all__ = ["Answerer", "Asked", "TaskResult", "answerer_of", "find_task", "rescore", "run_task"]

logger = logging.getLogger("fedloom")

FORMAT = 1  # of the file of items
TOO_LONG = "too_long"
FEWER_SHOTS = "fewer_shots"
LESS_ROOM = "less_room"

OnProgress = Callable[[int, int, str], None]  # done, of how many, what is counted (`Display.advance` is one)
Ids = Sequence[int]  # held as arrays: a hundred thousand prompts are in memory at once
CHUNK = 512  # requests whose texts are tokenised in one go


class Answerer(Protocol):
    """A model, as tasks see it. An empty tuple says that the question does not fit into the model."""

    def write(self, requests: Sequence[Write]) -> list[tuple[str, ...]]:
        """The texts of each request, one per sample."""

    def choose(self, requests: Sequence[Choose]) -> list[tuple[float, ...]]:
        """The log-likelihoods of each request's choices, in nats."""


class Asked(NamedTuple):
    """How a request came before the model."""

    text: str  # what the model saw, special tokens included
    shots: int  # solved examples that stood before the question
    room: int | None  # of `Write`: tokens that the answer could have


@runtime_checkable
class Shows(Protocol):
    """An answerer that can say what its model saw."""

    def asked(self, request: Request) -> Asked: ...


class Bindable(Protocol):
    """What an answerer needs of an adapter."""

    model: nn.Module

    def bound(self, tree_C: Tree) -> AbstractContextManager[nn.Module]: ...


@dataclass(frozen=True)
class TaskResult:
    """What a task measured."""

    name: str
    metric: str  # the key of `summary` to report first
    summary: dict[str, float]
    items: int
    skipped: dict[str, int]  # items that were scored as wrong without an answer, by reason
    seconds: float
    notes: dict[str, int] = field(default_factory=dict)  # items asked otherwise than meant: fewer shots, less room
    file: Path | None = None  # with the items

    @property
    def score(self) -> float:
        return self.summary[self.metric]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "file": None if self.file is None else str(self.file)}


# ---- answering -------------------------------------------------------------------------------------------------------


def answerer_of(
    adapter: Bindable,
    tree: Tree,
    tokenizer: Any,
    *,
    batch_size: int,
    chat_template: str = "auto",
    on_progress: OnProgress | None = None,
) -> ModelAnswerer:
    """A tuned model as an answerer; with an adapter's initial tree it is the untouched base.

    Args:
        tree: one model's parameters, without a cohort axis.
        batch_size: rows in one pass.
        chat_template: the layout of requests that are data rows, as in training.
        on_progress: is told about rows done and to do.

    Raises:
        UserError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, must be 1 or more", code="evaluate.batch_size")
    return ModelAnswerer(adapter, tree, tokenizer, batch_size, chat_template, on_progress)


class _Fitted(NamedTuple):
    """A request as tokens. `ids` is empty when the question does not fit into the model's positions."""

    ids: Ids  # the prompt
    choices: tuple[Continuation, ...]  # of `Choose`
    shots: int
    room: int | None


class ModelAnswerer:
    """See `answerer_of`."""

    def __init__(
        self,
        adapter: Bindable,
        tree: Tree,
        tokenizer: Any,
        batch_size: int,
        chat_template: str,
        on_progress: OnProgress | None,
    ) -> None:
        self.adapter, self.tokenizer, self.batch_size = adapter, tokenizer, batch_size
        self.chat_template, self.on_progress = chat_template, on_progress
        self.tree_C = {name: leaf[None] for name, leaf in tree.items()}
        self.causal = getattr(adapter, "causal", None) or CausalLM(adapter.model)
        positions = positions_of(adapter.model)
        self.positions = positions if isinstance(positions, int) else None
        self._fitted: dict[int, tuple[Request, _Fitted]] = {}

    def write(self, requests: Sequence[Write]) -> list[tuple[str, ...]]:
        fitted = self._fit(requests)
        answers = [[""] * request.samples if one.ids else [] for request, one in zip(requests, fitted, strict=True)]
        asked: list[Opening] = []
        places: list[tuple[int, int]] = []  # (request, sample) of each
        for number, (request, one) in enumerate(zip(requests, fitted, strict=True)):
            if not one.ids or one.room is None:
                continue
            drawn = request.sampling
            for k in range(1 if drawn is None else request.samples):
                own = None if drawn is None else replace(drawn, seed=seed_of(drawn.seed, 0, "", f"sample/{k}"))
                asked.append(Opening(one.ids, one.room, request.stop, own))
                places.append((number, k))
        for (number, k), ids in zip(places, self.written(asked), strict=True):
            request = requests[number]
            answers[number][k] = until(self._text(request, fitted[number].ids, ids), request.stop)
        for request, texts in zip(requests, answers, strict=True):
            if request.sampling is None and texts:  # the most likely text is the same each time
                texts[:] = texts[:1] * request.samples
        return [tuple(texts) for texts in answers]

    def written(self, asked: Sequence[Opening]) -> list[list[int]]:
        """What the model writes after given tokens; a stop text that ends it is still in it."""
        with memory_explained(self.batch_size):
            [found] = write_openings(
                self.adapter,
                self.tree_C,
                [asked],
                self.tokenizer,
                batch_size=self.batch_size,
                on_rows=lambda done: self._say(done, len(asked), "answers"),
            )
        return found

    def choose(self, requests: Sequence[Choose]) -> list[tuple[float, ...]]:
        fitted = self._fit(requests)
        found = iter(self.loglikelihoods([choice for one in fitted if one.ids for choice in one.choices]))
        return [tuple(next(found).nats for _ in one.choices) if one.ids else () for one in fitted]

    def loglikelihoods(self, asked: Sequence[Continuation]) -> list[Loglikelihood]:
        """Of any tokens after any others, for whoever brings their own (see `fedloom.evaluate.loglikelihood`)."""
        with self.adapter.bound(self.tree_C), memory_explained(self.batch_size):
            return loglikelihoods(
                self.causal,
                asked,
                batch_size=self.batch_size,
                on_rows=lambda done, total: self._say(done, total, "rows"),
            )

    def asked(self, request: Request) -> Asked:
        """What the model saw. A question that does not fit is shown whole; the model did not see it."""
        [one] = self._fit([request])
        ids = one.ids or self._prompts([request], [0])[0]
        return Asked(str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)), one.shots, one.room)

    # ---- requests as tokens ------------------------------------------------------------------------------------------

    def _fit(self, requests: Sequence[Request]) -> list[_Fitted]:
        """Each request with as many of its shots as fit; kept, since `asked` comes after the answers."""
        new = [request for request in requests if id(request) not in self._fitted]
        for start in range(0, len(new), CHUNK):
            some = new[start : start + CHUNK]
            self._fitted |= {id(one): (one, fitted) for one, fitted in zip(some, self._fit_new(some), strict=True)}
        return [self._fitted[id(request)][1] for request in requests]

    def _fit_new(self, requests: Sequence[Request]) -> list[_Fitted]:
        for request in requests:
            if not isinstance(request.prompt, str) and (request.shots or request.head):
                raise ValueError("shots stand before a raw prompt only")
            if isinstance(request, Choose) and not all(request.choices):
                raise UserError("a choice is empty", code="evaluate.no_tokens")
        found: list[_Fitted | None] = [None] * len(requests)
        shots = self._first_guess(requests)
        left = list(range(len(requests)))
        while left:  # a guess may be too high by a few tokens, then one shot fewer is tried
            again = []
            tried = self._tokens([requests[n] for n in left], [shots[n] for n in left])
            for n, (ids, choices) in zip(left, tried, strict=True):
                request = requests[n]
                longest = max([len(ids), *(len(one.before) + len(one.tokens) - 1 for one in choices)])
                free = None if self.positions is None else self.positions - longest
                wanted = request.max_new_tokens if isinstance(request, Write) else 0
                if free is not None and free < wanted and shots[n] > 0:
                    shots[n] -= 1
                    again.append(n)
                    continue
                room = None if not isinstance(request, Write) else wanted if free is None else min(wanted, free)
                fits = free is None or free >= (1 if isinstance(request, Write) else 0)
                found[n] = _Fitted(ids if fits else (), choices, shots[n], room if fits else 0)
            left = again
        return [one for one in found if one is not None]

    def _first_guess(self, requests: Sequence[Request]) -> list[int]:
        """Shots that fit by the lengths of the parts, which is right but for tokens that span two of them."""
        if self.positions is None:
            return [len(request.shots) for request in requests]
        with_shots = [request for request in requests if request.shots]
        parts = dict.fromkeys(part for one in with_shots for part in (one.head, *one.shots, str(one.prompt)))
        length = {part: len(ids) for part, ids in zip(parts, self._raw(list(parts)), strict=True)}
        guesses = []
        for request in requests:
            wanted = request.max_new_tokens if isinstance(request, Write) else 0
            fixed = [request.head, str(request.prompt)] if request.shots else []
            used = sum(length[part] for part in fixed) + wanted
            guess = 0
            for shot in request.shots:
                used += length[shot]
                # Each part was counted with what the tokenizer puts before a text, so the sum is rather too high.
                if used - 4 * (guess + 2) > self.positions:
                    break
                guess += 1
            guesses.append(guess)
        return guesses

    def _tokens(self, requests: Sequence[Request], shots: Sequence[int]) -> list[tuple[Ids, tuple[Continuation, ...]]]:
        """The prompt of each request, and its choices behind what is before them."""
        prompts = self._prompts(requests, shots)
        raw: list[str] = []  # prompt and choice as one text, so that tokens come out as in running text
        rows: list[Row] = []
        for request, kept in zip(requests, shots, strict=True):
            if isinstance(request, Choose) and isinstance(request.prompt, str):
                raw += [
                    request.head + "".join(request.shots[:kept]) + request.prompt + choice for choice in request.choices
                ]
            elif isinstance(request, Choose) and not isinstance(request.prompt, str):
                rows += [answered(request.prompt, choice) for choice in request.choices]
        wholes, laid_out = iter(self._raw(raw)), iter(self._laid_out(rows))
        found: list[tuple[Ids, tuple[Continuation, ...]]] = []
        for request, ids in zip(requests, prompts, strict=True):
            if not isinstance(request, Choose):
                found.append((ids, ()))
            elif isinstance(request.prompt, str):
                found.append((ids, tuple(self._parted(ids, next(wholes)) for _ in request.choices)))
            else:
                found.append((ids, tuple(next(laid_out) for _ in request.choices)))
        return found

    def _prompts(self, requests: Sequence[Request], shots: Sequence[int]) -> list[Ids]:
        texts: list[str] = []
        rows: list[Row] = []
        for request, kept in zip(requests, shots, strict=True):
            if isinstance(request.prompt, str):
                text = request.head + "".join(request.shots[:kept]) + request.prompt
                # A space before a choice is part of its first token.
                texts.append(text.rstrip() if isinstance(request, Choose) else text)
            else:
                rows.append(request.prompt)
        raw, laid_out = iter(self._raw(texts)), iter(map(_packed, prompt_ids(rows, self.tokenizer, self.chat_template)))
        return [next(raw) if isinstance(request.prompt, str) else next(laid_out) for request in requests]

    def _raw(self, texts: Sequence[str]) -> list[Ids]:
        """Running text, after what the tokenizer puts before any; never empty."""
        rows: list[Row] = [{"kind": "prompt_completion", "prompt": text, "completion": ""} for text in texts]
        start = self.tokenizer.bos_token_id
        first = start if start is not None else self.tokenizer.eos_token_id
        return [_packed(ids or [first]) for ids in prompt_ids(rows, self.tokenizer)]

    def _parted(self, prompt: Ids, whole: Ids) -> Continuation:
        """As the harness parts them: what follows as many tokens as the prompt has by itself."""
        if len(whole) <= len(prompt):
            raise UserError("a choice adds no token to its prompt", code="evaluate.no_tokens")
        before = whole[: len(prompt)]
        return Continuation(prompt if before == prompt else before, whole[len(prompt) :])

    def _laid_out(self, rows: Sequence[Row]) -> list[Continuation]:
        """Answers as training has them, without the stop token."""
        if not rows:
            return []
        done = tokenise(rows, self.tokenizer, chat_template=self.chat_template)
        if len(done.tokens) != len(rows):
            raise UserError("the chat template refuses a question", "--chat-template alpaca", "data.chat_template")
        stops = stop_ids(self.adapter.model, self.tokenizer)
        found = []
        for number in range(len(rows)):
            example = done.tokens.example(number)
            ids, trained = _packed(example.input_ids.tolist()), example.labels >= 0
            begin = end = len(ids)
            while begin > 0 and trained[begin - 1]:  # of a conversation's answers the last
                begin -= 1
            while end > begin + 1 and ids[end - 1] in stops:
                end -= 1
            found.append(Continuation(ids[:begin], ids[begin:end]))
        return found

    def _text(self, request: Write, prompt: Ids, ids: Ids) -> str:
        """What was written. After a raw prompt it is what the whole text has more, so that no space is lost between."""
        if not isinstance(request.prompt, str):
            return decode(self.tokenizer, [ids])[0]
        before, whole = decode(self.tokenizer, [prompt, [*prompt, *ids]])
        return whole[len(before) :] if whole.startswith(before) else decode(self.tokenizer, [ids])[0]

    def _say(self, done: int, total: int, what: str) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total, what)


def _packed(ids: Iterable[int]) -> Ids:
    return array.array("i", ids)


def answered(row: Row, answer: str) -> Row:
    """The row with another last answer."""
    if row["kind"] == "chat":
        turns = row["messages"]
        turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        return {**row, "messages": [*turns, {"role": "assistant", "content": answer}]}
    return {**row, {"alpaca": "output", "prompt_completion": "completion", "completion": "text"}[row["kind"]]: answer}


def until(text: str, stop: Iterable[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(ends)] if ends else text


@contextlib.contextmanager
def memory_explained(batch_size: int) -> Any:
    """Turn an accelerator's lack of memory into an error a person can act on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory with {batch_size} rows in a pass",
            f"--batch-size {max(1, batch_size // 2)}" if batch_size > 1 else "a smaller model or a shorter task",
            "run.memory",
        ) from error


# ---- running ---------------------------------------------------------------------------------------------------------


def run_task(
    task: Task,
    answerer: Answerer,
    *,
    source: Path | None,
    settings: TaskSettings,
    out: Path | None,
    about: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Ask all items, judge the answers, and write the file of items to `out`.

    Answers that could not be judged (programs need a sandbox) are written as well, under another name.

    Args:
        source: a file or folder in the task's published format; None looks in its usual place.
        about: what is said of the model in the file.

    Raises:
        UserError: the files are not there, are not what the task reads, or a setting is wrong for it.
        RunError: out of memory.
    """
    if task.run is not None:
        whole: TaskResult = task.run(answerer, source=source, settings=settings, out=out, about=about)
        return whole
    started = time.perf_counter()
    items = limited(list(task.load(source, settings)), settings.limit)
    if not items:
        raise UserError(f"{task.name}: there is no item in {source or 'its files'}", code="task.empty")
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise UserError(f"{task.name}: the id {twice[0]!r} is there twice", "ids must differ", "task.ids")
    items = [_with_own_draws(task, item, settings) for item in items]
    answers = _ask(items, answerer)
    asked = [answerer.asked(item.request) if isinstance(answerer, Shows) else _as_given(item.request) for item in items]
    result = TaskResult(
        task.name,
        task.metric,
        {},
        len(items),
        _counts({TOO_LONG: sum(not _is_there(answer) for answer in answers)}),
        time.perf_counter() - started,
        _counts(
            {
                FEWER_SHOTS: sum(one.shots < len(item.request.shots) for item, one in zip(items, asked, strict=True)),
                LESS_ROOM: sum(_has_less_room(item, one) for item, one in zip(items, asked, strict=True)),
            }
        ),
        out,
    )
    try:
        scores = _judge(task, items, answers)
    except BaseException:
        if out is not None:
            kept = out.with_name(out.stem + ".unjudged" + out.suffix)
            lines = map(_line, items, asked, answers, [Judged({})] * len(items))
            write_lines(kept, [header_of(result, settings, source, about), *lines])
            logger.warning("%s: answers without a verdict are kept; fedloom eval --rescore %s", task.name, kept)
        raise
    seconds = time.perf_counter() - started
    result = replace(result, summary=_summary(task, items, scores), seconds=seconds)
    if out is not None:
        write_lines(out, [header_of(result, settings, source, about), *map(_line, items, asked, answers, scores)])
    return result


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each group."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.group] += 1
        if limit is None or seen[item.group] <= limit:
            kept.append(item)
    return kept


def _with_own_draws(task: Task, item: Item, settings: TaskSettings) -> Item:
    """Draws depend on the item, the sample and the seed: not on what else is asked, nor in which order."""
    request = item.request
    if not isinstance(request, Write) or request.sampling is None:
        return item
    own = replace(request.sampling, seed=seed_of(settings.seed, 0, item.id, f"task/{task.name}"))
    return item._replace(request=request._replace(sampling=own))


def _ask(items: Sequence[Item], answerer: Answerer) -> list[Answer]:
    writes = [item.request for item in items if isinstance(item.request, Write)]
    chooses = [item.request for item in items if isinstance(item.request, Choose)]
    texts = iter(answerer.write(writes) if writes else [])
    nats = iter(answerer.choose(chooses) if chooses else [])
    answers = []
    for item in items:
        if isinstance(item.request, Write):
            answers.append(Answer(texts=tuple(next(texts))))
        else:
            lengths = tuple(max(1, len(choice.strip())) for choice in item.request.choices)
            answers.append(Answer(loglikelihoods=tuple(next(nats)), lengths=lengths))
    return answers


def _judge(task: Task, items: Sequence[Item], answers: Sequence[Answer]) -> list[Judged]:
    """A question that could not be asked is wrong in every respect."""
    there = [n for n, answer in enumerate(answers) if _is_there(answer)]
    judged = task.judge([items[n] for n in there], [answers[n] for n in there]) if there else []
    found = [one if isinstance(one, Judged) else Judged(one) for one in judged]
    wrong = dict.fromkeys([key for one in found for key in one.scores] or [task.metric], 0.0)
    scores = [Judged(wrong)] * len(items)
    for n, one in zip(there, found, strict=True):
        scores[n] = one
    return scores


def _summary(task: Task, items: Sequence[Item], judged: Sequence[Judged]) -> dict[str, float]:
    found = task.summarise(items, [one.scores for one in judged])
    summary = {key: float(value) for key, value in found.items()}
    if task.metric not in summary or not all(map(math.isfinite, summary.values())):
        raise ValueError(f"{task.name}: a summary needs {task.metric} and finite numbers, and is {summary}")
    return summary


def _is_there(answer: Answer) -> bool:
    return bool(answer.texts or answer.loglikelihoods)


def _as_given(request: Request) -> Asked:
    text = request.prompt if isinstance(request.prompt, str) else json.dumps(request.prompt, ensure_ascii=False)
    room = request.max_new_tokens if isinstance(request, Write) else None
    return Asked(request.head + "".join(request.shots) + text, len(request.shots), room)


def _has_less_room(item: Item, asked: Asked) -> bool:
    """Whether the answer could not be as long as it may be; a question that does not fit is counted elsewhere."""
    request = item.request
    return isinstance(request, Write) and asked.room is not None and 0 < asked.room < request.max_new_tokens


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


# ---- the file of items -----------------------------------------------------------------------------------------------


def header_of(
    result: TaskResult, settings: TaskSettings, source: Path | None, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The first line of a file of items."""
    return {
        "format": FORMAT,
        "task": result.name,
        "metric": result.metric,
        "settings": {**asdict(settings), "extra": dict(settings.extra)},
        "source": None if source is None else str(source),
        "model": dict(about or {}),
        "versions": versions(),
        "items": result.items,
        "seconds": result.seconds,
        "summary": result.summary,
        "skipped": result.skipped,
        "notes": result.notes,
    }


def versions() -> dict[str, str]:
    """Of what a measurement depends on."""
    found = {"python": platform.python_version()}
    for name in ("fedloom", "torch", "transformers", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of items beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for line in lines:
                stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _line(item: Item, asked: Asked, answer: Answer, judged: Judged) -> dict[str, Any]:
    request = item.request
    line: dict[str, Any] = {
        "id": item.id,
        "group": item.group,
        "prompt": asked.text,
        "shots": asked.shots,
        "reference": item.reference,
        "question": request.prompt,
    }
    if isinstance(request, Write):
        line |= {"answers": list(answer.texts), "max_new_tokens": request.max_new_tokens, "room": asked.room}
        line |= {"stop": list(request.stop), "samples": request.samples}
        line |= {"sampling": None if request.sampling is None else asdict(request.sampling)}
    else:
        line |= {"choices": list(request.choices), "loglikelihoods": list(answer.loglikelihoods)}
        line |= {"lengths": list(answer.lengths)}
    if not _is_there(answer):
        line["unanswered"] = TOO_LONG
    if judged.outcomes:
        line["outcomes"] = list(judged.outcomes)
    return {**line, "scores": dict(judged.scores)}


def rescore(path: Path, out: Path | None = None) -> TaskResult:
    """Judge the answers in a file of items again, without the model; `out` gets the file with the new scores.

    Raises:
        UserError: it is no such file, or is damaged, or there is no such task.
    """
    header, lines = _read(path)
    if "harness" in header:
        from fedloom.evaluate.harness import require

        require()
        from fedloom.evaluate.harness_run import rescored

        return rescored(header, lines, out)
    task = find_task(header["task"])
    items, asked, answers = [], [], []
    for number, line in enumerate(lines, 2):
        try:
            items.append(Item(line["id"], _request(line), line["reference"], line["group"]))
            asked.append(Asked(line["prompt"], line["shots"], line.get("room")))
            answers.append(
                Answer(
                    tuple(line.get("answers", ())),
                    tuple(line.get("loglikelihoods", ())),
                    tuple(line.get("lengths", ())),
                )
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number:,}: this is no item: {error!r}", code="task.file") from error
    scores = _judge(task, items, answers)
    result = TaskResult(
        task.name,
        task.metric,
        _summary(task, items, scores),
        len(items),
        dict(header["skipped"]),
        float(header["seconds"]),
        dict(header["notes"]),
        out or path,
    )
    if out is not None:
        write_lines(out, [{**header, "summary": result.summary}, *map(_line, items, asked, answers, scores)])
    return result


def _request(line: Mapping[str, Any]) -> Request:
    """The request of a written item, but for its shots: nothing that judges reads them."""
    if "choices" in line:
        return Choose(line["question"], tuple(line["choices"]))
    sampling = None if line["sampling"] is None else Sampling(**line["sampling"])
    return Write(line["question"], line["max_new_tokens"], tuple(line["stop"]), sampling, line["samples"])


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}", "fedloom eval writes one per task", "task.file")
    found = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise UserError(f"{path}, line {number:,} is damaged: {error}", code="task.file") from error
            found.append(value)
    header = found[0] if found else {}
    missing = [key for key in ("format", "task", "items", "skipped", "notes", "seconds") if key not in header]
    if missing:
        raise UserError(
            f"{path} is no file of items: its first line has no {', '.join(missing)}",
            "fedloom eval TARGET --tasks NAME --out DIR writes one per task",
            "task.file",
        )
    if header["format"] != FORMAT:
        raise UserError(f"{path} has format {header['format']}; this version reads {FORMAT}", code="task.file")
    if header["items"] != len(found) - 1:
        raise UserError(f"{path} should have {header['items']:,} items and has {len(found) - 1:,}", code="task.file")
    return header, found[1:]
