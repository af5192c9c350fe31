"""Who holds which rows, and which of a client's own rows are for training, validation and test.

A splitter takes rows and gives client id -> row numbers. The shares of a client are then cut from that client's own
rows, so all three have that client's distribution. Rows are arrays of numbers throughout: there may be many millions.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedloom.data import keys as columns
from fedloom.data.holdings import Held, Names
from fedloom.data.keys import Keys, Numbers, coded, keys_from
from fedloom.data.rows import as_rows
from fedloom.data.store import Row
from fedloom.errors import UserError, suggest
from fedloom.seeds import seed_of

DIRICHLET_TRIES = 200  # draws of a skewed split until every client has training rows


class Parts(NamedTuple):
    """One client's rows by use."""

    train: Numbers
    validation: Numbers
    test: Numbers


def client_ids(number: int) -> list[str]:
    """c00, c01, ...: as many digits as it takes for ids to sort as numbers do."""
    width = max(2, len(str(number - 1)))
    return [f"c{client:0{width}d}" for client in range(number)]


def _rng(seed: int, purpose: str, client: str = "") -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_of(seed, 0, client, purpose)))


def _at_least_one(clients: int) -> None:
    if clients < 1:
        raise UserError(f"split.clients {clients}: must be at least 1", code="split.clients")


def iid(num_rows: int, clients: int, seed: int) -> Held:
    """A random deal; sizes differ by at most one.

    Raises:
        UserError: more clients than rows.
    """
    _at_least_one(clients)
    if clients > num_rows:
        raise UserError(
            f"split.clients {clients:,}, but there are {num_rows:,} rows: at most {num_rows:,}", code="split.clients"
        )
    return deal(num_rows, Names(client_ids(clients)), seed, "split")


def dirichlet(keys: Keys | Sequence[str], clients: int, alpha: float, seed: int, attempt: int = 0) -> Held:
    """Each category's rows are dealt in proportions drawn from Dirichlet(alpha): small alpha, few categories each.

    `attempt` gives another draw of the same seed; a client may be left with nothing, which the caller redraws.

    Raises:
        UserError: more clients than rows, or alpha not above 0.
    """
    _at_least_one(clients)
    if not alpha > 0:
        raise UserError(f"split.alpha {alpha}: must be above 0", code="split.alpha")
    if clients > len(keys):
        raise UserError(
            f"split.clients {clients:,}, but there are {len(keys):,} rows: at most {len(keys):,}", code="split.clients"
        )
    rng = _rng(seed, f"split/{attempt}")
    owner = np.full(len(keys), -1, dtype=np.int32)
    for _, members in sorted(_keys(keys).members().items()):
        order = rng.permutation(members)
        shares = rng.dirichlet(np.full(clients, float(alpha)))
        if not np.isfinite(shares).all():  # a tiny alpha underflows: all to one client is what it tends to
            shares = np.eye(clients)[rng.integers(clients)]
        edges = np.rint(np.cumsum(shares)[:-1] * len(order)).astype(np.int64)
        sizes = np.diff(np.concatenate([[0], np.clip(edges, 0, len(order)), [len(order)]]))
        owner[order] = np.repeat(np.arange(clients, dtype=np.int32), sizes)
    return Held.by_owner(Names(client_ids(clients)), owner)


def shards(keys: Keys | Sequence[str], clients: int, per_client: int, seed: int) -> Held:
    """Rows are sorted by key and cut into equal shards, and each client gets `per_client` of them at random (McMahan
    et al. 2017): with 2 shards most clients have two keys. Sizes of shards differ by at most one row.

    Raises:
        UserError: more shards than rows.
    """
    _at_least_one(clients)
    if per_client < 1:
        raise UserError(f"split.shards_per_client {per_client}: must be at least 1", code="split.shards_per_client")
    number = clients * per_client
    if number > len(keys):
        raise UserError(
            f"split.clients {clients:,} x split.shards_per_client {per_client:,} = {number:,} shards, but there are "
            f"{len(keys):,} rows",
            hint=f"at most {len(keys) // per_client:,} clients, or fewer shards each",
            code="split.shards_per_client",
        )
    rng = _rng(seed, "split")
    order = np.concatenate([rng.permutation(members) for _, members in sorted(_keys(keys).members().items())])
    drawn = rng.permutation(number)  # the first `per_client` are those of the first client, and so on
    holder = np.empty(number, dtype=np.int32)
    holder[drawn] = np.arange(number, dtype=np.int32) // per_client
    each, more = divmod(len(order), number)
    owner = np.full(len(keys), -1, dtype=np.int32)
    owner[order] = np.repeat(holder, each + (np.arange(number) < more))
    return Held.by_owner(Names(client_ids(clients)), owner)


def quantity_skew(num_rows: int, clients: int, alpha: float, seed: int, attempt: int = 0) -> Held:
    """Rows are dealt at random, in sizes drawn from Dirichlet(alpha): small alpha, few clients hold most of them.

    `attempt` gives another draw of the same seed; a client may be left with nothing, which the caller redraws.

    Raises:
        UserError: more clients than rows, or alpha not above 0.
    """
    return dirichlet(Keys(np.zeros(num_rows, dtype=np.int32), ["row"]), clients, alpha, seed, attempt)


def by_key(keys: Keys | Sequence[str], clients: int | None, what: str) -> Held:
    """One client per key, named like it. With fewer clients than keys, keys are dealt round robin, the largest first,
    and a client that holds one key alone keeps its name. The others are c00, c01, ..., less the names so kept.

    `what` names the keys in messages ("categories", "files", "values of column 'user'").

    Raises:
        UserError: more clients than keys.
    """
    keys = _keys(keys)
    sizes = np.bincount(keys.codes[keys.codes >= 0], minlength=len(keys.names))
    codes = [int(code) for code in np.flatnonzero(sizes)]
    if clients is None or clients == len(codes):
        codes.sort(key=lambda code: keys.names[code])
        return _by_code(keys, codes, np.arange(len(codes)), [keys.names[code] for code in codes])
    _at_least_one(clients)
    if clients > len(codes):
        held = sorted(keys.names[code] for code in codes)
        listed = ", ".join(held[:12]) + (f" and {len(held) - 12} more" if len(held) > 12 else "")
        raise UserError(
            f"split.clients {clients:,}, but the data has {len(held):,} {what} ({listed}): at most {len(held):,}",
            hint=f"split.clients={len(held)}, or split.kind=dirichlet, which shares a category among clients",
            code="split.clients",
        )
    codes.sort(key=lambda code: (-sizes[code], keys.names[code]))
    alone = len(codes) - clients  # a client from this place on has one key only
    kept = [keys.names[code] for code in codes[alone:clients]]
    taken = set(kept)  # a key may be called c00 itself
    made = [name for name in client_ids(clients) if name not in taken]
    names = [*made[:alone], *kept]
    return _by_code(keys, codes, np.arange(len(codes)) % clients, names)


def _by_code(keys: Keys, codes: Sequence[int], clients: NDArray[np.integer], names: Sequence[str]) -> Held:
    """The rows of the n-th code go to the client at `clients[n]`."""
    owner = np.full(len(keys.names) + 1, -1, dtype=np.int32)  # the last is that of no code
    owner[codes] = clients
    return Held.by_owner(Names(names), owner[keys.codes])


class Named(NamedTuple):
    """Clients made of the data's own keys, and the rows that belong to nobody, by reason."""

    groups: Held
    left_out: dict[str, int]


def by_category(
    rows: Sequence[Row], clients: int | None, column: str | None = None, min_rows: int | None = None
) -> Named:
    """One category per client. `column` takes the place of the rows' own category.

    Raises:
        UserError: no categories, more clients than categories, or none with as many as `min_rows`.
    """
    what = "categories" if column is None else f"values of column {column!r}"
    return _named(keys_of(rows, column, "by_category"), clients, min_rows, what, column or "category")


def by_column(rows: Sequence[Row], column: str, clients: int | None, min_rows: int | None = None) -> Named:
    """One client per value of a column (user, speaker, hospital): natural clients.

    Raises:
        UserError: no such column, more clients than values, or none with as many as `min_rows`.
    """
    return _named(keys_of(rows, column, "by_column"), clients, min_rows, f"values of column {column!r}", column)


def files(rows: Sequence[Row], clients: int | None, min_rows: int | None = None) -> Named:
    """One client per file of the folder.

    Raises:
        UserError: the data is one file, more clients than files, or none with as many as `min_rows`.
    """
    if not rows or "file" not in rows[0]:
        raise UserError(
            "split.kind files: the data is a single file; one client per file needs a folder of files",
            hint="data.path=FOLDER, or split.kind=iid, by_category or by_column",
            code="split.files",
        )
    return _named(columns.files(rows), clients, min_rows, "files", "file")


def keys_of(rows: Sequence[Row], column: str | None, kind: str) -> Keys:
    """The key each row is split by: a column's value as text, or the category when `column` is None.

    Raises:
        UserError: the data has no such column, or no category.
    """
    keys = columns.categories(rows)
    if column is None:
        if not keys.names:
            there = sorted({name for row in rows[:100] for name in row["columns"]})
            candidates = [name for name in there if _looks_like_key(rows, name)]
            use = candidates[0] if candidates else "COLUMN"
            raise UserError(
                f"split.kind {kind}: the data has no category (its columns are {', '.join(there) or 'none'})",
                hint=f"say which column is one: data.columns.category={use}; or split.kind=iid",
                code="split.category",
            )
        return keys
    there = sorted(as_rows(rows).column_names)
    if column not in there:
        if column == "category" and keys.names:
            return keys
        raise UserError(f"split.column {column!r}: no such column{suggest(column, there)}", code="split.column")
    keys, nested = columns.column(rows, column)
    if nested:
        raise UserError(
            f"split.column {column!r} holds lists or objects; clients need a plain value", code="split.column"
        )
    return keys


def _looks_like_key(rows: Sequence[Row], column: str) -> bool:
    values = [row["columns"].get(column) for row in rows[:1000]]
    plain = [value for value in values if isinstance(value, (str, int)) and len(str(value)) <= 40]
    return len(plain) == len(values) and 1 < len(set(plain)) <= max(2, len(values) // 4)


def _named(keys: Keys, clients: int | None, min_rows: int | None, what: str, missing: str) -> Named:
    left_out = {}
    without = len(keys) - len(keys.known)
    if without:
        left_out[f"no {missing}"] = without
    if min_rows is not None:
        sizes = np.bincount(keys.codes[keys.codes >= 0], minlength=len(keys.names))
        number, small = int((sizes > 0).sum()), int(((sizes > 0) & (sizes < min_rows)).sum())
        if small == number:
            most = int(sizes.argmax()) if number else 0
            raise UserError(
                f"split.min_rows {min_rows:,}: none of the {number:,} {what} has as many rows; the largest, "
                f"{keys.names[most]}, has {sizes[most]:,}",
                hint=f"split.min_rows={sizes[most]} at most",
                code="split.min_rows",
            )
        if small:
            gone = np.append(sizes < min_rows, False)[keys.codes]
            left_out[f"of {small:,} {what} with fewer than split.min_rows {min_rows:,}"] = int(gone.sum())
            keys = Keys(np.where(gone, np.int32(-1), keys.codes), keys.names)
    return Named(by_key(keys, clients, what), left_out)


def _keys(keys: Keys | Sequence[str]) -> Keys:
    return keys if isinstance(keys, Keys) else keys_from(keys)


# ---------------------------------------------------------------- train, validation, test


def part_sizes(
    size: float, rows: Mapping[str, int], name: str, taken: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many of each client's rows go to a part.

    A share below 1 is a share of each client's rows, rounded to the nearest. A whole number is rows over all clients,
    in proportion to what they have, so that they add up to it. Of clients that rounding down leaves equally far behind,
    those come last that would have no row left to train on, given what was `taken` for another part.

    >>> part_sizes(0.1, {"a": 25, "b": 4}, "val_set_size"), part_sizes(3, {"a": 20, "b": 10}, "val_set_size")
    ({'a': 3, 'b': 0}, {'a': 2, 'b': 1})

    Raises:
        UserError: below 0, no whole number, or as many rows as there are.
    """
    held = np.fromiter(rows.values(), dtype=np.int64, count=len(rows))
    before = None if taken is None else np.fromiter((taken[client] for client in rows), dtype=np.int64)
    found = part_counts(size, held, list(rows), name, before)
    return dict(zip(rows, found.tolist(), strict=True))


def part_counts(size: float, held: Numbers, ids: Sequence[str], name: str, taken: Numbers | None = None) -> Numbers:
    """The same with arrays: rows of each client, and what was taken of them."""
    total = int(held.sum())
    if size < 0 or (size >= 1 and size != int(size)):
        raise UserError(f"data.{name} {size}: must be a share below 1, or a whole number of rows", code=f"data.{name}")
    if size >= total > 0:
        raise UserError(
            f"data.{name} {size:g}, but there are {total:,} rows in all, so none would be left to train on",
            hint=f"a share below 1, for example data.{name}=0.1",
            code=f"data.{name}",
        )
    if size < 1:
        return np.asarray(np.floor(size * held + 0.5), dtype=np.int64)
    exact = int(size) * held / total
    sizes = exact.astype(np.int64)
    # The rows that rounding down left over go to the largest remainders.
    bare = held - sizes - (0 if taken is None else taken) < 2
    order = np.asarray(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    order = order[np.lexsort(((sizes - exact)[order], bare[order]))]
    sizes[order[: int(size) - int(sizes.sum())]] += 1
    return sizes


def divide(
    members: Sequence[int] | Numbers,
    content: Sequence[Hashable] | NDArray[np.integer],
    *,
    num_validation: int,
    num_test: int,
    seed: int,
    client: str,
) -> Parts:
    """Cut one client's rows into train, validation and test, at random; exact duplicates all go to the same part.

    `content[row]` is equal for exact duplicates. A part may end up with no rows; the caller decides if that is wrong.
    """
    order: Numbers = _rng(seed, "parts", client).permutation(np.asarray(members, dtype=np.int64))
    codes = content if isinstance(content, np.ndarray) else coded(content)[0]
    # Contents in the order in which they come up, and how many rows came up before each.
    _, first, which, sizes = np.unique(codes[order], return_index=True, return_inverse=True, return_counts=True)
    turn = np.argsort(first)
    before = np.empty(len(sizes), dtype=np.int64)
    before[turn] = np.cumsum(sizes[turn]) - sizes[turn]
    # The test part takes contents until it has enough rows, then the validation part, and training has the rest.
    tested = before < num_test
    validated = ~tested & (before - int(sizes[tested].sum()) < num_validation)
    parts = [np.sort(order[chosen[which]]) for chosen in (~tested & ~validated, validated, tested)]
    return Parts(*parts)


def divided(
    groups: Held, content: NDArray[np.integer], num_validation: Numbers, num_test: Numbers, seed: int
) -> NDArray[np.int8]:
    """`divide` of all clients: the part of each row (0 train, 1 validation, 2 test), -1 where it is nobody's.

    Args:
        content: of each row, as in `divide`.
        num_validation, num_test: rows, one number per client.
    """
    part = np.full(len(content), -1, dtype=np.int8)
    part[groups.numbers] = 0
    for place in np.flatnonzero(num_validation + num_test).tolist():
        own = divide(
            groups.at(place),
            content,
            num_validation=int(num_validation[place]),
            num_test=int(num_test[place]),
            seed=seed,
            client=groups.ids[place],
        )
        part[own.validation] = 1
        part[own.test] = 2
    return part


def deal(num_rows: int, clients: Sequence[str], seed: int, purpose: str = "deal") -> Held:
    """Deal rows to clients at random, in turn; with fewer rows than clients some get none."""
    owner = np.empty(num_rows, dtype=np.int32)
    owner[_rng(seed, purpose).permutation(num_rows)] = np.arange(num_rows) % len(clients)
    return Held.by_owner(clients if isinstance(clients, Names) else Names(clients), owner)


def counts(keys: Keys, members: Numbers) -> dict[str, int]:
    """Rows per key of one client, the largest first."""
    codes, sizes = np.unique(keys.codes[members], return_counts=True)
    found = {keys.names[code]: int(size) for code, size in zip(codes.tolist(), sizes, strict=True) if code >= 0}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
