"""Settings with which a run fits into the memory there is, with what it takes then.

They are reckoned on the line through the passes that were made; gradient checkpointing and, on a GPU, activation
offload are tried on small ones. Bytes of a quantised base are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from fedloom.data.pair_batches import Pairs
from fedloom.errors import FedloomError
from fedloom.models.quantised import check_installed, largest_layer_bytes, packed_bytes, stored_bytes
from fedloom.study.build import offloading, recomputing
from fedloom.study.forecast import Cost, Forecast, Suggestion, line_through
from fedloom.study.objections import objections
from fedloom.study.passes import ArmWork, Step
from fedloom.study.probe import Probe, Trained, bytes_on, largest_of
from fedloom.types import Adapter

if TYPE_CHECKING:
    from fedloom.study.session import Session

__all__ = ["ways_to_fit"]

Works = Callable[[int], Mapping[str, ArmWork]]


def ways_to_fit(
    session: Session, probe: Probe, trained: Trained, found: Forecast, works: Works
) -> Iterator[Suggestion]:
    """Each alone; where another part than training is too large, only a smaller base helps."""
    limit = found.limit
    if limit is None:
        return
    yield from packed_bases(session, found, limit)
    if replace(found.memory, training=0).peak > limit:
        return
    _, largest = largest_of(works(trained.width))

    def peak(training: int) -> int:
        return replace(found.memory, training=training).peak

    def time(width: int) -> float | None:
        if not found.whole:
            return None
        trains = sum((trained.step.of(work.passes) for work in works(width).values()), Cost()).wall
        now = sum((trained.step.of(work.passes) for work in works(trained.width).values()), Cost()).wall
        return found.time.wall - now + trains

    runtime = session.recipe.runtime
    narrow = largest
    if runtime.kind in ("batched", "buffered") and trained.width > 1:
        width = trained.width
        while width > 1:
            width -= -(-width // 4)
            _, narrow = largest_of(works(width))
            if peak(trained.bytes_of(narrow)) <= limit:
                yield Suggestion(
                    "fewer clients in a pass",
                    (f"runtime.clients_per_batch={width}",),
                    peak(trained.bytes_of(narrow)),
                    time(width),
                )
                break
    tried = {"gradient_checkpointing": (recomputing, "blocks run again instead of being kept")}
    if session.base.device.type != "cpu":
        tried["activation_offload"] = offloading, "activations wait in the host's memory"
    if runtime.gradient_checkpointing or runtime.activation_offload:
        tried = {}
    for key, (way, about) in tried.items():
        again = in_another_way(way, session, probe, trained, works)
        if again is None:
            continue
        line, slower = again
        training = bytes_on(line[0], trained.bytes_per_client, line[1], largest)
        if peak(training) <= limit:
            whole = found.time.wall + (slower - 1) * found.parts["training"].wall if found.whole else None
            yield Suggestion(about, (f"runtime.{key}=true",), peak(training), whole)
    yield from _smaller(session, trained, narrow, peak, limit, found)


def _smaller(
    session: Session, trained: Trained, narrow: Step, peak: Callable[[int], int], limit: int, found: Forecast
) -> Iterator[Suggestion]:
    """Smaller batches with accumulation, and shorter rows; with one client in a pass where more do not fit."""
    client, kind = session.recipe.client, session.recipe.runtime.kind
    alone = ("runtime.clients_per_batch=1",) if kind in ("batched", "buffered") and trained.width > 1 else ()
    size, pieces = client.per_device_train_batch_size, client.gradient_accumulation_steps
    rows = -(-narrow.rows // narrow.pieces)
    whole = found.time.wall if found.whole else None
    while size % 2 == 0:
        size, pieces, rows = size // 2, 2 * pieces, -(-rows // 2)
        needs = trained.bytes_of(narrow._replace(rows=rows, pieces=1))
        if peak(needs) <= limit:
            yield Suggestion(
                "the same steps, each batch in pieces",
                (
                    f"client.per_device_train_batch_size={size}",
                    f"client.gradient_accumulation_steps={pieces}",
                    *alone,
                ),
                peak(needs),
                whole,
            )
            break
    train = session.federation.pooled("train")
    lengths = Pairs(train).lengths if session.federation.paired else train.lengths
    tokens = narrow.tokens
    while tokens > 32:
        tokens = tokens * 3 // 4
        needs = trained.bytes_of(narrow._replace(tokens=tokens))
        if peak(needs) <= limit:
            cut = int((lengths > tokens).sum())
            yield Suggestion(
                f"shorter rows; cuts {cut:,} of {len(lengths):,}",
                (f"data.max_length={tokens}", *alone),
                peak(needs),
            )
            break


def packed_bases(session: Session, found: Forecast, limit: int) -> Iterator[Suggestion]:
    """The frozen base in 8 or 4 bits, where that can be loaded here and the recipe allows it; counted, not tried."""
    if session.recipe.quantization != "none":
        return
    model = session.base.model
    for kind, bits in (("int8", 8), ("nf4", 4)):
        try:
            check_installed(kind)
        except FedloomError:
            return
        if [*objections(session.recipe.model_copy(update={"quantization": kind}))]:
            continue
        saved = stored_bytes(model) - packed_bytes(model, kind)
        memory = replace(
            found.memory,
            resident=found.memory.resident - saved,
            loading=found.memory.loading - saved,
            training=found.memory.training + largest_layer_bytes(model),
        )
        if memory.peak <= limit:
            yield Suggestion(
                f"the frozen base in {bits} bits: its bytes are counted, its speed not tried",
                (f"quantization={kind}",),
                memory.peak,
            )


def in_another_way(
    way: Callable[[Adapter], AbstractContextManager[None]],
    session: Session,
    probe: Probe,
    trained: Trained,
    works: Works,
) -> tuple[tuple[float, float], float] | None:
    """With the blocks run in this way: the line of a pass's bytes by tokens, and how much slower it is.

    None where this adapter or model has no such way.
    """
    arm, step = largest_of(works(trained.width))
    one = step._replace(ids=step.ids[:1])
    rows = max(1, -(-step.rows // step.pieces) // 4)
    took: list[tuple[float, float]] = []
    try:
        with way(session.adapter):
            for many in dict.fromkeys((1, rows)):
                clients = probe.passes_of(arm, one, many)
                probe.meter.begin()
                passes, cost = probe.make(clients)
                took.append((passes.padded, max(0.0, float(probe.meter.added - trained.bytes_per_client))))
        _, plain = probe.make(clients)
    except FedloomError:
        return None
    line = line_through(took) if len(took) > 1 else (0.0, took[0][1] / took[0][0])
    return line, max(1.0, cost.cpu / max(plain.cpu, 1e-9))
