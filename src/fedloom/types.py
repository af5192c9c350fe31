"""The types of fedloom, and nothing else.

A round is "map clients, reduce with `add`, finish on the server". Every method of the field fills one slot of that
round: `client`, `aggregate`, `server`, or one of the transforms `compress` and `protect`. A runtime is only the
map-reduce. Inside a client update every tensor has a leading cohort axis: C = 1 is the plain loop, C = 8 trains eight
clients in one forward and backward pass over one frozen base model.

Shape suffixes: C clients in the cohort axis, B examples per client, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fedloom.errors import UserError

Tree = Mapping[str, Tensor]  # parameter name -> tensor; inside a client update every leaf is [C, ...]
Batch = Mapping[str, Tensor]  # input_ids, labels: [B, T] at a client, [C, B, T] in a cohort; padded on the right
Metrics = Mapping[str, float]  # sums and counts, never means, so that metrics of clients add
LossFn = Callable[[Tree, Batch], Tensor]  # tree_C, batch_CBT -> loss_C, the mean over each client's answer tokens
LocalState = Any  # a client update's own state: nested NamedTuples, tuples and dicts of [C, ...] tensors
ServerState = Any  # a server update's own state: the same, without the cohort axis

NOTHING: Mapping[str, Any] = MappingProxyType({})
FIXED = "fixed/"  # leaves under this prefix are neither trained nor sent (a client's own LoRA scale, say)


class Site(NamedTuple):
    """Where and when a piece of work happens. Every random draw of that work is derived from it."""

    seed: int  # of the run
    round: int
    client: str
    cohort: tuple[str, ...] = ()  # ids of all clients of this round, in sampling order
    num_steps: int = 1  # local steps this client will take in this round


class Client(NamedTuple):
    """Who takes part, and with what. `batches` is opened lazily, only where the data is."""

    id: str
    batches: Sequence[Batch]
    weight: float = 1.0  # FedAvg weight: the client's training size unless the recipe says otherwise
    rank: int | None = None  # the client's own LoRA rank; None is the adapter's


class Adapter(Protocol):
    """One PEFT kind on one frozen model."""

    model: nn.Module

    def init(self, seed: int) -> Tree:
        """The parameters before round 1."""

    def narrow(self, tree: Tree, client: Client) -> Tree:
        """A client's own part of `tree`: its rank, zero padded, with its scale as a leaf under `FIXED`."""

    def widen(self, delta: Tree, client: Client) -> Tree:
        """What the client sends of its change: at its own rank, in the scale that all clients share."""

    def loss(self, tree_C: Tree, batch_CBT: Batch) -> Tensor:
        """loss_C: mean negative log-likelihood (nats) over each client's answer tokens. Runs the base model once."""

    def nll(self, tree_C: Tree, batch_CBT: Batch) -> tuple[Tensor, Tensor]:
        """(sum_C, count_C): summed negative log-likelihood and the number of answer tokens, without a graph."""

    def bound(self, tree_C: Tree, seed_C: Tensor | None = None) -> AbstractContextManager[nn.Module]:
        """Within it `model` is the tuned model, for inputs of [C * B, T] with the cohort axis outermost.

        Without seeds there is no dropout.
        """

    def sync(self, base: Tree) -> None:
        """Frozen weights := original + `base`; nothing happens when they are so already."""

    def accumulate(self, base: Tree, merge: Tree) -> Tree:
        """`base` with what a round adds to the frozen weights."""

    def export(self, tree: Tree, path: Path) -> None:
        """Write a PEFT adapter folder that gives the same logits."""


class ClientUpdate(NamedTuple):
    """Local work of a whole cohort."""

    init: Callable[[Tree, Tree, Sequence[Site]], LocalState]  # broadcast_C, personal_C, one site per client
    step: Callable[[LossFn, LocalState, Batch], LocalState]  # one optimiser step of the still active prefix
    finish: Callable[[Tree, LocalState], tuple[Tree, Tree]]  # broadcast_C, state -> delta_C, personal_C
    personal: Callable[[Tree], Tree] = lambda params: {}  # a client's first personal state
    model: Callable[[Tree, Tree], Tree] = lambda params, personal: params  # what the client itself would use
    cohort_axis: bool = True  # False: this update needs C == 1


class Upload(NamedTuple):
    """A summand. `tree` is private, `weight` and `metrics` are not."""

    tree: Tree
    weight: float
    metrics: Metrics = NOTHING


class Proposal(NamedTuple):
    """Where the cohort says the parameters should be, and what should be added to the frozen weights."""

    params: Tree
    merge: Tree = NOTHING


class Trained(NamedTuple):
    """What a cohort's training gives: the sum of uploads, and what is said about each client."""

    upload: Upload | None  # None when no client finished
    personal: Mapping[str, Tree]
    clients: Mapping[str, Metrics]  # of those that finished
    failed: Mapping[str, str]  # client id -> reason


class Evaluation(NamedTuple):
    """A named measurement; the name travels to where the data is, the function is known there."""

    name: str
    run: Callable[[Adapter, Tree, Sequence[Client]], Sequence[Metrics]]  # adapter, tree_C, clients -> one each


Check = Callable[["Algorithm"], list[str]]  # objections to a composition, as sentences


def no_objection(algorithm: Algorithm) -> list[str]:
    return []


class Aggregate(NamedTuple):
    """What is summed, how, and what the sum means."""

    lift: Callable[[Tree, Tree, float], Upload]  # params, delta, weight -> summand
    add: Callable[[Upload, Upload], Upload]  # associative and commutative
    finish: Callable[[Tree, Upload], Proposal]
    check: Check = no_objection


class Transform(NamedTuple):
    """Compression or protection: both halves in one value."""

    encode: Callable[[Tree, Site], Tree]  # on the client
    decode: Callable[[Tree, Site], Tree]  # compress: per client; protect: on the sum, in reverse order
    check: Check = no_objection


class ServerUpdate(NamedTuple):
    """From the parameters towards the proposal."""

    init: Callable[[Tree], ServerState]
    apply: Callable[[Tree, Proposal, ServerState], tuple[Tree, ServerState]]
    replaces: bool = False  # True: takes the proposal as it is


@dataclass(frozen=True)
class Algorithm:
    """The composition.

    Raises:
        UserError: the parts do not compose; the message lists every reason.
    """

    client: ClientUpdate
    aggregate: Aggregate
    server: ServerUpdate
    compress: tuple[Transform, ...] = ()
    protect: tuple[Transform, ...] = ()
    downlink: tuple[Transform, ...] = ()  # of the broadcast: encoded once by the server, decoded by every client
    uniform_weight: bool = False

    def __post_init__(self) -> None:
        parts: tuple[Aggregate | Transform, ...] = (self.aggregate, *self.compress, *self.protect, *self.downlink)
        reasons = [reason for part in parts for reason in part.check(self)]
        if reasons:
            raise UserError("these parts do not compose:\n  - " + "\n  - ".join(reasons), code="algorithm.compose")


@dataclass(frozen=True)
class State:
    """All there is to checkpoint, fork or resume. A round makes a new one and leaves the old one as it was."""

    seed: int
    round: int  # rounds done
    params: Tree
    server: ServerState
    personal: Mapping[str, Tree] = field(default_factory=dict)
    base: Tree = field(default_factory=dict)  # what was added to the frozen weights so far, as low-rank factors


class Runtime(NamedTuple):
    """A map-reduce over clients, for training and for evaluation alike."""

    train: Callable[[Algorithm, Adapter, State, Sequence[Client]], Trained]
    evaluate: Callable[[Algorithm, Adapter, State, Sequence[Client], Evaluation], Mapping[str, Metrics]]


@dataclass(frozen=True)
class RoundReport:
    """What a round did, for people and for rounds.jsonl."""

    round: int  # 1 for the first
    cohort: tuple[str, ...]
    failed: Mapping[str, str]
    metrics: Metrics  # summed over the clients that finished
    clients: Mapping[str, Metrics]
    seconds: float
