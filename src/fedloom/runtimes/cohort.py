"""Train several clients in one forward and backward pass over one frozen base model.

Shape suffixes: C clients, B examples per client, T tokens.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.errors import FedloomError, RunError
from fedloom.ops.graph import whole_graph
from fedloom.ops.loss_scale import scaling_in
from fedloom.ops.names import TOLD, apart
from fedloom.personal import staged
from fedloom.runtimes import payload as sides
from fedloom.runtimes.room import OUT_OF_MEMORY, Room, is_out_of_memory, let_go
from fedloom.seeds import seed_of
from fedloom.tree import client_of, not_finite_C, prefix, stack, write_prefix
from fedloom.types import (
    Adapter,
    Algorithm,
    Batch,
    Client,
    ClientUpdate,
    Evaluation,
    LocalState,
    LossFn,
    Metrics,
    Runtime,
    Site,
    State,
    Trained,
    Tree,
    Upload,
)

TOGETHER = 64  # clients whose one model is evaluated in one go: passes are as large as an evaluation makes them

log = logging.getLogger("fedloom")


def sequential() -> Runtime:
    """One client after the other: the plain loop, and the reference for every other runtime."""
    return batched(1)


def batched(clients_per_batch: int | Room) -> Runtime:
    """At most so many clients at a time, those with the most steps first, so that the active ones are a prefix.

    Memory does not grow with the cohort: summands are folded as blocks finish. Where it does not hold so many clients,
    half of them are tried, and no more than that from then on; which clients go together changes no result.
    """
    room = clients_per_batch if isinstance(clients_per_batch, Room) else Room(clients_per_batch)

    def train(algorithm: Algorithm, adapter: Adapter, state: State, cohort: Sequence[Client]) -> Trained:
        return train_part(algorithm, adapter, state, cohort, tuple(client.id for client in cohort), room)

    def evaluate(
        algorithm: Algorithm, adapter: Adapter, state: State, clients: Sequence[Client], evaluation: Evaluation
    ) -> Mapping[str, Metrics]:
        adapter.sync(state.base)
        found: dict[str, Metrics] = {}
        # where an update needs C == 1, so do clients with models of their own
        width = room.width if algorithm.client.cohort_axis or not state.personal else 1
        broadcasts: dict[int | None, Tree] = {}  # by rank: one model, however many clients use it
        groups: dict[int | None, list[tuple[Client, Tree]]] = {}  # who has which of them; None: a model of its own

        def run(group: list[tuple[Client, Tree]]) -> None:
            block = [client for client, _ in group]
            rows = evaluation.run(adapter, stack([tree for _, tree in group]), block)
            found.update({client.id: row for client, row in zip(block, rows, strict=True)})

        for client in clients:
            if client.rank not in broadcasts:
                broadcasts[client.rank] = adapter.narrow(state.params, client)
            broadcast = broadcasts[client.rank]
            tree = client_model(algorithm, adapter, state, client, broadcast)
            key = id(tree) if tree is broadcast else None
            group = groups.setdefault(key, [])
            group.append((client, tree))
            if len(group) == (width if key is None else max(width, TOGETHER)):
                run(groups.pop(key))
        for group in groups.values():
            run(group)
        return {client.id: found[client.id] for client in clients}

    return Runtime(train, evaluate)


def train_part(
    algorithm: Algorithm, adapter: Adapter, state: State, part: Sequence[Client], cohort: tuple[str, ...], room: Room
) -> Trained:
    """The local work of some of a round's clients, and the sum of what they send.

    Args:
        cohort: the ids of all of the round's clients, in sampling order.
    """
    total: Upload | None = None
    personal = staged(state.personal)
    clients: dict[str, Metrics] = {}
    failed: dict[str, str] = {}
    broadcast = sides.broadcast_payload(algorithm, state)
    start = replace(state, params=sides.broadcast_received(algorithm, broadcast, Site(state.seed, state.round, "")))

    def site_of(client: Client) -> Site:
        return Site(state.seed, state.round, client.id, cohort, max(1, len(client.batches)))

    for block, sites, updates in trained_blocks(algorithm, adapter, start, part, room, site_of):
        if isinstance(updates, FedloomError):
            failed.update({client.id: updates.message for client in block})
            continue
        for client, site, (delta, own, metrics) in zip(block, sites, updates, strict=True):
            try:
                if isinstance(metrics, RunError):
                    raise metrics
                weight = sides.weight_of(algorithm, client.weight)
                sent = sides.client_payload(algorithm, start.params, delta, weight, site)
                row = counted(state, broadcast, site, sent, weight, metrics)
                summand = sides.server_summand(algorithm, state.params, sent, weight, row, site)
            except FedloomError as error:
                failed[client.id] = error.message
                continue
            total = summand if total is None else algorithm.aggregate.add(total, summand)
            clients[client.id] = row
            if own:
                personal[client.id] = own
    if total is not None:
        total = total._replace(metrics=sides.summed(clients))
    return Trained(total, personal, clients, failed)


def client_model(
    algorithm: Algorithm, adapter: Adapter, state: State, client: Client, broadcast: Tree | None = None
) -> Tree:
    """What the client itself would use: a personalised method's own parameters, else the broadcast.

    `broadcast` is that in the client's rank, where it is known.
    """
    broadcast = adapter.narrow(state.params, client) if broadcast is None else broadcast
    own = state.personal.get(client.id)
    if own is None:
        own = algorithm.client.personal(broadcast)
    return algorithm.client.model(broadcast, own)


SKIPPED = "skipped_steps"  # of a client's metrics, where its loss is scaled
Updates = list[tuple[Tree, Tree, Metrics | RunError]]  # delta, personal state and metrics of each client of a block


def trained_blocks(
    algorithm: Algorithm,
    adapter: Adapter,
    state: State,
    cohort: Sequence[Client],
    room: Room,
    site_of: Callable[[Client], Site],
) -> Iterator[tuple[list[Client], list[Site], Updates | FedloomError]]:
    """The cohort's local work, block by block, or why a block has failed.

    Clients with the most local steps come first; ties keep the cohort's order. A block that does not fit in memory is
    tried again in halves.
    """
    left = sorted(cohort, key=lambda client: -len(client.batches))
    while left:
        block = left[: room.width if algorithm.client.cohort_axis else 1]
        sites = [site_of(client) for client in block]
        updates: Updates | FedloomError
        try:
            updates = train_block(algorithm, adapter, state, block, sites)
        except FedloomError as error:
            if error.code == OUT_OF_MEMORY and len(block) > 1:
                room.halve(len(block))
                continue
            updates = error
        left = left[len(block) :]
        yield block, sites, updates


def train_block(
    algorithm: Algorithm, adapter: Adapter, state: State, block: Sequence[Client], sites: Sequence[Site]
) -> Updates:
    """Local work of one block: delta, personal state and metrics of each client, in the block's order.

    A client whose loss was not finite has the reason in place of its metrics; the others of its block are not touched.

    Raises:
        RunError: a client of the block has no batch, or the block does not fit in memory (`OUT_OF_MEMORY`).
    """
    try:
        return _train_block(algorithm, adapter, state, block, sites)
    except (RuntimeError, MemoryError) as error:
        # weights that were being moved in place are nowhere now: that ends the run
        if not is_out_of_memory(error) or getattr(adapter, "in_place", False) or getattr(adapter, "in_step", False):
            raise
    let_go()  # here the exception is gone, and with it all that its frames held
    if len(block) > 1:
        raise RunError(f"out of memory with {len(block)} clients in one pass", code=OUT_OF_MEMORY)
    ways = [] if getattr(adapter, "recomputes", False) else ["runtime.gradient_checkpointing=true"]
    ways += ["a smaller client.per_device_train_batch_size (gradient_accumulation_steps makes up for it)"]
    raise RunError(
        f"out of memory with this client alone in a pass; less is needed with {', '.join(ways)} or a smaller "
        "data.max_length",
        code=OUT_OF_MEMORY,
    )


def _train_block(
    algorithm: Algorithm, adapter: Adapter, state: State, block: Sequence[Client], sites: Sequence[Site]
) -> Updates:
    start = time.perf_counter()
    empty = [client.id for client in block if not len(client.batches)]
    if empty:
        raise RunError(f"no training batches for {', '.join(empty)}", code="client.no_batches")
    update = algorithm.client
    device = next(iter(state.params.values())).device
    broadcasts = _shared([adapter.narrow(state.params, client) for client in block], block)
    params_C = stack(broadcasts)
    first = {id(broadcast): update.personal(broadcast) for broadcast in broadcasts}
    personal_C = stack([state.personal.get(c.id, first[id(b)]) for c, b in zip(block, broadcasts, strict=True)])
    work = update.init(params_C, personal_C, sites)
    record = Record(len(block), device)
    for index in range(len(block[0].batches)):
        active = [client for client in block if len(client.batches) > index]
        batches = [client.batches[index] for client in active]
        seeds = [seed_of(s.seed, s.round, s.client, f"step/{index}") for s in sites[: len(active)]]
        batch_CBT = collate(batches, seeds, device)
        record.batch(batches)
        with contextlib.nullcontext() if index else whole_graph(adapter.model):
            moved = update.step(record.watch(adapter.loss), prefix(work, len(active)), batch_CBT)
        if index == 0:
            record.after_first_step(moved)
        work = write_prefix(work, moved, len(active))
    record.at_the_end(work)
    delta_C, own_C = update.finish(params_C, work)
    seconds = time.perf_counter() - start
    return [
        (
            _widened(adapter, client_of(delta_C, i), client),
            {name: leaf.clone() for name, leaf in client_of(own_C, i).items()},
            metrics,
        )
        for i, (client, metrics) in enumerate(zip(block, record.metrics(seconds), strict=True))
    ]


def _widened(adapter: Adapter, delta: Tree, client: Client) -> Tree:
    told, moved = apart(delta, TOLD)
    return {**adapter.widen(moved, client), **told}


def has_own_model(update: ClientUpdate, params: Tree) -> bool:
    """Whether a client's own model differs from the broadcast; personal state may be for training alone."""
    personal = update.personal(params)
    return bool(personal) and update.model(params, personal) is not params


def _shared(trees: list[Tree], block: Sequence[Client]) -> list[Tree]:
    """The same tree for all when all have the same rank, so that `stack` expands instead of copying."""
    return [trees[0]] * len(trees) if len({client.rank for client in block}) == 1 else trees


def collate(batches: Sequence[Batch], seeds: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Clients' batches [B, T] -> one [C, B, T]; shorter ones are padded with rows and tokens that carry no label."""
    rows = max(batch["input_ids"].shape[0] for batch in batches)
    tokens = max(batch["input_ids"].shape[1] for batch in batches)
    out: dict[str, Tensor] = {}
    for name in batches[0]:
        filler = -100 if name == "labels" else 0
        padded = []
        for batch in batches:
            leaf = batch[name]
            short = (0, tokens - leaf.shape[1], 0, rows - leaf.shape[0]) if leaf.ndim == 2 else (0, rows - len(leaf))
            padded.append(F.pad(leaf, short, value=filler) if any(short) else leaf)
        out[name] = torch.stack(padded).to(device)
    out["seed"] = torch.tensor(seeds, dtype=torch.int64, device=device)
    return out


def counted(state: State, broadcast: Tree, site: Site, sent: Tree, weight: float, metrics: Metrics) -> dict[str, float]:
    """`metrics` with the bytes that the real codec would put on the wire, both ways."""
    up = sides.upload_bytes(sent, weight, metrics)
    return {**metrics, "bytes_up": float(up), "bytes_down": float(sides.broadcast_bytes(state, broadcast, site))}


class Record:
    """Watches a block's losses and counts what it works on. Losses are summed on the device, read once at the end."""

    def __init__(self, num_clients: int, device: torch.device) -> None:
        self.loss_C = torch.zeros(num_clients, dtype=torch.float64, device=device)
        self.count_C = torch.zeros(num_clients, dtype=torch.float64, device=device)
        self.bad_C = torch.zeros(num_clients, dtype=torch.float64, device=device)  # first step with a non-finite loss
        self.overflown: list[list[str]] = [[] for _ in range(num_clients)]  # what the first step made of parameters
        self.rows: list[dict[str, float]] = [
            {"tokens": 0.0, "padded_tokens": 0.0, "examples": 0.0, "steps": 0.0} for _ in range(num_clients)
        ]

    def batch(self, batches: Sequence[Batch]) -> None:
        tokens = max(batch["input_ids"].shape[1] for batch in batches)
        num_rows = max(batch["input_ids"].shape[0] for batch in batches)
        sides = sum(name.endswith("_ids") for name in batches[0])  # a pair of answers goes through the model as two
        for row, batch in zip(self.rows, batches, strict=False):
            row["tokens"] += float(batch["lengths"].sum())
            row["padded_tokens"] += tokens * num_rows * sides
            row["examples"] += batch["input_ids"].shape[0]
            row["steps"] += 1

    def watch(self, loss: LossFn) -> LossFn:
        def watched(tree_C: Tree, batch_CBT: Batch) -> Tensor:
            loss_C = loss(tree_C, batch_CBT)
            count_C = (batch_CBT["labels"][:, :, 1:] != -100).flatten(1).sum(1).double()
            with torch.no_grad():
                sums_C = loss_C.detach().double() * count_C
                if len(self.loss_C) == 1:  # an update may use the axis for examples
                    sums_C, count_C = sums_C.sum(0, keepdim=True), count_C.sum(0, keepdim=True)
                self.loss_C[: len(sums_C)] += sums_C
                self.count_C[: len(count_C)] += count_C
                bad_C = self.bad_C[: len(sums_C)]
                step = self.rows[0]["steps"]
                bad_C.copy_(torch.where(torch.isfinite(sums_C) | (bad_C > 0), bad_C, torch.full_like(bad_C, step)))
            return loss_C

        watched.__wrapped__ = loss  # type: ignore[attr-defined]  # for what is no training: inspect.unwrap
        return watched

    def after_first_step(self, state: LocalState) -> None:
        """A gradient that is not finite shows here, whatever the method: finite losses do not tell of it."""
        for client, names in enumerate(not_finite_C(state)):
            self.overflown[client] = names

    def at_the_end(self, state: LocalState) -> None:
        """Steps that were not made, where the loss is scaled."""
        scaling = scaling_in(state)
        for row, skipped in zip(self.rows, [] if scaling is None else scaling.skipped_C.tolist(), strict=False):
            row[SKIPPED] = skipped

    def metrics(self, seconds: float) -> list[dict[str, float] | RunError]:
        """One row per client; a block's seconds are shared out by tokens."""
        whole = sum(row["padded_tokens"] for row in self.rows) or 1.0
        out: list[dict[str, float] | RunError] = []
        sums = zip(self.rows, self.loss_C.tolist(), self.count_C.tolist(), self.bad_C.tolist(), strict=True)
        hint = "lower client.learning_rate or set client.max_grad_norm"
        for (row, loss, count, bad), names in zip(sums, self.overflown, strict=True):
            if names and bad != 1:
                some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                said = f"its loss was finite, but after its first local step {some} is not: a gradient overflowed"
                out.append(RunError(said, hint, "client.nonfinite"))
            elif bad:
                out.append(RunError(f"its loss was not finite at local step {bad:.0f}", hint, "client.nonfinite"))
            elif row.get(SKIPPED) == row["steps"]:
                said = f"the gradient of each of its {row['steps']:.0f} local steps overflowed in float16"
                out.append(RunError(said, "dtype: bfloat16 or float32, or more local steps", "client.nonfinite"))
            else:
                if row.get(SKIPPED):
                    log.info("float16: %d of %d local steps overflowed and were not made", row[SKIPPED], row["steps"])
                share = row["padded_tokens"] / whole
                out.append({**row, "loss_sum": loss, "target_tokens": count, "seconds": seconds * share})
        return out
