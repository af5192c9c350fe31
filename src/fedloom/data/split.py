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
from fedloom.data.keys import Groups, Keys, Numbers, coded, keys_from
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


def iid(num_rows: int, clients: int, seed: int) -> Groups:
    """A random deal; sizes differ by at most one.

    Raises:
        UserError: more clients than rows.
    """
    _at_least_one(clients)
    if clients > num_rows:
        raise UserError(
            f"split.clients {clients:,}, but there are {num_rows:,} rows: at most {num_rows:,}", code="split.clients"
        )
    order = _rng(seed, "split").permutation(num_rows)
    return {name: np.sort(order[place::clients]) for place, name in enumerate(client_ids(clients))}


def dirichlet(keys: Keys | Sequence[str], clients: int, alpha: float, seed: int, attempt: int = 0) -> Groups:
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
    names = client_ids(clients)
    dealt: dict[str, list[Numbers]] = {name: [] for name in names}
    for _, members in sorted(_keys(keys).members().items()):
        order = rng.permutation(members)
        shares = rng.dirichlet(np.full(clients, float(alpha)))
        if not np.isfinite(shares).all():  # a tiny alpha underflows: all to one client is what it tends to
            shares = np.eye(clients)[rng.integers(clients)]
        edges = np.rint(np.cumsum(shares)[:-1] * len(order)).astype(np.int64)
        for name, part in zip(names, np.split(order, edges), strict=True):
            dealt[name].append(part)
    return {name: _together(parts) for name, parts in dealt.items()}


def shards(keys: Keys | Sequence[str], clients: int, per_client: int, seed: int) -> Groups:
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
    cut = np.array_split(order, number)
    drawn = rng.permutation(number).reshape(clients, per_client)
    return {
        name: _together([cut[shard] for shard in own]) for name, own in zip(client_ids(clients), drawn, strict=True)
    }


def quantity_skew(num_rows: int, clients: int, alpha: float, seed: int, attempt: int = 0) -> Groups:
    """Rows are dealt at random, in sizes drawn from Dirichlet(alpha): small alpha, few clients hold most of them.

    `attempt` gives another draw of the same seed; a client may be left with nothing, which the caller redraws.

    Raises:
        UserError: more clients than rows, or alpha not above 0.
    """
    return dirichlet(Keys(np.zeros(num_rows, dtype=np.int32), ["row"]), clients, alpha, seed, attempt)


def by_key(keys: Keys | Sequence[str], clients: int | None, what: str) -> Groups:
    """One client per key, named like it. With fewer clients than keys, keys are dealt round robin, the largest first,
    and a client that holds one key alone keeps its name.

    `what` names the keys in messages ("categories", "files", "values of column 'user'").

    Raises:
        UserError: more clients than keys.
    """
    held = _keys(keys).members()
    if clients is None or clients == len(held):
        return dict(sorted(held.items()))
    _at_least_one(clients)
    if clients > len(held):
        listed = ", ".join(sorted(held)[:12]) + (f" and {len(held) - 12} more" if len(held) > 12 else "")
        raise UserError(
            f"split.clients {clients:,}, but the data has {len(held):,} {what} ({listed}): at most {len(held):,}",
            hint=f"split.clients={len(held)}, or split.kind=dirichlet, which shares a category among clients",
            code="split.clients",
        )
    order = sorted(held, key=lambda key: (-len(held[key]), key))
    groups: Groups = {}
    for place, name in enumerate(client_ids(clients)):
        mine = order[place::clients]
        groups[mine[0] if len(mine) == 1 else name] = _together([held[key] for key in mine])
    return groups


class Named(NamedTuple):
    """Clients made of the data's own keys, and the rows that belong to nobody, by reason."""

    groups: Groups
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
        sizes = {name: len(members) for name, members in keys.members().items()}
        small = {name for name, size in sizes.items() if size < min_rows}
        if len(small) == len(sizes):
            most = max(sizes, key=lambda name: sizes[name])
            raise UserError(
                f"split.min_rows {min_rows:,}: none of the {len(sizes):,} {what} has as many rows; the largest, "
                f"{most}, has {sizes[most]:,}",
                hint=f"split.min_rows={sizes[most]} at most",
                code="split.min_rows",
            )
        if small:
            gone = np.isin(keys.codes, [code for code, name in enumerate(keys.names) if name in small])
            left_out[f"of {len(small):,} {what} with fewer than split.min_rows {min_rows:,}"] = int(gone.sum())
            keys = Keys(np.where(gone, np.int32(-1), keys.codes), keys.names)
    there = keys.known
    held = by_key(keys[there], clients, what)
    return Named({name: there[places] for name, places in held.items()}, left_out)


def _keys(keys: Keys | Sequence[str]) -> Keys:
    return keys if isinstance(keys, Keys) else keys_from(keys)


def _together(parts: Sequence[Numbers]) -> Numbers:
    return np.sort(np.concatenate(parts)) if len(parts) != 1 else np.sort(parts[0])


# ---------------------------------------------------------------- train, validation, test


def part_sizes(size: float, rows: Mapping[str, int], name: str) -> dict[str, int]:
    """How many of each client's rows go to a part.

    A share below 1 is a share of each client's rows, rounded to the nearest. A whole number is rows over all clients,
    in proportion to what they have, so that they add up to it.

    >>> part_sizes(0.1, {"a": 25, "b": 4}, "val_set_size"), part_sizes(3, {"a": 20, "b": 10}, "val_set_size")
    ({'a': 3, 'b': 0}, {'a': 2, 'b': 1})

    Raises:
        UserError: below 0, no whole number, or as many rows as there are.
    """
    total = sum(rows.values())
    if size < 0 or (size >= 1 and size != int(size)):
        raise UserError(f"data.{name} {size}: must be a share below 1, or a whole number of rows", code=f"data.{name}")
    if size >= total > 0:
        raise UserError(
            f"data.{name} {size:g}, but there are {total:,} rows in all, so none would be left to train on",
            hint=f"a share below 1, for example data.{name}=0.1",
            code=f"data.{name}",
        )
    if size < 1:
        return {client: int(np.floor(size * own + 0.5)) for client, own in rows.items()}
    exact = {client: int(size) * own / total for client, own in rows.items()}
    sizes = {client: int(share) for client, share in exact.items()}
    # The rows that rounding down left over go to the largest remainders.
    order = sorted(rows, key=lambda client: (sizes[client] - exact[client], client))
    for client in order[: int(size) - sum(sizes.values())]:
        sizes[client] += 1
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


def deal(num_rows: int, clients: Sequence[str], seed: int, purpose: str = "deal") -> Groups:
    """Deal rows of a given test file to clients at random; with fewer rows than clients some get none."""
    order = _rng(seed, purpose).permutation(num_rows)
    return {name: np.sort(order[place :: len(clients)]) for place, name in enumerate(clients)}


def counts(keys: Keys, members: Numbers) -> dict[str, int]:
    """Rows per key of one client, the largest first."""
    codes, sizes = np.unique(keys.codes[members], return_counts=True)
    found = {keys.names[code]: int(size) for code, size in zip(codes.tolist(), sizes, strict=True) if code >= 0}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def holders(groups: Mapping[str, Numbers], keys: Keys) -> dict[str, str]:
    """Key -> the client that holds its rows, for splits in which one client holds all of a key."""
    return {
        keys.names[code]: name
        for name, members in groups.items()
        for code in np.unique(keys.codes[members]).tolist()
        if code >= 0
    }
