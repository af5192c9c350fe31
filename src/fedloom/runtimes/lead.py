"""What the leading process tells the others, and what all say of their parts of one piece of work.

A piece of work is one exchange: the leader says what it is about and who does which part, everyone does its own, and
everyone says how that went before anything else happens. So nobody waits for a process that has failed, and what comes
next (a sum, a gathering) is known to all from the same words.

The state lies with the leader alone: parameters travel when they are not those sent last, personal trees go to whoever
trains or evaluates the client and come back with its result. Checkpoints are therefore whole, and a resumed run may
have another number of processes.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from fedloom import wire
from fedloom.errors import FedloomError, RunError
from fedloom.runtimes.shards import Shards
from fedloom.runtimes.team import Team
from fedloom.types import State, Tree

__all__ = ["Follower", "Lead", "Order", "Said", "trees_from", "trees_to"]

END, ALONE = "end", "alone"

T = TypeVar("T")


class Order(NamedTuple):
    """A piece of work as a process hears of it."""

    kind: str
    key: str  # which algorithm, adapter and clients it is about
    state: State  # without the server's part, and with the personal trees of this process's clients alone
    part: list[Any]  # this process's own, as JSON values
    about: Mapping[str, Any]  # what is said to all


@dataclass
class Said:
    """What a process says of its part."""

    rank: int
    result: Any = None  # JSON
    error: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)  # for people
    peak_memory: int = 0


class _Process:
    """What leader and followers do alike: their own part, and telling of it."""

    def __init__(self, team: Team, peak_memory: Callable[[], int]) -> None:
        self.team = team
        self.peak_memory = peak_memory
        self.notes: list[str] = []
        self.shards: Shards | None = None  # where the base is in parts, so that all must make the same passes

    def do(self, work: Callable[[], Any]) -> list[Said]:
        """Do this process's part, whose result is JSON, and hear of all; whether to go on is the caller's to see.

        What goes wrong here is told to all first; at the leader it is then raised as it was.
        """
        mine = Said(self.team.rank)
        wrong: Exception | None = None
        try:
            mine.result = work()
        except Exception as error:
            if self.shards is not None and not isinstance(error, FedloomError):
                raise self._out_of_step(error) from error
            wrong = error
            mine.error = _error_told(error)
        if self.shards is not None:
            try:
                self.shards.drain()
            except RuntimeError as error:
                raise self._out_of_step(error) from error
        mine.notes, self.notes = self.notes, []
        mine.peak_memory = self.peak_memory()
        told = [Said(**json.loads(raw)) for raw in self.team.all_gather(json.dumps(vars(mine)).encode())]
        if wrong is not None and self.team.leads:
            raise wrong
        return told

    def _out_of_step(self, error: Exception) -> FedloomError:
        """A pass has broken off here, or there: the others are in the middle of a block, so the run is over."""
        self.team.sees_why()
        self.team.give_up(_error_told(error)["message"])
        return RunError(
            f"a pass over the base's shards broke off: {_error_told(error)['message']}",
            hint="where memory ended: a smaller client.per_device_train_batch_size or data.max_length, or "
            "runtime.gradient_checkpointing=true; then --resume",
            code="shards.broken",
        )


class Lead(_Process):
    """The leader's side."""

    def __init__(self, team: Team, peak_memory: Callable[[], int] = lambda: 0) -> None:
        super().__init__(team, peak_memory)
        self.hear: Callable[[str], None] = lambda text: None  # what the others have to say to people
        self.peak_elsewhere = 0
        self._sent: tuple[Tree | None, Tree | None] = (None, None)  # the parameters and the base that all have

    def ask(
        self,
        kind: str,
        key: str,
        state: State,
        parts: Sequence[list[Any]],
        about: Mapping[str, Any],
        owners: Sequence[Sequence[str]] = (),
    ) -> None:
        """Give out a piece of work; the leader's own part has to be done next, by `do`.

        Args:
            parts: one for each process, as JSON values.
            owners: for each process, the clients whose personal trees are wanted there.
        """
        trees: dict[str, Tree] = {}
        if state.params is not self._sent[0]:
            trees["params"] = state.params
        if state.base is not self._sent[1]:
            trees["base"] = state.base
        self._sent = (state.params, state.base)
        known = state.personal
        several = [{id: known[id] for id in ids if id in known} for ids in owners or [[]] * self.team.size]
        head = {"key": key, "seed": state.seed, "round": state.round, "parts": list(parts), "about": dict(about)}
        self.team.broadcast(wire.encode(kind, {**head, "personal": any(several)}, **trees))
        if any(several):
            self.team.scatter([b"", *(trees_to(one) for one in several[1:])])

    def do(self, work: Callable[[], Any]) -> list[Said]:
        """See `_Process.do`.

        Raises:
            RunError: another process could not do its part; the message names it.
        """
        told = super().do(work)
        for said in told:
            self.peak_elsewhere = max(self.peak_elsewhere, said.peak_memory)
            for note in said.notes:
                self.hear(f"process {said.rank}: {note}")
        for said in told:
            if said.error is not None:
                raise _error_heard(said, self.team.size)
        return told

    def alone(self, work: Callable[[], T]) -> T:
        """Work of this process alone, with which the others keep step where the base is in shards."""
        if self.shards is None:
            return work()
        self.team.broadcast(wire.encode(ALONE, {}))
        found: list[T] = []
        self.do(lambda: found.append(work()))
        return found[0]

    def end(self) -> None:
        """Let the others go."""
        self.team.broadcast(wire.encode(END, {}))


class Follower(_Process):
    """Everyone else's side: do what is asked, until there is no more."""

    def __init__(self, team: Team, device: torch.device, peak_memory: Callable[[], int] = lambda: 0) -> None:
        super().__init__(team, peak_memory)
        self.device = device
        self._params: Tree = {}
        self._base: Tree = {}

    def next(self) -> Order | None:
        """The next piece of work; None when there is none."""
        message = wire.decode(self.team.broadcast())
        if message.kind == END:
            return None
        if message.kind == ALONE:
            return Order(ALONE, "", State(0, 0, {}, None), [], {})
        self._params = self._here(message.trees["params"]) if "params" in message.trees else self._params
        self._base = self._here(message.trees["base"]) if "base" in message.trees else self._base
        head = message.header
        personal: Mapping[str, Tree] = {}
        if head["personal"]:
            personal = {id: self._here(tree) for id, tree in trees_from(self.team.scatter()).items()}
        state = State(int(head["seed"]), int(head["round"]), self._params, None, personal, self._base)
        return Order(message.kind, head["key"], state, head["parts"][self.team.rank], head["about"])

    def _here(self, tree: Tree) -> Tree:
        return {name: leaf.to(self.device) for name, leaf in tree.items()}


def trees_to(trees: Mapping[str, Tree]) -> bytes:
    """Trees by client id as one message; ids may hold any characters."""
    return wire.encode("trees", {"ids": list(trees)}, **{str(n): tree for n, tree in enumerate(trees.values())})


def trees_from(raw: bytes) -> dict[str, Tree]:
    message = wire.decode(raw)
    return {id: message.trees[str(n)] for n, id in enumerate(message.header["ids"])}


def _error_told(error: Exception) -> dict[str, Any]:
    if isinstance(error, FedloomError):
        return {"message": error.message, "hint": error.hint, "code": error.code, "exit_code": error.exit_code}
    where = traceback.extract_tb(error.__traceback__)[-1]
    return {
        "message": f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})",
        "hint": "",
        "code": "processes.failed",
        "exit_code": 1,
    }


def _error_heard(said: Said, size: int) -> RunError:
    told = said.error or {}
    return RunError(
        f"process {said.rank} of {size}: {told['message']}", told["hint"], told["code"], int(told["exit_code"])
    )
