"""Processes that share one run's work, one device each, on one host or several: who is who, and how they talk.

Process 0 leads. Messages are bytes (`fedloom.wire`); nothing is pickled. They go over gloo, and sums of tensors over
NCCL where they lie on a GPU. Whoever waits looks around while it does: a process that has died or given up ends the
others within seconds, and not when a collective's time is over.

The one place that knows `torch.distributed`.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fedloom.errors import FedloomError, RunError, TimeoutOrTooFewClients, UserError

__all__ = ["Over", "Team", "device_of", "host", "join", "launched_by_torchrun", "leave", "meet", "member"]

_OVER = "over"  # the store's key for why it is over
_FOR_EVER = datetime.timedelta(days=30)  # whoever leads may train an arm alone for days; deaths are seen otherwise
_LOOK_SECONDS = 0.2
_LONGEST_NAP_SECONDS = 0.005
MEET_SECONDS = 600.0


class Over(FedloomError):
    """Another process has ended the run, and said why itself."""

    code = "processes.over"


class Team:
    """This process among `size` ones."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """`watch` is called while waiting, and raises if a process that this one has started is gone."""
        self.store, self.rank, self.size = store, rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.watch = watch
        self.device = torch.device("cpu")  # of this process, once all have met
        self._looked = 0.0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # ---- messages ----------------------------------------------------------------------------------------------------

    def broadcast(self, raw: bytes = b"") -> bytes:
        """The leader's bytes, at every process."""
        size = torch.tensor([len(raw)])
        self._wait(dist.broadcast(size, 0, async_op=True))
        data = _padded(raw, int(size))
        self._wait(dist.broadcast(data, 0, async_op=True))
        return raw if self.leads else _bytes_of(data[: int(size)])

    def all_gather(self, raw: bytes) -> list[bytes]:
        """The bytes of every process, at every process; few of them, since each is padded to the longest."""
        sizes = self.numbers(len(raw))
        mine = _padded(raw, max(sizes))
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(dist.all_gather(found, mine, async_op=True))
        return [_bytes_of(one[:size]) for one, size in zip(found, sizes, strict=True)]

    def gather(self, raw: bytes) -> list[bytes]:
        """The bytes of every process, at the leader; nothing elsewhere."""
        sizes = self.numbers(len(raw))
        mine = _padded(raw, max(sizes))
        found = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else None
        self._wait(dist.gather(mine, found, 0, async_op=True))
        return [_bytes_of(one[:size]) for one, size in zip(found or [], sizes, strict=False)]

    def scatter(self, raws: Sequence[bytes] = ()) -> bytes:
        """To each process its own of the leader's bytes."""
        sizes = torch.tensor([len(raw) for raw in raws] or [0] * self.size)
        self._wait(dist.broadcast(sizes, 0, async_op=True))
        longest = int(sizes.max())
        mine = _padded(b"", longest)
        parts = [_padded(raw, longest) for raw in raws] if self.leads else None
        self._wait(dist.scatter(mine, parts, 0, async_op=True))
        return _bytes_of(mine[: int(sizes[self.rank])])

    def numbers(self, mine: int) -> list[int]:
        """A number of every process, at every process."""
        found = [torch.tensor([0]) for _ in range(self.size)]
        self._wait(dist.all_gather(found, torch.tensor([mine]), async_op=True))
        return [int(one) for one in found]

    def barrier(self) -> None:
        self.numbers(0)

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All processes in a line, as sharding wants them; every process must ask for it at the same point."""
        return init_device_mesh(self.device.type, (self.size,))

    def sum(self, buffer: Tensor) -> None:
        """`buffer` becomes the sum of all processes' buffers: one all-reduce."""
        self._wait(dist.all_reduce(buffer, async_op=True))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        """Let the others know that they wait for nothing; the first reason stands."""
        try:
            self.store.compare_set(_OVER, "", json.dumps({"rank": self.rank, "why": why}))
        except Exception:  # whoever keeps the store is gone: the others see that themselves
            return

    def given_up(self) -> tuple[int, str] | None:
        """(process, why), if one has."""
        if not self.store.check([_OVER]):
            return None
        said = json.loads(self.store.get(_OVER))
        return int(said["rank"]), str(said["why"])

    def look(self, *, now: bool = False) -> None:
        """See whether all are still there.

        Raises:
            RunError, Over: they are not.
        """
        if not now and time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        try:
            over = self.given_up()
        except Exception as error:
            raise Over("the process that leads is gone") from error
        if over is not None:
            if not self.leads:
                raise Over(f"process {over[0]} of {self.size} has ended the run: {over[1]}")
            raise RunError(f"process {over[0]} of {self.size}: {over[1]}", code="processes.failed")
        self.watch()
        self._looked = time.monotonic()

    def _wait(self, work: Any) -> None:
        """Until it is done, so that signals are heard and deaths are seen."""
        nap = 0.0
        while not work.is_completed():
            time.sleep(nap)
            nap = min(_LONGEST_NAP_SECONDS, nap + 2e-5)
            if nap == _LONGEST_NAP_SECONDS:
                self.look()
        try:
            work.wait()
        except RuntimeError as error:
            self.sees_why()
            raise RunError(
                f"the connection to another process was lost ({str(error).splitlines()[0][:200]})",
                code="processes.lost",
            ) from error

    def sees_why(self) -> None:
        """After a connection has broken: who is gone, if that can be told in a moment."""
        for _ in range(10):
            self.look(now=True)
            time.sleep(0.1)


def _padded(raw: bytes, size: int) -> Tensor:
    """As a tensor of at least one byte."""
    data = torch.zeros(max(1, size), dtype=torch.uint8)
    if raw:
        data[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return data


def _bytes_of(data: Tensor) -> bytes:
    return bytes(data.numpy().tobytes())


# ---- meeting ---------------------------------------------------------------------------------------------------------


def launched_by_torchrun() -> bool:
    """Whether this process is one of several that `torchrun` (or a program that sets the same variables) started."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in wanted) and int(os.environ["WORLD_SIZE"]) > 1


def join() -> Team:
    """The team that torchrun's variables tell of, once all are there."""
    store, rank, size = next(rendezvous("env://"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    team = Team(PrefixStore("fedloom", store), rank, size, local_rank, local_size)
    meet(team)
    return team


def host(size: int) -> tuple[Any, int]:
    """(the store, the port) of a team of so many processes on this host, whose leader this process is."""
    store = TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
    return store, int(store.port)


def member(store: Any, rank: int, size: int, watch: Callable[[], None] = lambda: None) -> Team:
    """One of the processes of a team on one host; `meet` connects it.

    Args:
        store: the leader's, or its port.
    """
    if isinstance(store, int):
        store = TCPStore("127.0.0.1", store, size, False)
    return Team(PrefixStore("fedloom", store), rank, size, rank, size, watch)


def meet(team: Team, seconds: float = MEET_SECONDS) -> None:
    """Wait for all, then connect everyone with everyone, each on its own device.

    Raises:
        TimeoutOrTooFewClients: some did not come.
        RunError: one has died or given up meanwhile.
        UserError: there are fewer GPUs than processes on this host.
    """
    team.device = device = device_of(team)
    team.store.set(f"here/{team.rank}", b"1")
    keys = [f"here/{rank}" for rank in range(team.size)]
    until = time.monotonic() + seconds
    while missing := [key for key in keys if not team.store.check([key])]:
        team.look()
        if time.monotonic() > until:
            names = ", ".join(key.removeprefix("here/") for key in missing)
            raise TimeoutOrTooFewClients(
                f"of {team.size} processes, {names} did not come within {seconds:g} s",
                "the log of each host says why; MASTER_ADDR and MASTER_PORT must be reachable from all",
                "processes.meet",
            )
        time.sleep(0.02)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=PrefixStore("group", team.store),
        rank=team.rank,
        world_size=team.size,
        timeout=_FOR_EVER,
    )


def leave() -> None:
    """Close the connections."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(team: Team | None) -> torch.device:
    """This process's own: a GPU for each where there are some, else the CPU.

    Raises:
        UserError: more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if team is None:
        return torch.device("cuda")
    there = torch.cuda.device_count()
    if team.local_size > there:
        raise UserError(
            f"{team.local_size} processes on this host, and {there} GPU{'s' * (there != 1)}: each needs its own",
            hint=f"--nproc {there}" if there > 1 else "without --nproc: runtime.clients_per_batch fills one GPU",
            code="processes.devices",
        )
    return torch.device("cuda", team.local_rank)
