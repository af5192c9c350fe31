"""Token sequences with loss masks, kept flat: five bytes a token, in files that are mapped or in memory.

Shapes: N examples, S tokens of all examples together. `Tokens.ids` is int32 [S], `Tokens.trained` bool [S], and example
n is the stretch `offsets[n] : offsets[n + 1]`. An `Example` is cut out when it is asked for.

What carries loss: the answer and the stop token after it, or everything with `train_on_inputs`. The first token of a
sequence never does, as nothing stands before it to predict it from. Where there is loss is a matter of position, never
of token id: a tokenizer that pads with its stop token still learns to stop.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fedloom.data.cache import prepared
from fedloom.data.pairs import sides
from fedloom.data.store import BLOCK_BYTES, Row, Rows, blocks
from fedloom.data.telling import Telling
from fedloom.data.templates import (
    Layout,
    Rendered,
    TemplateRefusedError,
    Tokenizer,
    layout_for,
    marks_generation,
    messages_of,
    pieces_of,
    prompt_pieces,
    rendered,
    template_prompt,
    uses_template,
)
from fedloom.errors import UserError

NO_LOSS = -100
CHUNK = 1000  # rows per tokenizer call: enough to keep its threads busy, little enough to stay in the cache

Shade = Literal["trained", "masked", "cut"]


class Example(NamedTuple):
    """One row as the model is trained on it. Labels stand where their token stands: the model shifts, we do not."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T], NO_LOSS where there is none
    row: int  # number of the row in the federation's rows


@dataclass(frozen=True, eq=False)
class Tokens:
    """All examples of a data set, flat (see the top of the file)."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]  # [N + 1]
    rows: NDArray[np.int32]  # [N]
    targets: NDArray[np.int32]  # [N] tokens that carry loss
    digests: NDArray[np.uint64]  # [N, 2] equal for examples with the same ids and the same loss

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def example(self, number: int) -> Example:
        span = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        ids = self.ids[span]
        return Example(ids, np.where(self.trained[span], ids, np.int32(NO_LOSS)), int(self.rows[number]))


class Examples(Sequence[Example]):
    """Some examples of `Tokens`, by number; a slice is a view as well."""

    __slots__ = ("lengths", "numbers", "tokens")

    def __init__(self, tokens: Tokens, numbers: NDArray[np.int64]) -> None:
        self.tokens = tokens
        self.numbers = numbers
        self.lengths: NDArray[np.int64] = tokens.offsets[numbers + 1] - tokens.offsets[numbers]  # [len(self)]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> Examples: ...
    def __getitem__(self, number: int | slice) -> Example | Examples:
        if isinstance(number, slice):
            return Examples(self.tokens, self.numbers[number])
        return self.tokens.example(int(self.numbers[number]))

    def __iter__(self) -> Iterator[Example]:
        return (self.tokens.example(int(number)) for number in self.numbers)

    def __repr__(self) -> str:
        return f"Examples({len(self)} examples, {self.num_tokens} tokens)"

    @property
    def rows(self) -> NDArray[np.int32]:
        """Row number of each example."""
        return self.tokens.rows[self.numbers]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_target_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.tokens.targets[self.numbers].sum())


@dataclass(frozen=True)
class Tokenised:
    """`tokenise`'s result: the tokens, and what became of each row."""

    tokens: Tokens
    layout: Layout
    full_lengths: NDArray[np.int32]  # [rows] tokens before any cut
    cut: int  # rows that lost a part of their answer
    wholly_cut: NDArray[np.bool_]  # [rows] rows that lost all of it: they are not among the tokens
    refused: NDArray[np.bool_]  # [rows] rows the chat template would not take: not among the tokens either
    stop: str  # what the last answer of most rows ends with, as text
    notes: tuple[str, ...] = ()
    seconds: float = 0.0  # what making it took, whenever that was


# Arrays of a data set by the name of their file. Rows of the table are examples, but for the last two: those are rows.
_COLUMNS: Mapping[str, Any] = {
    "ids": np.int32,
    "trained": np.bool_,
    "offsets": np.int64,
    "rows": np.int32,
    "targets": np.int32,
    "digests": np.uint64,
    "full_lengths": np.int32,
    "fates": np.uint8,
}
_KEPT, _WHOLLY_CUT, _REFUSED = range(3)


class _Columns:
    """Arrays that grow at their ends: files of a folder, or in memory where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self._files: dict[str, IO[bytes]] = {}
        self._memory: dict[str, bytearray] = {name: bytearray() for name in _COLUMNS}
        if folder is not None:
            self._files = {name: (folder / name).open("wb") for name in _COLUMNS}

    def append(self, **arrays: NDArray[Any]) -> None:
        for name, values in arrays.items():
            data = np.asarray(values, dtype=_COLUMNS[name]).tobytes()
            if self._files:
                self._files[name].write(data)
            else:
                self._memory[name] += data

    def close(self) -> None:
        for stream in self._files.values():
            stream.close()

    def view(self, name: str) -> memoryview:
        """What was appended in memory."""
        return memoryview(self._memory[name]).toreadonly()


def _as_tokenised(facts: Mapping[str, Any], view: Callable[[str], memoryview]) -> Tokenised:
    column = {name: np.frombuffer(view(name), dtype=dtype) for name, dtype in _COLUMNS.items()}
    fates = column.pop("fates")
    lengths = column.pop("full_lengths")
    tokens = Tokens(**{**column, "digests": column["digests"].reshape(-1, 2)})
    return Tokenised(
        tokens,
        facts["layout"],
        lengths,
        facts["cut"],
        fates == _WHOLLY_CUT,
        fates == _REFUSED,
        facts["stop"],
        tuple(facts["notes"]),
        facts["seconds"],
    )


def pad_id_of(tokenizer: Tokenizer) -> int:
    """The id to pad with: the tokenizer's own, else its stop token. Padding is masked by position, so either does."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return _eos_id(tokenizer)


def _eos_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "this model's tokenizer has no end-of-sequence token, so a tuned model would never stop",
            hint='set eos_token in the model folder\'s tokenizer_config.json (for example "eos_token": "</s>")',
            code="data.no_eos",
        )
    return int(tokenizer.eos_token_id)


def _ids(tokenizer: Tokenizer, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    """Token ids of each text, nothing added. `plain`: a "</s>" in the text is five characters, not the stop token."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=plain,
        verbose=False,
    )["input_ids"]
    return found


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text by itself (often the beginning-of-sequence token). What it would put
    behind is left out: a prompt must not end in a stop token."""
    with_specials = list(tokenizer("a", verbose=False)["input_ids"])
    without = _ids(tokenizer, ["a"])[0]
    for begin in range(len(with_specials) - len(without) + 1):
        if with_specials[begin : begin + len(without)] == without:
            return with_specials[:begin]
    raise UserError(
        "this tokenizer changes a text's own tokens when it adds special ones, so prompts cannot be told from answers",
        hint="use the model's fast tokenizer (tokenizer.json)",
        code="data.tokenizer",
    )


def _splits_specials(row: Row) -> bool:
    """Alpaca and chat rows are people's words, where "</s>" is HTML. A ready-made prompt may hold special tokens."""
    return row["kind"] in ("alpaca", "chat")


class _Line(NamedTuple):
    """One tokenised row: its ids, and runs (number of tokens, carries loss) that cover them."""

    ids: list[int]
    runs: list[tuple[int, bool]]
    stops: bool  # the last answer ends in a stop token


def tokenise(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    chat_template: str | None = "auto",
    train_on_inputs: bool = False,
    chunk: int = CHUNK,
) -> Tokenised:
    """Tokenise all rows into memory, `chunk` of them per call of the tokenizer. A preference row gives two examples,
    one after the other: the chosen and the rejected side, or none if one of them cannot be used.

    `max_length` (tokens) cuts the end of an answer, and with it the stop token: the prompt is kept. A row that keeps no
    token of its answers is left out.

    Raises:
        UserError: no stop token, every answer wholly cut, or a chat template that cannot be trained on.
    """
    _check_length(max_length)
    columns = _Columns(None)
    settings = (max_length, layout_for(tokenizer, chat_template), train_on_inputs, chunk)
    facts = _tokenise(rows, tokenizer, columns, *settings)
    return _as_tokenised(facts, columns.view)


def tokenised(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    chat_template: str | None = "auto",
    train_on_inputs: bool = False,
    cache: bool = True,
    name: str = "",
) -> Tokenised:
    """The same as `tokenise`, in files that are mapped, and kept for the next time unless `cache` is off.

    `name` is what the listing of the cache shows.
    """
    _check_length(max_length)
    layout = layout_for(tokenizer, chat_template)
    key = {
        "rows": rows.digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "layout": layout,
        "max_length": max_length,
        "train_on_inputs": train_on_inputs,
        "byteorder": sys.byteorder,
    }

    def build(folder: Path) -> dict[str, Any]:
        columns = _Columns(folder)
        try:
            with _all_cores():
                facts = _tokenise(rows, tokenizer, columns, max_length, layout, train_on_inputs, CHUNK)
            return {**facts, "source": name}
        finally:
            columns.close()

    entry = prepared("tokens", key, build, keep=cache)
    return _as_tokenised(entry.header, entry.view)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of everything that decides which tokens a row becomes: two tokenizers with the same digest give the same ones."""
    _check_fast(tokenizer)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # set anew by each call
        core.pop(name, None)
    template = getattr(tokenizer, "chat_template", None)
    kind = tokenizer.__class__
    said = {
        "core": core,
        "template": template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special_ids": sorted(tokenizer.all_special_ids),
        "added": sorted(tokenizer.get_added_vocab().items()),
        "ids": [tokenizer.eos_token_id, tokenizer.unk_token_id],
        "model_max_length": getattr(tokenizer, "model_max_length", None),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "versions": {name: metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }
    if not kind.__module__.startswith("transformers."):  # a model's own code
        with contextlib.suppress(OSError, TypeError):
            said["code"] = inspect.getsource(kind)
    if "strftime_now" in str(template):
        said["date"] = datetime.date.today().isoformat()
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use every core, unless the user has said otherwise.

    The library does so by default, but then warns when the process forks, and a forked process must not: it has none of
    the threads. So it is allowed only here, and in the process that began with it. The command line says "false" on its
    own account (`fedloom.cli.common.be_quiet`), which is no word of the user.
    """
    said = os.environ.get("TOKENIZERS_PARALLELISM")
    own = said is None or os.environ.get("FEDLOOM_TOKENIZERS") == "quiet"
    if not own or _threads_of.setdefault("pid", os.getpid()) != os.getpid():
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if said is None else said


_threads_of: dict[str, int] = {}  # the process that has the tokenizer's threads


def _check_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 2:
        raise UserError(f"data.max_length {max_length}: must be at least 2", code="data.max_length")


def _tokenise(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    columns: _Columns,
    max_length: int | None,
    layout: Layout,
    train_on_inputs: bool,
    chunk: int,
) -> dict[str, Any]:
    """Append the tokens of all rows to `columns`; gives the rest of `Tokenised`."""
    maker = _Maker(tokenizer, layout)
    started = time.monotonic()
    telling = Telling("tokenised", len(rows))
    own_limit = getattr(tokenizer, "model_max_length", None)
    full_lengths = np.zeros(len(rows), dtype=np.int32)
    needed = np.zeros(len(rows), dtype=np.int32)  # the shortest length at which a token of the answer is kept
    wholly_cut = np.zeros(len(rows), dtype=np.bool_)
    refused = np.zeros(len(rows), dtype=np.bool_)
    cut = kept = over = begin = total = alike = 0
    columns.append(offsets=np.zeros(1))
    for some in blocks(rows, chunk, BLOCK_BYTES):
        lines = iter(maker.lines([side for row in some for side in sides(row)]))
        kept_lengths: list[int] = []
        kept_rows: list[int] = []
        flat: list[int] = []
        run_lengths: list[int] = []
        run_trained: list[bool] = []
        for number, row in enumerate(some, begin):
            found = list(itertools.islice(lines, len(sides(row))))
            own = [line for line in found if line is not None]
            if len(own) < len(found):
                refused[number] = True
                continue
            full_lengths[number] = max(len(line.ids) for line in own)
            needed[number] = max(_first_trained(line.runs) + 1 for line in own)
            rooms = [len(line.ids) if max_length is None else min(len(line.ids), max_length) for line in own]
            if any(_first_trained(line.runs) + 1 > room for line, room in zip(own, rooms, strict=True)):
                wholly_cut[number] = True
                continue
            if len(own) == 2 and own[0].ids[: rooms[0]] == own[1].ids[: rooms[1]]:
                wholly_cut[number] = True  # what tells them apart is cut: nothing is left to compare
                alike += 1
                continue
            cut += any(room < len(line.ids) for line, room in zip(own, rooms, strict=True))
            over += own_limit is not None and max(rooms) > own_limit
            for line, room in zip(own, rooms, strict=True):
                flat.extend(line.ids[:room])
                left = room
                for length, trained in line.runs:
                    length = min(length, left)
                    run_lengths.append(length)
                    run_trained.append(trained or train_on_inputs)
                    left -= length
                kept_lengths.append(room)
                kept_rows.append(number)
        ids = np.asarray(flat, dtype=np.int32)
        mask = np.repeat(np.asarray(run_trained, dtype=np.bool_), np.asarray(run_lengths, dtype=np.int64))
        ends = np.cumsum(np.asarray(kept_lengths, dtype=np.int64))
        starts = ends - np.asarray(kept_lengths, dtype=np.int64)
        mask[starts] = False
        columns.append(
            ids=ids,
            trained=mask,
            offsets=total + ends,
            rows=np.asarray(kept_rows, dtype=np.int32),
            targets=np.add.reduceat(mask, starts, dtype=np.int32) if len(mask) else np.zeros(0, dtype=np.int32),
            digests=_digests(ids, mask, starts.tolist(), ends.tolist()),
        )
        total += len(ids)
        kept += len(kept_rows)
        begin += len(some)
        telling.tell(begin)
    if len(rows) and not kept:
        raise _nothing_left(max_length, full_lengths, needed, wholly_cut, maker)
    columns.append(full_lengths=full_lengths, fates=wholly_cut * _WHOLLY_CUT + refused * _REFUSED)
    notes = maker.notes(kept)
    if alike:
        notes += (f"{alike:,} pair{'s differ' if alike > 1 else ' differs'} only beyond max_length {max_length}",)
    if over:
        notes += (
            f"{over:,} rows are longer than the {own_limit:,} tokens the model's tokenizer states as its most; "
            f"data.max_length={own_limit} cuts them",
        )
    seconds = time.monotonic() - started
    return {"layout": layout, "cut": cut, "stop": maker.stop, "notes": notes, "seconds": seconds}


def _digests(
    ids: NDArray[np.int32], mask: NDArray[np.bool_], starts: Sequence[int], ends: Sequence[int]
) -> NDArray[np.uint64]:
    found = bytearray()
    for begin, end in zip(starts, ends, strict=True):
        digest = hashlib.blake2b(ids[begin:end].data, digest_size=16)
        digest.update(mask[begin:end].data)
        found += digest.digest()
    return np.frombuffer(found, dtype=np.uint64)


def _first_trained(runs: Sequence[tuple[int, bool]]) -> int:
    """Position of the first token that carries loss; the first of all cannot."""
    position = 0
    for length, trained in runs:
        if trained and length and position + length > 1:
            return max(position, 1)
        position += length
    return position


def _nothing_left(
    max_length: int | None,
    full_lengths: NDArray[np.int32],
    needed: NDArray[np.int32],
    wholly_cut: NDArray[np.bool_],
    maker: _Maker,
) -> UserError:
    if not wholly_cut.any():
        return UserError(
            f"the chat template takes none of the {len(wholly_cut):,} rows: {maker.refusal}",
            hint="data.chat_template=alpaca does without the template",
            code="data.chat_template",
        )
    some, most = fits(needed[wholly_cut]), fits(full_lengths[wholly_cut])
    if max_length is None:
        return UserError("no row has an answer of at least one token after its prompt", code="data.no_rows")
    return UserError(
        f"at max_length {max_length} all {int(wholly_cut.sum()):,} rows lose their whole answer: the prompts alone are "
        f"longer (95 % keep a part of their answer at {some}, and fit wholly in {most})",
        hint=f"data.max_length={most}",
        code="data.all_cut",
    )


def fits(lengths: NDArray[np.int32], share: float = 0.95) -> int:
    """The smallest length that at least this share of `lengths` does not exceed."""
    return int(np.quantile(lengths, share, method="higher"))


def _check_fast(tokenizer: Tokenizer) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "this model has only a slow (Python) tokenizer; fedloom needs a fast one (tokenizer.json)",
            hint="save it once with AutoTokenizer.from_pretrained(MODEL, use_fast=True).save_pretrained(MODEL)",
            code="data.tokenizer",
        )


class _Maker:
    """Turns rows into lines, and remembers what is worth a note."""

    def __init__(self, tokenizer: Tokenizer, layout: Layout) -> None:
        _check_fast(tokenizer)
        self.tokenizer = tokenizer
        self.layout = layout
        self.eos = _eos_id(tokenizer)
        self.prefix = _prefix(tokenizer)
        self.marks = layout == "tokenizer" and marks_generation(tokenizer)
        self.stop_ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} - {tokenizer.unk_token_id}
        self.stop_ids.add(self.eos)
        self.stops: Counter[int] = Counter()  # last token of the last answer -> rows
        self.unstopped = 0
        self.joined = 0
        self.refusal = ""
        self.refusals = 0

    @property
    def stop(self) -> str:
        if not self.stops:
            return ""
        return str(self.tokenizer.decode([self.stops.most_common(1)[0][0]], skip_special_tokens=False))

    def notes(self, kept: int) -> tuple[str, ...]:
        found = []
        if self.refusals:
            found.append(f"{self.refusals:,} rows are left out: the chat template refuses them ({self.refusal})")
        if self.unstopped:
            found.append(
                f"{self.unstopped:,} rows: the chat template's own marks end an answer without a stop token, so a "
                "tuned model may not stop"
            )
        if self.joined:
            found.append(
                f"{self.joined:,} rows: the chat template lets a token reach from prompt into answer; they are "
                "tokenised in parts, as generation does"
            )
        return tuple(found)

    def lines(self, rows: Sequence[Row]) -> list[_Line | None]:
        """One line per row, None where the chat template refuses the row."""
        found: list[_Line | None] = [None] * len(rows)
        by_template = [place for place, row in enumerate(rows) if uses_template(row, self.layout)]
        by_pieces = [place for place, row in enumerate(rows) if not uses_template(row, self.layout)]
        for plain in (True, False):
            places = [place for place in by_pieces if _splits_specials(rows[place]) == plain]
            for place, plain_line in zip(
                places, self._from_pieces([rows[place] for place in places], plain), strict=True
            ):
                found[place] = plain_line
        marked = [place for place in by_template if self.marks and not _has_train_marks(rows[place])]
        for place, some in zip(marked, self._from_marks([rows[place] for place in marked]), strict=True):
            found[place] = some
        rest = sorted(set(by_template) - set(marked))
        for place, some in zip(rest, self._from_template([rows[place] for place in rest]), strict=True):
            found[place] = some
        for line in found:
            if line is None:
                continue
            if line.stops:
                self.stops[line.ids[-1]] += 1
            else:
                self.unstopped += 1
        return found

    def _from_pieces(self, rows: Sequence[Row], plain: bool) -> Iterator[_Line]:
        pieces = [pieces_of(row) for row in rows]
        texts = iter(_ids(self.tokenizer, [piece.text for row in pieces for piece in row], plain=plain))
        for row in pieces:
            ids = list(self.prefix)
            runs = [(len(ids), False)]
            for piece in row:
                part = next(texts)
                ids += part
                if piece.ends:
                    ids.append(self.eos)
                runs.append((len(part) + piece.ends, piece.trained))
            yield _Line(ids, runs, True)

    def _from_template(self, rows: Sequence[Row]) -> Iterator[_Line | None]:
        chats: list[Rendered | None] = []
        for row in rows:
            try:
                chats.append(rendered(row, self.tokenizer))
            except TemplateRefusedError as error:
                self._refuse(error)
                chats.append(None)
        there = [chat for chat in chats if chat is not None]
        prompts = iter(_ids(self.tokenizer, [chat.text[:begin] for chat in there for begin, _ in chat.spans]))
        wholes = (
            self.tokenizer(
                [chat.text for chat in there],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            if there
            else None
        )
        number = -1
        for chat in chats:
            if chat is None:
                yield None
                continue
            number += 1
            assert wholes is not None
            ids = list(wholes["input_ids"][number])
            spans = []
            for _, end in chat.spans:
                prompt = next(prompts)
                spans.append((len(prompt), _token_end(wholes, number, len(ids), end), ids[: len(prompt)] == prompt))
            if all(whole for *_, whole in spans):
                yield self._line(ids[: spans[-1][1]], [span[:2] for span in spans], chat.trained)
            else:
                self.joined += 1
                yield self._in_parts(chat.text, chat.spans, chat.trained)

    def _in_parts(self, text: str, spans: Sequence[tuple[int, int]], trained: Sequence[bool]) -> _Line:
        """Tokenise each stretch on its own, so that every answer begins at a token."""
        marks = sorted({0, *(mark for span in spans for mark in span)})
        parts = _ids(self.tokenizer, [text[begin:end] for begin, end in itertools.pairwise(marks)])
        starts = dict(zip(marks, np.cumsum([0, *map(len, parts)]).tolist(), strict=True))
        ids = [token for part in parts for token in part]
        return self._line(ids, [(starts[begin], starts[end]) for begin, end in spans], trained)

    def _line(self, ids: list[int], spans: Sequence[tuple[int, int]], trained: Sequence[bool]) -> _Line:
        """Token spans of answers -> runs; a last answer that its template leaves open gets the stop token."""
        runs: list[tuple[int, bool]] = []
        position = 0
        for (begin, end), train in zip(spans, trained, strict=True):
            runs += [(begin - position, False), (end - begin, train)]
            position = end
        if ids[-1] not in self.stop_ids:
            ids.append(self.eos)
            runs.append((1, trained[-1]))
        return _Line(ids, runs, True)

    def _from_marks(self, rows: Sequence[Row]) -> Iterator[_Line | None]:
        """The template marks what is generated, and the tokenizer tells which tokens that is."""
        import jinja2

        for row in rows:
            try:
                found: Mapping[str, Any] = self.tokenizer.apply_chat_template(
                    messages_of(row),
                    tokenize=True,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                    tokenizer_kwargs={"verbose": False},
                )
            except jinja2.TemplateError as error:
                self._refuse(error)
                yield None
                continue
            ids, mask = list(found["input_ids"]), np.asarray(found["assistant_masks"], dtype=np.bool_)
            if not mask.any():
                raise UserError(
                    "the chat template's {% generation %} marks are there, but mark no token of an answer",
                    hint="data.chat_template=alpaca, or mend the template",
                    code="data.template_marks",
                )
            last = int(np.flatnonzero(mask)[-1]) + 1
            while last > 1 and not str(self.tokenizer.decode([ids[last - 1]], skip_special_tokens=False)).strip():
                last -= 1  # a line break behind the stop token
            edges = np.flatnonzero(np.diff(mask[:last], prepend=~mask[:1])).tolist()
            runs = [(end - begin, bool(mask[begin])) for begin, end in zip(edges, [*edges[1:], last], strict=True)]
            yield _Line(ids[:last], runs, ids[last - 1] in self.stop_ids)

    def _refuse(self, error: Exception) -> None:
        self.refusals += 1
        self.refusal = self.refusal or str(error)


def _has_train_marks(row: Row) -> bool:
    return row["kind"] == "chat" and any("train" in message for message in row["messages"])


def _token_end(encoding: Any, number: int, total: int, end: int) -> int:
    """The number of tokens that cover the first `end` characters of text `number`."""
    at = None
    char = end
    while at is None and char > 0:  # a character that the tokenizer drops has no token
        char -= 1
        at = encoding.char_to_token(number, char)
    last = 0 if at is None else int(at) + 1
    while last < total:  # one character may be several byte tokens
        chars = encoding.token_to_chars(number, last)
        if chars is None or chars.start >= end:
            break
        last += 1
    return last


def prompt_ids(rows: Sequence[Row], tokenizer: Tokenizer, chat_template: str | None = "auto") -> list[list[int]]:
    """What generation starts from, for the last answer of each row: exactly the tokens that training has before it.

    A chat row that ends with a question is a prompt as a whole, and a completion row has what the tokenizer puts before
    any text.

    Raises:
        UserError: no stop token, no such template, or a conversation that the template refuses.
    """
    layout = layout_for(tokenizer, chat_template)
    rows = [sides(row)[0] for row in rows]
    eos, prefix = _eos_id(tokenizer), _prefix(tokenizer)
    found: list[list[int]] = [[] for _ in rows]
    # (row, text, stop token follows), by whether a special token's name in a text is only characters
    texts: dict[bool, list[tuple[int, str, bool]]] = {True: [], False: []}
    for number, row in enumerate(rows):
        if uses_template(row, layout):
            try:
                texts[False].append((number, template_prompt(row, tokenizer), False))
            except TemplateRefusedError as error:
                raise UserError(f"the chat template refuses a row: {error}", code="data.chat_template") from error
            continue
        found[number] += prefix
        texts[_splits_specials(row)] += [(number, piece.text, piece.ends) for piece in prompt_pieces(row)]
    for plain, parts in texts.items():
        for (number, _, ends), ids in zip(
            parts, _ids(tokenizer, [text for _, text, _ in parts], plain=plain), strict=True
        ):
            found[number] += [*ids, eos] if ends else ids
    return found


def render_tokens(example: Example, tokenizer: Tokenizer) -> list[tuple[str, Shade]]:
    """The example as text, in stretches that are trained on or masked, for `preview` to colour. Nothing is lost: the
    texts joined are the decoded example."""
    ids = [int(token) for token in example.input_ids]
    trained = np.asarray(example.labels) != NO_LOSS
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    found: list[tuple[str, Shade]] = []
    before = ""
    for begin, end in itertools.pairwise(edges):
        if begin == end:
            continue
        # Decoding from the start keeps spaces and characters that several tokens make up together.
        so_far = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        found.append((so_far[len(before) :], "trained" if trained[begin] else "masked"))
        before = so_far
    return found
