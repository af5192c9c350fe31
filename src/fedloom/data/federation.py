"""From a data recipe to a federation: who holds what, tokenised, with a report of everything that was left out."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.data import keys as columns
from fedloom.data import split as splitting
from fedloom.data.heterogeneity import distances, length_counts
from fedloom.data.keys import Groups, Keys, Numbers
from fedloom.data.pairs import sides
from fedloom.data.rows import Source, as_rows
from fedloom.data.sources import sources_of
from fedloom.data.split import Parts
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

PARTS = ("train", "validation", "test")


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
    clients: Sequence[ClientReport]
    notes: Sequence[str] = ()
    # "category" and "length" -> distances between each client and the pool, see `fedloom.data.heterogeneity`
    heterogeneity: Mapping[str, Mapping[str, float | None] | None] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """One line for people."""
        sizes = " / ".join(f"{sum(getattr(client, part) for client in self.clients):,}" for part in PARTS)
        return f"{len(self.clients):,} clients ({self.split}), {sizes} train / validation / test rows, {self.layout}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ClientData:
    """One client's examples. Its FedAvg weight is `len(train)`."""

    id: str
    train: Examples
    validation: Examples
    test: Examples


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

    def pooled(self, part: str) -> Examples:
        """The examples of all clients together, client by client: "test" gives the common test set."""
        own = [getattr(client, part) for client in self.clients.values()]
        return Examples(own[0].tokens, np.concatenate([examples.numbers for examples in own]))

    def rows_of(self, examples: Examples) -> Sequence[Row]:
        """The rows of some examples, each read when it is asked for."""
        return Some(self.rows, examples.rows)

    def digest(self) -> str:
        """Of every example and who holds it, in order: equal for the same data, however it came here."""
        digest = hashlib.sha256()
        for client in self.clients.values():
            digest.update(f"{len(client.id)} {client.id}".encode())
            for part in PARTS:
                examples = getattr(client, part)
                sides = (examples.numbers, examples.numbers + 1) if self.paired else (examples.numbers,)
                for numbers in sides:
                    digest.update(f"|{len(numbers)}|".encode())
                    digest.update(examples.tokens.digests[numbers].tobytes())
        return digest.hexdigest()

    def small(self, clients: int, rows: int) -> Federation:
        """The first `clients` clients with at most `rows` examples in each part: what a smoke run works on."""
        kept = {
            name: ClientData(name, one.train[:rows], one.validation[:rows], one.test[:rows])
            for name, one in list(self.clients.items())[:clients]
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
        note = f"a small part for a smoke run: {len(kept)} clients, at most {rows} rows in each part"
        return replace(self, clients=kept, report=replace(self.report, clients=table, notes=(*self.report.notes, note)))

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
    plan.parts, crossing = _without_crossing(plan.parts, plan.content)
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
    clients = _clients(plan.parts, done, len(plan.rows))
    used = sum(len(getattr(client, part)) for client in clients.values() for part in PARTS)
    held = np.concatenate([part for parts in plan.parts.values() for part in parts])
    lost = int(done.wholly_cut[held].sum())
    refused = int(done.refused[held].sum())
    if lost:
        plan.left_out["answer wholly cut by max_length"] += lost
        usable = done.full_lengths[done.full_lengths > 0]
        plan.notes.append(
            f"at max_length {data.max_length}, {lost / len(held):.1%} of rows lose their whole answer and are left out"
            f"; 95 % fit in {fits(usable)}"
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
    parts: dict[str, Parts]
    left_out: Counter[str]
    notes: list[str]
    keys: Keys  # the category of each row, for the report
    content: NDArray[np.int32]  # equal for exact duplicates, from 0 without gaps


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

    def divide(groups: Groups) -> dict[str, Parts]:
        rows_of = {name: len(members) for name, members in groups.items()}
        num_validation = splitting.part_sizes(val_size, rows_of, "val_set_size")
        num_test = splitting.part_sizes(test_size, rows_of, "test_set_size")
        return {
            name: splitting.divide(
                members,
                content,
                num_validation=num_validation[name],
                num_test=num_test[name],
                seed=seed,
                client=name,
            )
            for name, members in groups.items()
        }

    groups, homeless_rows = _groups(split, kind, train_rows, seed, divide)
    left_out.update(homeless_rows)
    parts = divide(groups)
    if given:
        dealt, homeless = _deal_tests(split, kind, train_rows, test_rows, groups, seed)
        if homeless:
            left_out["test row of a category no client has"] += homeless
        none = np.zeros(0, dtype=np.int64)
        parts = {
            name: Parts(own.train, own.validation, len(train_rows) + dealt.get(name, none))
            for name, own in parts.items()
        }
    return _Plan(rows, parts, left_out, notes, _report_keys(rows, split.column), content)


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
    parts = {
        name: Parts(*(np.asarray(own.get(part, ()), dtype=np.int64) for part in PARTS))
        for name, own in source.natural.items()
    }
    if split.clients is not None and split.clients != len(parts):
        if split.clients > len(parts):
            raise UserError(
                f"split.clients {split.clients}, but {source.name} has {len(parts)} clients: at most {len(parts)}",
                code="split.clients",
            )
        gone = list(parts)[split.clients :]
        left_out["client left out by split.clients"] += sum(len(part) for name in gone for part in parts[name])
        parts = {name: own for name, own in parts.items() if name not in gone}
    keys, content = columns.categories(source.rows), columns.contents(source.rows)
    return _Plan(source.rows, parts, left_out, notes, keys, content)


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
        return splitting.Named({name: there[places] for name, places in dealt.items()}, left_out)
    if split.alpha is None:
        raise UserError(f"split.kind {kind} needs split.alpha", hint="split.alpha=0.5", code="split.alpha")
    idle = 0
    for attempt in range(splitting.DIRICHLET_TRIES):
        if keys is None:
            dealt = splitting.quantity_skew(len(rows), number, split.alpha, seed, attempt)
        else:
            dealt = splitting.dirichlet(keys[there], number, split.alpha, seed, attempt)
        groups = {name: there[places] for name, places in dealt.items()}
        idle = sum(not len(parts.train) for parts in divide(groups).values())
        if not idle:
            return splitting.Named(groups, left_out)
    raise UserError(
        f"split.kind {kind}: with alpha {split.alpha:g}, {number:,} clients and {len(there):,} rows, "
        f"{splitting.DIRICHLET_TRIES} draws each left a client without training rows (the last one {idle:,})",
        hint="a larger split.alpha or fewer split.clients",
        code=f"split.{kind}",
    )


def _deal_tests(
    split: SplitSettings, kind: str, train: Sequence[Row], tests: Sequence[Row], groups: Groups, seed: int
) -> tuple[Groups, int]:
    """Test rows to clients: by the key that split the training rows, else at random."""
    if kind in ("by_category", "by_column"):
        own = splitting.keys_of(train, split.column, kind)
        keys = splitting.keys_of(tests, split.column, kind)
    elif kind == "files" and "file" in tests[0]:
        own, keys = columns.files(train), columns.files(tests)
    else:
        return splitting.deal(len(tests), list(groups), seed), 0
    home = splitting.holders(groups, own)
    dealt: dict[str, list[Numbers]] = {name: [] for name in groups}
    for key, members in keys.members().items():
        if key in home:
            dealt[home[key]].append(members)
    found = {name: np.sort(np.concatenate(parts)) for name, parts in dealt.items() if parts}
    homeless = len(tests) - sum(map(len, found.values()))
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


def _without_crossing(parts: Mapping[str, Parts], content: NDArray[np.int32]) -> tuple[dict[str, Parts], int]:
    """Take out of training what is also in any client's validation or test set, and out of validation what is in a
    test set: a test set stays as it is, and nobody has trained on it."""
    tested = np.zeros(int(content.max(initial=-1)) + 1, dtype=np.bool_)
    validated = tested.copy()
    for own in parts.values():
        tested[content[own.test]] = True
        validated[content[own.validation]] = True
    kept: dict[str, Parts] = {}
    gone = 0
    for name, own in parts.items():
        train = own.train[~(tested | validated)[content[own.train]]]
        validation = own.validation[~tested[content[own.validation]]]
        gone += len(own.train) - len(train) + len(own.validation) - len(validation)
        kept[name] = Parts(train, validation, own.test)
    return kept, gone


def _check_parts(plan: _Plan, data: DataSettings) -> None:
    """No client without training rows, and no empty validation or test set, unless that was asked for."""
    idle = [name for name, own in plan.parts.items() if not len(own.train)]
    if idle:
        own = plan.parts[idle[0]]
        total = sum(map(len, own))
        raise UserError(
            f"client {idle[0]} has no training rows: of its {total} row{'' if total == 1 else 's'}, "
            f"{len(own.test)} are for test and {len(own.validation)} for validation"
            + (f" (and {len(idle) - 1} more clients like it)" if len(idle) > 1 else ""),
            hint="fewer clients, smaller data.test_set_size and data.val_set_size, or more rows",
            code="split.no_train",
        )
    # Built-in tasks and test files bring their own sizes, so only an empty part that was asked for is wrong.
    val_size, test_size = _sizes(data)
    for part, size, name in (("validation", val_size, "val_set_size"), ("test", test_size, "test_set_size")):
        sizes = {client: len(getattr(own, part)) for client, own in plan.parts.items()}
        if not size:
            continue
        if not any(sizes.values()):
            totals = {client: sum(map(len, own)) for client, own in plan.parts.items()}
            most = max(totals, key=lambda client: totals[client])
            rows = totals[most]
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
        without = sum(not count for count in sizes.values())
        if without:
            plan.notes.append(f"{without:,} of {len(sizes):,} clients have no {part} rows of their own")


def _clients(parts: Mapping[str, Parts], done: Tokenised, num_rows: int) -> dict[str, ClientData]:
    place = np.full(num_rows, -1, dtype=np.int64)  # row number -> example number, the first of a pair
    place[done.tokens.rows[::-1]] = np.arange(len(done.tokens))[::-1]
    found = {}
    for name, own in parts.items():
        index = [place[rows] for rows in own]
        found[name] = ClientData(name, *(Examples(done.tokens, numbers[numbers >= 0]) for numbers in index))
    return found


def _check_clients(clients: Mapping[str, ClientData], plan: _Plan, data: DataSettings) -> None:
    for name, client in clients.items():
        rows = plan.parts[name].train
        if not len(client.train):
            raise UserError(
                f"client {name} has no training rows left: all {len(rows):,} lose their whole answer at max_length "
                f"{data.max_length}, or are refused by the chat template",
                hint="a larger data.max_length, or fewer clients",
                code="split.no_train",
            )
    for part in ("validation", "test"):
        had = sum(len(getattr(own, part)) for own in plan.parts.values())
        if had and not any(len(getattr(client, part)) for client in clients.values()):
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
    clients: Mapping[str, ClientData],
    used: int,
) -> DataReport:
    lengths = done.full_lengths[done.full_lengths > 0]
    paired = source.kind == "preference"
    quantiles = {f"p{share}": int(np.percentile(lengths, share)) for share in (50, 90, 95, 99)} if len(lengths) else {}
    own_rows = {name: np.concatenate(plan.parts[name]) for name in clients}
    own_lengths = {name: done.full_lengths[rows] for name, rows in own_rows.items()}
    own_lengths = {name: own[own > 0] for name, own in own_lengths.items()}
    table = [
        ClientReport(
            id=name,
            train=len(client.train),
            validation=len(client.validation),
            test=len(client.test),
            train_tokens=_whole(client.train, paired).num_tokens,
            train_target_tokens=_whole(client.train, paired).num_target_tokens,
            categories=splitting.counts(plan.keys, own_rows[name]),
            lengths=_quantiles(own_lengths[name]),
        )
        for name, client in clients.items()
    ]
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
            **{
                part: sum(_whole(getattr(client, part), paired).num_tokens for client in clients.values())
                for part in PARTS
            },
            "train_target": sum(line.train_target_tokens for line in table),
        },
        lengths={**quantiles, "max": int(lengths.max()) if len(lengths) else 0},
        split=kind,
        clients=table,
        notes=tuple(notes),
        heterogeneity={
            "category": distances([line.categories for line in table]),
            "length": distances(length_counts(list(own_lengths.values()))),
        },
    )


def _quantiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    if not len(lengths):
        return {}
    shares = (10, 25, 50, 75, 90)
    return dict(
        zip((f"p{share}" for share in shares), np.percentile(lengths, shares).astype(int).tolist(), strict=True)
    )
