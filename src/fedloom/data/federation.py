"""From a data recipe to a federation: who holds what, tokenised, with a report of everything that was left out."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.data import keys as columns
from fedloom.data import split as splitting
from fedloom.data.heterogeneity import Counted, distances, length_counts
from fedloom.data.holdings import PARTS as PARTS  # noqa: PLC0414  the names are looked for here
from fedloom.data.holdings import ClientData as ClientData  # noqa: PLC0414
from fedloom.data.holdings import ClientTable, Held, Names
from fedloom.data.keys import Keys, Numbers
from fedloom.data.listing import spread
from fedloom.data.pairs import sides
from fedloom.data.rows import Source, as_rows
from fedloom.data.sources import sources_of
from fedloom.data.store import Row, Rows, Some
from fedloom.data.templates import Layout, Tokenizer
from fedloom.data.tokens import (
    Example,
    Examples,
    Shade,
    Tokenised,
    fits,
    prompt_ids,
    render_tokens,
    tokenise,
    tokenised,
)
from fedloom.errors import UserError, suggest

logger = logging.getLogger("fedloom.data.federation")  # a command that shows the notes itself quiets it


class DataSettings(Protocol):
    """The recipe's block `data`."""

    @property
    def name(self) -> str | None: ...  # of a set of the catalogue
    @property
    def path(self) -> str: ...
    @property
    def test_path(self) -> str | None: ...
    @property
    def type(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str] | None: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def val_set_size(self) -> float | None: ...  # a share below 1, or a number of rows over all clients; None is 0.05
    @property
    def test_set_size(self) -> float | None: ...  # the same; None is 0.1, unused with test_path
    @property
    def limit(self) -> int | None: ...
    @property
    def train_on_inputs(self) -> bool: ...
    @property
    def cache(self) -> bool: ...


class SplitSettings(Protocol):
    """The recipe's block `split`."""

    @property
    def kind(self) -> str | None: ...
    @property
    def clients(self) -> int | None: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def column(self) -> str | None: ...
    @property
    def shards_per_client(self) -> int | None: ...  # None is 2
    @property
    def min_rows(self) -> int | None: ...


SPLITS = ("iid", "dirichlet", "shards", "quantity_skew", "by_category", "by_column", "files", "natural")
VALIDATION_SHARE = 0.05
TEST_SHARE = 0.1
DEFAULT_CLIENTS = 4
DEFAULT_SHARDS = 2
DIGESTED = 10_000  # clients whose digests are in memory at once
DIGEST_BYTES = 16  # of an example


@dataclass(frozen=True)
class ClientReport:
    """One line of the table of clients: examples per part, training tokens, where its rows come from, and how long they
    are (p10 to p90: tokens per row before any cut)."""

    id: str
    train: int
    validation: int
    test: int
    train_tokens: int
    train_target_tokens: int
    categories: Mapping[str, int] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataReport:
    """What was read, what was left out and why, who holds what. `to_json()` is what result.json has under "data"."""

    source: str
    test_source: str | None
    read_as: str
    rows_read: int  # test rows included
    rows_used: int  # train + validation + test examples over all clients
    left_out: Mapping[str, int]  # reason -> rows; rows_read == rows_used + their sum
    duplicates: int  # rows that repeat an earlier row exactly, wherever they are
    layout: str
    stop: str
    max_length: int | None
    cut: int  # rows that lost the end of their answer, the stop token included
    tokens: Mapping[str, int]  # train, validation, test, and train_target (those with loss)
    lengths: Mapping[str, int]  # p50, p90, p95, p99, max: tokens per row before any cut
    split: str
    clients: Sequence[ClientReport]  # of more than 1,000 clients as many, evenly spread
    num_clients: int
    rows: Mapping[str, int]  # train, validation, test, over all clients
    notes: Sequence[str] = ()
    # "category" and "length" -> distances between each client and the pool, see `fedloom.data.heterogeneity`
    heterogeneity: Mapping[str, Mapping[str, float | None] | None] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """One line for people."""
        sizes = " / ".join(f"{self.rows[part]:,}" for part in PARTS)
        return f"{self.num_clients:,} clients ({self.split}), {sizes} train / validation / test rows, {self.layout}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Federation:
    """All clients' data. `Example.row` is a number in `rows`, where scoring finds the answer.

    Of preference data the examples are the chosen sides; `fedloom.data.pair_batches.Pairs` has both.
    """

    clients: Mapping[str, ClientData]
    rows: Sequence[Row]
    task: Any  # the BuiltinTask, else None
    report: DataReport
    tokenizer: Tokenizer
    chat_template: str

    @property
    def paired(self) -> bool:
        """Whether the rows are pairs of answers, so that an example has two sides."""
        return self.report.read_as == "preference"

    def prompt_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """What generation starts from for each example: the very tokens that training has before the answer."""
        return prompt_ids([self.rows[example.row] for example in examples], self.tokenizer, self.chat_template)

    @property
    def ids(self) -> Sequence[str]:
        return self.clients.ids if isinstance(self.clients, ClientTable) else list(self.clients)

    def sizes(self, part: str) -> Numbers:
        """Examples that each client has in a part, in the order of `clients`."""
        if isinstance(self.clients, ClientTable):
            return self.clients.held[part].sizes
        return np.asarray([len(getattr(client, part)) for client in self.clients.values()], dtype=np.int64)

    def having(self, part: str) -> list[str]:
        """The clients that have examples in a part."""
        ids = self.ids
        return [ids[place] for place in np.flatnonzero(self.sizes(part)).tolist()]

    def pooled(self, part: str) -> Examples:
        """The examples of all clients together, client by client: "test" gives the common test set."""
        if isinstance(self.clients, ClientTable):
            return Examples(self.clients.tokens, self.clients.held[part].numbers)
        own = [getattr(client, part) for client in self.clients.values()]
        return Examples(own[0].tokens, np.concatenate([examples.numbers for examples in own]))

    def rows_of(self, examples: Examples) -> Sequence[Row]:
        """The rows of some examples, each read when it is asked for."""
        return Some(self.rows, examples.rows)

    def digest(self) -> str:
        """Of every example and who holds it, in order: equal for the same data, however it came here."""
        digest = hashlib.sha256()
        ids, tokens = self.ids, self.pooled("train").tokens
        for first in range(0, len(ids), DIGESTED):  # of a million clients an object each would take half a minute
            names = ids[first : first + DIGESTED]
            parts = [
                (edges, [tokens.digests[numbers + side].tobytes() for side in range(1 + self.paired)])
                for numbers, edges in (self._stretch(part, first, first + len(names)) for part in PARTS)
            ]
            for place, name in enumerate(names):
                digest.update(f"{len(name)} {name}".encode())
                for edges, whole in parts:
                    begin, end = edges[place], edges[place + 1]
                    for side in whole:
                        digest.update(f"|{end - begin}|".encode())
                        digest.update(side[DIGEST_BYTES * begin : DIGEST_BYTES * end])
        return digest.hexdigest()

    def _stretch(self, part: str, first: int, last: int) -> tuple[Numbers, list[int]]:
        """The examples of some clients one after another, and where each client's begin and end among them."""
        if isinstance(self.clients, ClientTable):
            held = self.clients.held[part]
            edges = held.edges[first : last + 1]
            return held.numbers[edges[0] : edges[-1]], (edges - edges[0]).tolist()
        own = [getattr(client, part).numbers for client in itertools.islice(self.clients.values(), first, last)]
        return np.concatenate(own), [0, *itertools.accumulate(map(len, own))]

    def small(self, clients: int, rows: int) -> Federation:
        """The first `clients` clients with at most `rows` examples in each part: what a smoke run works on."""
        kept = {
            name: ClientData(name, one.train[:rows], one.validation[:rows], one.test[:rows])
            for name, one in itertools.islice(self.clients.items(), clients)
        }
        table = [
            replace(
                line,
                train=len(kept[line.id].train),
                validation=len(kept[line.id].validation),
                test=len(kept[line.id].test),
                train_tokens=_whole(kept[line.id].train, self.paired).num_tokens,
                train_target_tokens=_whole(kept[line.id].train, self.paired).num_target_tokens,
            )
            for line in self.report.clients
            if line.id in kept
        ]
        sizes = {part: sum(len(getattr(client, part)) for client in kept.values()) for part in PARTS}
        note = f"a small part for a smoke run: {len(kept)} clients, at most {rows} rows in each part"
        report = replace(
            self.report, clients=table, num_clients=len(kept), rows=sizes, notes=(*self.report.notes, note)
        )
        return replace(self, clients=kept, report=report)

    def preview(self, example: Example, side: int = 0) -> list[tuple[str, Shade]]:
        """The example as text in stretches: trained on, masked, and what max_length cut off. `side` is 1 for the
        rejected one of a pair."""
        shown = render_tokens(example, self.tokenizer)
        row = sides(self.rows[example.row])[side]
        whole = tokenise([row], self.tokenizer, chat_template=self.chat_template).tokens.example(0)
        if len(whole.input_ids) > len(example.input_ids):
            before = "".join(text for text, _ in shown)
            text = str(
                self.tokenizer.decode(
                    whole.input_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
            shown.append((text[len(before) :], "cut"))
        return shown


def prepare(data: DataSettings, split: SplitSettings, tokenizer: Tokenizer, seed: int) -> Federation:
    """Read, split, tokenise.

    The split depends on rows and seed alone, never on the tokenizer: runs with other models or lengths have the same
    clients and the same test rows (less those whose answer does not fit).

    Raises:
        UserError: anything in the data or in what is asked of it; nothing is patched up silently.
    """
    source, tests = sources_of(data, seed)
    kind = split.kind or ("natural" if source.natural is not None else "iid")
    if kind not in SPLITS:
        raise UserError(f"split.kind {kind!r}: no such split{suggest(kind, SPLITS)}", code="split.kind")
    plan = _plan(data, split, kind, source, tests, seed)
    crossing = _leave_out_crossing(plan)
    if crossing:
        plan.left_out["exact duplicate of a validation or test row"] += crossing
    _check_parts(plan, data)

    done = tokenised(
        plan.rows,
        tokenizer,
        max_length=data.max_length,
        chat_template=data.chat_template,
        train_on_inputs=data.train_on_inputs,
        cache=data.cache,
        name=f"{source.name}, {getattr(tokenizer, 'name_or_path', '')}",
    )
    clients = _clients(plan, done)
    held = plan.part >= 0
    used = sum(len(clients.held[part].numbers) for part in PARTS)
    lost = int(done.wholly_cut[held].sum())
    refused = int(done.refused[held].sum())
    if lost:
        plan.left_out["answer wholly cut by max_length"] += lost
        usable = done.full_lengths[done.full_lengths > 0]
        plan.notes.append(
            f"at max_length {data.max_length}, {lost / int(held.sum()):.1%} of rows lose their whole answer and are "
            f"left out; 95 % fit in {fits(usable)}"
        )
    if refused:
        plan.left_out["refused by the chat template"] += refused
    _check_clients(clients, plan, data)
    report = _report(data, kind, source, tests, plan, done, clients, used)
    logger.info("%s", report.said)
    said = {*source.notes, *(tests.notes if tests is not None else ())}
    for note in report.notes:
        if note.removesuffix(" (test file)") not in said:
            logger.warning("%s", note)
    return Federation(clients, plan.rows, source.task, report, tokenizer, data.chat_template)


def _sizes(data: DataSettings) -> tuple[float, float]:
    """val_set_size and test_set_size, with what they are when nothing is said."""
    return (
        VALIDATION_SHARE if data.val_set_size is None else data.val_set_size,
        TEST_SHARE if data.test_set_size is None else data.test_set_size,
    )


@dataclass
class _Plan:
    """Rows and their division, while it is being made."""

    rows: Rows
    ids: Names
    owner: NDArray[np.int32]  # the place of each row's client, -1 where it has none
    part: NDArray[np.int8]  # what each row is for: a place in PARTS, -1 where it is for nothing
    left_out: Counter[str]
    notes: list[str]
    keys: Keys  # the category of each row, for the report
    content: NDArray[np.int32]  # equal for exact duplicates, from 0 without gaps

    def sizes(self, part: int) -> Numbers:
        """Rows that each client has in a part."""
        return np.bincount(self.owner[self.part == part], minlength=len(self.ids))

    def held(self, part: int) -> Held:
        return Held.by_owner(self.ids, np.where(self.part == part, self.owner, np.int32(-1)))


def _plan(
    data: DataSettings, split: SplitSettings, kind: str, source: Source, tests: Source | None, seed: int
) -> _Plan:
    left_out: Counter[str] = Counter(source.dropped)
    notes = list(source.notes)
    if kind == "natural":
        return _natural(split, source, left_out, notes)
    train_rows = source.rows
    test_rows = tests.rows if tests is not None else as_rows([])
    if source.natural is not None:
        # Another split of a built-in task: its training and validation rows are dealt anew, its tests stay tests.
        own = [parts.get(part, ()) for parts in source.natural.values() for part in ("train", "validation")]
        train_rows = as_rows([source.rows[row] for part in own for row in part])
        test_rows = as_rows([source.rows[row] for parts in source.natural.values() for row in parts.get("test", ())])
    if tests is not None:
        left_out.update(tests.dropped)
        notes += [f"{note} (test file)" for note in tests.notes]
    given = len(test_rows) > 0
    rows = train_rows + test_rows if given else train_rows
    val_size, test_size = _sizes(data)
    if given:
        test_size = 0
    content = columns.contents(rows)

    def divide(groups: Held) -> NDArray[np.int8]:
        num_test = splitting.part_counts(test_size, groups.sizes, groups.ids, "test_set_size")
        num_validation = splitting.part_counts(val_size, groups.sizes, groups.ids, "val_set_size", num_test)
        return splitting.divided(groups, content, num_validation, num_test, seed)

    groups, homeless_rows = _groups(split, kind, train_rows, seed, divide)
    left_out.update(homeless_rows)
    part, owner = divide(groups), groups.owner(len(rows))
    if given:
        dealt, homeless = _deal_tests(split, kind, train_rows, test_rows, groups, seed)
        if homeless:
            left_out["test row of a category no client has"] += homeless
        owner[len(train_rows) :] = dealt
        part[len(train_rows) :] = np.where(dealt >= 0, 2, -1)
    return _Plan(rows, groups.ids, owner, part, left_out, notes, _report_keys(rows, split.column), content)


def _report_keys(rows: Rows, column: str | None) -> Keys:
    """The category of each row, or what the column of the split has in its place."""
    if column is None or (column == "category" and column not in rows.column_names):
        return columns.categories(rows)
    return columns.column(rows, column)[0]


def _natural(split: SplitSettings, source: Source, left_out: Counter[str], notes: list[str]) -> _Plan:
    if source.natural is None:
        raise UserError(
            "split.kind natural is what built-in tasks bring; this data has no clients of its own",
            hint="split.kind=iid, dirichlet, by_category, by_column, or files for a folder with a file per client",
            code="split.natural",
        )
    names = list(source.natural)
    owner = np.full(len(source.rows), -1, dtype=np.int32)
    part = np.full(len(source.rows), -1, dtype=np.int8)
    for place, own in enumerate(source.natural.values()):
        for number, name in enumerate(PARTS):
            mine = np.asarray(own.get(name, ()), dtype=np.int64)
            owner[mine], part[mine] = place, number
    if split.clients is not None and split.clients != len(names):
        if split.clients > len(names):
            raise UserError(
                f"split.clients {split.clients}, but {source.name} has {len(names)} clients: at most {len(names)}",
                code="split.clients",
            )
        gone = owner >= split.clients
        left_out["client left out by split.clients"] += int(gone.sum())
        owner[gone], part[gone] = -1, -1
        names = names[: split.clients]
    keys, content = columns.categories(source.rows), columns.contents(source.rows)
    return _Plan(source.rows, Names(names), owner, part, left_out, notes, keys, content)


def _groups(split: SplitSettings, kind: str, rows: Sequence[Row], seed: int, divide: Any) -> splitting.Named:
    if kind == "iid":
        return splitting.Named(splitting.iid(len(rows), split.clients or DEFAULT_CLIENTS, seed), {})
    if kind == "files":
        return splitting.files(rows, split.clients, split.min_rows)
    if kind == "by_category":
        return splitting.by_category(rows, split.clients, split.column, split.min_rows)
    if kind == "by_column":
        if split.column is None:
            raise UserError(
                "split.kind by_column needs split.column", hint="split.column=NAME of a column", code="split.column"
            )
        return splitting.by_column(rows, split.column, split.clients, split.min_rows)
    number = split.clients or DEFAULT_CLIENTS
    keys = splitting.keys_of(rows, split.column, kind) if kind != "quantity_skew" else None
    there = keys.known if keys is not None else np.arange(len(rows))
    without = len(rows) - len(there)
    left_out = {f"no {split.column or 'category'}": without} if without else {}
    if kind == "shards":
        assert keys is not None
        dealt = splitting.shards(keys[there], number, split.shards_per_client or DEFAULT_SHARDS, seed)
        return splitting.Named(dealt.mapped(there), left_out)
    if split.alpha is None:
        raise UserError(f"split.kind {kind} needs split.alpha", hint="split.alpha=0.5", code="split.alpha")
    idle = 0
    for attempt in range(splitting.DIRICHLET_TRIES):
        if keys is None:
            dealt = splitting.quantity_skew(len(rows), number, split.alpha, seed, attempt)
        else:
            dealt = splitting.dirichlet(keys[there], number, split.alpha, seed, attempt)
        groups = dealt.mapped(there)
        training = groups.owner(len(rows))[divide(groups)[: len(rows)] == 0]
        idle = int((np.bincount(training, minlength=number) == 0).sum())
        if not idle:
            return splitting.Named(groups, left_out)
    raise UserError(
        f"split.kind {kind}: with alpha {split.alpha:g}, {number:,} clients and {len(there):,} rows, "
        f"{splitting.DIRICHLET_TRIES} draws each left a client without training rows (the last one {idle:,})",
        hint="a larger split.alpha or fewer split.clients",
        code=f"split.{kind}",
    )


def _deal_tests(
    split: SplitSettings, kind: str, train: Sequence[Row], tests: Sequence[Row], groups: Held, seed: int
) -> tuple[NDArray[np.int32], int]:
    """The place of each test row's client, and how many rows have none: by the key that split the training rows, else
    at random."""
    if kind in ("by_category", "by_column"):
        own = splitting.keys_of(train, split.column, kind)
        keys = splitting.keys_of(tests, split.column, kind)
    elif kind == "files" and "file" in tests[0]:
        own, keys = columns.files(train), columns.files(tests)
    else:
        return splitting.deal(len(tests), groups.ids, seed).owner(len(tests)), 0
    holder = np.full(len(own.names) + 1, -1, dtype=np.int32)  # of each key; the last is that of no key
    owner = groups.owner(len(train))
    there = owner >= 0
    holder[own.codes[there]] = owner[there]
    holder[-1] = -1
    home = {name: int(place) for name, place in zip(own.names, holder, strict=False) if place >= 0}
    found = np.asarray([*(home.get(name, -1) for name in keys.names), -1], dtype=np.int32)[keys.codes]
    homeless = int((found < 0).sum())
    if homeless == len(tests):
        theirs = {*keys.names, *(["None"] if len(keys.known) < len(keys) else [])}
        listed, known = (", ".join(sorted(some)[:8]) for some in (theirs, home))
        raise UserError(
            f"data.test_path: none of its {homeless:,} rows belongs to a client "
            f"(they have {listed}; the clients {known})",
            hint="leave data.test_path out, and each client's tests are taken from its own rows",
            code="split.no_test",
        )
    return found, homeless


def _leave_out_crossing(plan: _Plan) -> int:
    """Take out of training what is also in any client's validation or test set, and out of validation what is in a
    test set: a test set stays as it is, and nobody has trained on it. Gives how many rows."""
    tested = np.zeros(int(plan.content.max(initial=-1)) + 1, dtype=np.bool_)
    validated = tested.copy()
    tested[plan.content[plan.part == 2]] = True
    validated[plan.content[plan.part == 1]] = True
    seen = tested[plan.content]
    gone = ((plan.part == 0) & (seen | validated[plan.content])) | ((plan.part == 1) & seen)
    plan.part[gone] = -1
    return int(gone.sum())


def _check_parts(plan: _Plan, data: DataSettings) -> None:
    """No client without training rows, and no empty validation or test set, unless that was asked for."""
    by_part = [plan.sizes(number) for number in range(len(PARTS))]
    totals = np.sum(by_part, axis=0)
    idle = np.flatnonzero(by_part[0] == 0)
    if len(idle):
        total = int(totals[idle[0]])
        raise UserError(
            f"client {plan.ids[int(idle[0])]} has no training rows: of its {total} row{'' if total == 1 else 's'}, "
            f"{by_part[2][idle[0]]} are for test and {by_part[1][idle[0]]} for validation"
            + (f" (and {len(idle) - 1} more clients like it)" if len(idle) > 1 else ""),
            hint="fewer clients, smaller data.test_set_size and data.val_set_size, or more rows",
            code="split.no_train",
        )
    # Built-in tasks and test files bring their own sizes, so only an empty part that was asked for is wrong.
    val_size, test_size = _sizes(data)
    for part, size, name in (("validation", val_size, "val_set_size"), ("test", test_size, "test_set_size")):
        sizes = by_part[PARTS.index(part)]
        if not size:
            continue
        if not sizes.any():
            place = int(totals.argmax())
            most, rows = plan.ids[place], int(totals[place])
            why = (
                f"the largest client, {most}, has {rows:,} rows, and {size:g} x {rows:,} = {size * rows:.3g} is "
                f"rounded to {splitting.part_sizes(size, {most: rows}, name)[most]}"
                if size < 1
                else "all of its rows are exact duplicates of test rows"
            )
            raise UserError(
                f"data.{name} {size:g} gives no {part} rows: {why}",
                hint=f"data.{name}=0 to do without, or a share of at least {0.5 / rows:.2g}, or a number of rows",
                code=f"split.no_{part}",
            )
        without = int((sizes == 0).sum())
        if without:
            plan.notes.append(f"{without:,} of {len(sizes):,} clients have no {part} rows of their own")


def _clients(plan: _Plan, done: Tokenised) -> ClientTable:
    place = np.full(len(plan.rows), -1, dtype=np.int64)  # row number -> example number, the first of a pair
    place[done.tokens.rows[::-1]] = np.arange(len(done.tokens))[::-1]
    held = {}
    for number, part in enumerate(PARTS):
        examples = plan.held(number).mapped(place)
        held[part] = examples.only(examples.numbers >= 0)
    return ClientTable(done.tokens, held)


def _check_clients(clients: ClientTable, plan: _Plan, data: DataSettings) -> None:
    bare = np.flatnonzero(clients.held["train"].sizes == 0)
    if len(bare):
        raise UserError(
            f"client {plan.ids[int(bare[0])]} has no training rows left: all {plan.sizes(0)[bare[0]]:,} lose their "
            f"whole answer at max_length {data.max_length}, or are refused by the chat template",
            hint="a larger data.max_length, or fewer clients",
            code="split.no_train",
        )
    for part in ("validation", "test"):
        had = int((plan.part == PARTS.index(part)).sum())
        if had and not len(clients.held[part].numbers):
            raise UserError(
                f"no {part} rows left: all {had:,} lose their whole answer at max_length {data.max_length}",
                hint="a larger data.max_length",
                code=f"split.no_{part}",
            )


def _whole(examples: Examples, paired: bool) -> Examples:
    """With the rejected sides of preference data, which are the next examples."""
    if not paired:
        return examples
    return Examples(examples.tokens, np.concatenate([examples.numbers, examples.numbers + 1]))


_LAYOUTS: Mapping[Layout, str] = {"alpaca": "the Alpaca layout", "tokenizer": "the tokenizer's chat template"}


def _report(
    data: DataSettings,
    kind: str,
    source: Source,
    tests: Source | None,
    plan: _Plan,
    done: Tokenised,
    clients: ClientTable,
    used: int,
) -> DataReport:
    lengths = done.full_lengths[done.full_lengths > 0]
    paired = source.kind == "preference"
    quantiles = {f"p{share}": int(np.percentile(lengths, share)) for share in (50, 90, 95, 99)} if len(lengths) else {}
    all_rows = Held.by_owner(plan.ids, np.where(plan.part >= 0, plan.owner, np.int32(-1)))
    listed = spread(len(plan.ids))
    table = [
        ClientReport(
            id=client.id,
            train=len(client.train),
            validation=len(client.validation),
            test=len(client.test),
            train_tokens=_whole(client.train, paired).num_tokens,
            train_target_tokens=_whole(client.train, paired).num_target_tokens,
            categories=splitting.counts(plan.keys, all_rows.at(place)),
            lengths=_quantiles(done.full_lengths[all_rows.at(place)]),
        )
        for place in listed
        for client in [clients.at(place)]
    ]
    if len(listed) < len(plan.ids):
        plan.notes.append(
            f"of {len(plan.ids):,} clients {len(listed):,}, evenly spread, are listed by name; sums are over all"
        )
    train = _whole(Examples(done.tokens, clients.held["train"].numbers), paired)
    measured = all_rows.only(done.full_lengths[all_rows.numbers] > 0)
    own_lengths = done.full_lengths[measured.numbers]
    duplicates = len(plan.content) - len(np.unique(plan.content))
    notes = [*plan.notes, *done.notes]
    if done.cut:
        notes.append(
            f"{done.cut:,} rows lose the end of their answer at max_length {data.max_length}, and do not learn to stop"
        )
    written = sides(plan.rows[0])[0]["kind"]
    layout = _LAYOUTS[done.layout] if written in ("alpaca", "chat") else "plain text"
    return DataReport(
        source=source.name,
        test_source=tests.name if tests is not None else None,
        read_as=source.kind,
        rows_read=source.read + (tests.read if tests is not None else 0),
        rows_used=used,
        left_out={reason: count for reason, count in sorted(plan.left_out.items()) if count},
        duplicates=duplicates,
        layout=layout,
        stop=done.stop,
        max_length=data.max_length,
        cut=done.cut,
        tokens={
            "train": train.num_tokens,
            **{
                part: _whole(Examples(done.tokens, clients.held[part].numbers), paired).num_tokens
                for part in ("validation", "test")
            },
            "train_target": train.num_target_tokens,
        },
        lengths={**quantiles, "max": int(lengths.max()) if len(lengths) else 0},
        split=kind,
        clients=table,
        num_clients=len(plan.ids),
        rows={part: len(clients.held[part].numbers) for part in PARTS},
        notes=tuple(notes),
        heterogeneity={
            "category": distances(Counted.of(all_rows.edges, plan.keys.codes[all_rows.numbers])),
            "length": distances(Counted.of(measured.edges, length_counts(own_lengths))),
        },
    )


def _quantiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return {}
    shares = (10, 25, 50, 75, 90)
    return dict(
        zip((f"p{share}" for share in shares), np.percentile(lengths, shares).astype(int).tolist(), strict=True)
    )
