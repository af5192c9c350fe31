"""A run over several processes: how they are started, watched and ended, and what all but the first one do.

`fedloom run RECIPE --nproc N` is the leading process and starts N - 1 others on its host; `torchrun -m fedloom run
RECIPE` starts all of them, on one host or several. Process 0 alone reads the recipe, writes the run folder and speaks;
the others are told the recipe, open the same data and model, and do their part of what it asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch

from fedloom import wire
from fedloom.errors import FedloomError, RunError, UserError
from fedloom.runtimes.distributed import Work, follow
from fedloom.runtimes.lead import END, Follower, Lead, Order
from fedloom.runtimes.team import Over, Team, device_of, host, join, launched_by_torchrun, leave, meet, member
from fedloom.study.build import algorithm_of, population_of, population_weight_of, sharded
from fedloom.study.costs import peak_memory_bytes, reset_peak_memory
from fedloom.study.recipe import Recipe
from fedloom.study.session import Session, open_session
from fedloom.study.team_tasks import TASK_WORK

__all__ = ["Processes", "check_processes", "follow_leader", "follows", "together"]

PROCESS = "FEDLOOM_PROCESS"  # RANK/SIZE/PORT, of a process that `--nproc` has started
_HELLO = "hello"
_PATIENCE_SECONDS = 10.0


def check_processes(recipe: Recipe, size: int) -> None:
    """What is known before anything is loaded or started.

    Raises:
        UserError: the runtime of this recipe is for one process, or for several.
    """
    if size == 1 and recipe.runtime.shard_base:
        raise UserError(
            "runtime.shard_base gives each of several processes a part of the base, and this is one process",
            hint="fedloom run RECIPE --nproc 2, or runtime.shard_base=false",
            code="processes.shards",
        )
    if recipe.runtime.shard_offload and device_of(None).type == "cpu":
        raise UserError(
            "runtime.shard_offload lets parts of the base wait in the host's memory, and without a GPU they are there",
            hint="runtime.shard_offload=false",
            code="processes.shards",
        )
    kind = recipe.runtime.kind
    if size > 1 and kind in ("buffered", "loopback"):
        why = {
            "buffered": "its clients start one by one on a simulated clock",
            "loopback": "its client objects keep their personal state to themselves",
        }[kind]
        raise UserError(
            f"runtime.kind {kind} is for one process ({why}), and this run has {size}",
            hint="runtime.kind=batched, or without --nproc",
            code="processes.runtime",
        )


# ---- the leader ------------------------------------------------------------------------------------------------------


class Processes:
    """The processes of a run, from the leader's side; started when the recipe is known to be for them."""

    def __init__(self, stack: contextlib.ExitStack, nproc: int | None) -> None:
        """What is started is ended when `stack` is left."""
        self.stack, self.nproc = stack, nproc
        # under torchrun the others are there already, and wait
        self.lead = stack.enter_context(together(nproc)) if launched_by_torchrun() else None

    @property
    def option(self) -> str:
        """Of the command that goes on with the run."""
        return f" --nproc {self.nproc}" if (self.nproc or 1) > 1 else ""

    def open(self, recipe: Recipe, smoke: bool) -> Session:
        """`open_session`, in every process.

        Raises:
            UserError: as `open_session`; or the recipe is for one process, or the processes have other data, another
                model or another version.
        """
        check_processes(recipe, self.lead.team.size if self.lead is not None else self.nproc or 1)
        if self.lead is None:
            self.lead = self.stack.enter_context(together(self.nproc))
        return _opened_by_all(self.lead, recipe, smoke)


@contextlib.contextmanager
def together(nproc: int | None) -> Iterator[Lead | None]:
    """The leader's side of so many processes while it lasts; None where there is one only.

    Raises:
        UserError: torchrun has started the processes already, or `nproc` is below 1.
        RunError: a process could not be started.
    """
    if launched_by_torchrun():
        if nproc is not None:
            raise UserError(
                f"--nproc {nproc}, but torchrun has started {os.environ['WORLD_SIZE']} processes already",
                hint="torchrun --nproc-per-node N -m fedloom run RECIPE, or fedloom run RECIPE --nproc N",
                code="processes.twice",
            )
        with _leading(join(), []) as lead:
            yield lead
        return
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc {nproc}, must be 1 or more", code="processes.number")
    if nproc is None or nproc == 1:
        yield None
        return
    store, port = host(nproc)
    children = [_start(rank, nproc, port) for rank in range(1, nproc)]
    team = member(store, 0, nproc, lambda: _watch(children, nproc))
    with _leading(team, children) as lead:
        meet(team)
        yield lead


@contextlib.contextmanager
def _leading(team: Team, children: Sequence[subprocess.Popen[bytes]]) -> Iterator[Lead]:
    lead = Lead(team, peak_memory_bytes)
    try:
        yield lead
        lead.end()
        _end(children, _PATIENCE_SECONDS)
    except BaseException as error:
        team.give_up(error.message if isinstance(error, FedloomError) else "stopped")
        _end(children, 0.0 if isinstance(error, KeyboardInterrupt) else 2.0)
        if children:  # who is not one of them may still be at work, and a connection to it would be waited for
            leave()
        raise
    leave()


def _start(rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
    """In a process group of its own: what a terminal's Ctrl-C means is the leader's to say."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedloom", "run"],
        env={**os.environ, PROCESS: f"{rank}/{size}/{port}"},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if _has_file(sys.stderr) else subprocess.DEVNULL,
        process_group=0,
    )


def _has_file(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (OSError, AttributeError, ValueError):
        return False


def _watch(children: Sequence[subprocess.Popen[bytes]], size: int) -> None:
    """Raise RunError if one is gone."""
    for rank, child in enumerate(children, start=1):
        code = child.poll()
        if code is None:
            continue
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            how += " (the system does so when memory runs out)" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with exit code {code}"
        raise RunError(f"process {rank} of {size} (pid {child.pid}) {how}", code="processes.died")


def _end(children: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    until = time.monotonic() + patience
    for how in (lambda child: None, lambda child: child.terminate(), lambda child: child.kill()):
        for child in children:
            if child.poll() is None:
                how(child)
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.05, until - time.monotonic()))
        until = time.monotonic() + 2.0


def _opened_by_all(lead: Lead | None, recipe: Recipe, smoke: bool) -> Session:
    if lead is None:
        return open_session(recipe, smoke=smoke)
    values = recipe.model_dump(mode="json")
    lead.team.broadcast(wire.encode(_HELLO, {"recipe": values, "smoke": smoke}))
    session = open_session(recipe, smoke=smoke, team=lead.team)
    session.lead = lead
    told = [json.loads(raw) for raw in lead.team.all_gather(json.dumps(_identity(session)).encode())]
    for rank, one in enumerate(told):
        for what, value in one.items():
            if value != told[0][what]:
                raise UserError(
                    f"process {rank} has another {what} than process 0: {value} and {told[0][what]}",
                    hint="all hosts need the same files, the same versions and a dtype that all have (dtype=float32)",
                    code="processes.differ",
                )
    if recipe.runtime.shard_base:
        session.flops = session.training_flops()
        lead.shards = sharded(lead.team, session.adapter, session.recipe)
    return session


def _identity(session: Session) -> dict[str, Any]:
    weights = hashlib.sha256()
    for name, leaf in session.base.model.named_parameters():  # a few of each, since all would be read from disk
        some = leaf.detach().flatten()[:: max(1, leaf.numel() // 16)][:16].float().cpu()
        weights.update(name.encode() + some.contiguous().numpy().tobytes())
    return {
        "data": session.data_digest(),
        "model": weights.hexdigest(),
        "dtype": str(session.base.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "fedloom": version("fedloom") if _installed() else "",
    }


def _installed() -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version("fedloom")
    except PackageNotFoundError:
        return False
    return True


# ---- the others ------------------------------------------------------------------------------------------------------


def follows() -> bool:
    """Whether this process is one that does what another one asks."""
    return PROCESS in os.environ or (launched_by_torchrun() and int(os.environ["RANK"]) > 0)


def follow_leader() -> int:
    """Do the leader's work until it lets go; the exit code. What goes wrong is told to the leader, who says it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("fedloom").setLevel(logging.ERROR)
    logging.getLogger("fedloom.data.progress").setLevel(logging.ERROR)
    team: Team | None = None
    try:
        if PROCESS in os.environ:
            _end_with_parent()
            rank, size, port = map(int, os.environ[PROCESS].split("/"))
            team = member(port, rank, size)
            meet(team)
        else:
            team = join()
        _follow(team)
        leave()
    except Over:
        return 0
    except Exception as error:
        if team is None:
            traceback.print_exc()
            return 1
        if os.environ.get("FEDLOOM_DEBUG"):
            traceback.print_exc()
        team.give_up(error.message if isinstance(error, FedloomError) else f"{type(error).__name__}: {error}")
        return 1
    return 0


def _end_with_parent() -> None:
    """However the leader dies, this process does not stay behind."""
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _follow(team: Team) -> None:
    hello = wire.decode(team.broadcast())
    if hello.kind == END:
        return
    recipe = Recipe.model_validate(hello.header["recipe"])
    follower = Follower(team, team.device, peak_memory_bytes)
    session = open_session(recipe, smoke=bool(hello.header["smoke"]), team=team)
    team.all_gather(json.dumps(_identity(session)).encode())
    if recipe.runtime.shard_base:
        follower.shards = sharded(team, session.adapter, session.recipe)
    session.room.hear = follower.notes.append
    recipe, federation = session.recipe, session.federation
    evaluations = session.measures().table()
    known: dict[str, Work] = {}

    def work_of(arm: str) -> Work:
        if arm not in known:
            known.clear()
            reset_peak_memory()
            weight = population_weight_of(recipe, federation)
            algorithm = algorithm_of(recipe, "federated" if arm == "base" else arm, population_weight=weight)
            population = population_of(federation, recipe, arm)
            known[arm] = Work(algorithm, session.adapter, population.open, evaluations, session.room)
        return known[arm]

    def asked(kind: str) -> Callable[[Work, Order], Any]:
        return lambda own, order: TASK_WORK[kind](session, own, order)

    follow(follower, work_of, {kind: asked(kind) for kind in TASK_WORK})
