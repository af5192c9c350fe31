"""Out of memory: fewer clients in a pass from then on, the same numbers, and a reason where one alone is too much."""

from __future__ import annotations

import pytest
import torch
from tests.small import clients, fedavg, gap, llama, small_lora

from fedloom.adapters import seed_space, with_recompute
from fedloom.clients import sgd_client, zo_client
from fedloom.optimizers import adamw
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import ClientSite, Room, batched, buffered, loopback, sequential

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "linux": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000 bytes."),
    "python": MemoryError,
}


def hungry(adapter, most_rows, error=ERRORS["cuda"]):
    """The adapter, whose model has room for so many rows in its second block; what it was asked for is noted."""
    asked = []

    def look(layer, args):
        asked.append(args[0].shape[0])
        if args[0].shape[0] > most_rows:
            raise error()

    adapter.model.model.layers[1].mlp.register_forward_pre_hook(look)
    return adapter, asked


def two_rounds(adapter, runtime, cohort, update=None):
    algorithm = fedavg(update or sgd_client(adamw(1e-2)))
    state, reports = initial_state(algorithm, adapter, 3), []
    for _ in range(2):
        state, report = run_round(algorithm, adapter, runtime, state, cohort)
        reports.append(report)
    return state, reports


@pytest.mark.parametrize("error", ERRORS)
def test_a_block_that_does_not_fit_is_halved_and_stays_so(error):
    said: list[str] = []
    want, _ = two_rounds(small_lora(), sequential(), clients())
    adapter, asked = hungry(small_lora(), 6, ERRORS[error])  # two clients of three rows
    room = Room(8, said.append)
    state, reports = two_rounds(adapter, batched(room), clients())
    assert gap(want.params, state.params) < 1e-10
    assert not any(report.failed for report in reports)
    assert said == ["out of memory with 5 clients in one pass: 2 from now on"]
    assert room.width == 2
    assert sum(rows > 6 for rows in asked) == 1, "what was too much once is not tried again"


def test_it_is_halved_until_it_fits():
    said: list[str] = []
    adapter, _ = hungry(small_lora(), 3)
    state, _ = two_rounds(adapter, batched(Room(4, said.append)), clients())
    assert [line[-13:] for line in said] == ["2 from now on", "1 from now on"]
    assert gap(two_rounds(small_lora(), sequential(), clients())[0].params, state.params) < 1e-10


def test_a_pass_that_fails_backward_leaves_nothing_on():
    adapter = with_recompute(small_lora())
    layer = adapter.model.model.layers[2].mlp
    seen = []

    def second(_, args):
        seen.append(args[0].shape[0])
        if len(seen) == 2:  # the first to run again
            raise ERRORS["cuda"]()

    layer.register_forward_pre_hook(second)
    state, reports = two_rounds(adapter, batched(Room(2, lambda text: None)), clients())
    assert not any(report.failed for report in reports)
    assert gap(two_rounds(small_lora(), sequential(), clients())[0].params, state.params) < 1e-10


def test_a_client_that_is_too_much_alone_fails_with_a_way_out():
    cohort = clients()
    big = next(client for client in cohort if max(len(b["labels"]) for b in client.batches) == 3)
    few = [client for client in cohort if max(len(b["labels"]) for b in client.batches) < 3]
    assert few
    for wrap, offered in ((lambda adapter: adapter, True), (with_recompute, False)):
        adapter, _ = hungry(wrap(small_lora()), 2)
        state, reports = two_rounds(adapter, batched(Room(8, lambda text: None)), [*few, big])
        assert list(reports[0].failed) == [big.id]
        reason = reports[0].failed[big.id]
        assert "out of memory" in reason and "max_length" in reason and "per_device_train_batch_size" in reason
        assert ("gradient_checkpointing=true" in reason) is offered
        assert gap(two_rounds(small_lora(), sequential(), few)[0].params, state.params) < 1e-10


def test_asynchronous_and_sent_clients_do_the_same():
    cohort = clients()

    def asynchronous(width):
        return buffered(width, buffer_size=3, concurrency=5, duration=lambda client: float(len(client.batches)))

    want, _ = two_rounds(small_lora(), asynchronous(1), cohort)
    adapter, _ = hungry(small_lora(), 6)
    room = Room(8, lambda text: None)
    got, _ = two_rounds(adapter, asynchronous(room), cohort)
    assert room.width == 2 and gap(want.params, got.params) < 1e-10

    algorithm = fedavg(sgd_client(adamw(1e-2)))
    homes = {
        c.id: ClientSite(c.id, lambda: (algorithm, hungry(small_lora(), 2)[0]), lambda round, c=c: c, {})
        for c in cohort
    }
    far = loopback({i: home.serve for i, home in homes.items()})
    _, report = run_round(algorithm, small_lora(), far, initial_state(algorithm, small_lora(), 3), cohort)
    assert report.failed and all("out of memory" in reason for reason in report.failed.values())


def test_other_failures_are_not_taken_for_it():
    adapter, asked = hungry(small_lora(), 6, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        two_rounds(adapter, batched(8), clients())
    assert len(asked) == 1


def test_weights_that_are_moved_in_place_end_the_run():
    adapter, _ = hungry(seed_space(llama(dtype=torch.float32), num_seeds=4, seed=1), 0)
    with pytest.raises(torch.OutOfMemoryError):
        two_rounds(adapter, sequential(), clients(1), zo_client(1e-3))
