"""What the lowest blocks of a model make of a row, made once and kept.

Where only upper blocks are trained, the blocks below give the same hidden states of a row in every epoch, round and
arm, and for every client. They are made of each row by itself, without padding or company, so that a row's numbers do
not hang on what was kept, and a resumed run has those of an uninterrupted one. What does not fit is made again.

Shape suffixes: N rows, T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import UserError

__all__ = ["FrozenBlocks"]


class FrozenBlocks:
    """The first blocks of a model's body, in whose place their kept output stands.

    Attributes:
        bytes: held at the moment.
        made, found: rows that ran through the blocks, and rows that were at hand.
    """

    def __init__(self, body: nn.Module, blocks: Sequence[nn.Module], number: int, budget_bytes: int) -> None:
        """
        Args:
            body: the model without its head.
            blocks: all of its blocks, lowest first.
            number: how many of them no adapter touches; at least 1, and fewer than there are.
            budget_bytes: of hidden states that are kept, in the memory of the host.

        Raises:
            UserError: the model goes other ways than through its blocks, tried on a few tokens.
        """
        self.body, self.below, self.next = body, list(blocks[:number]), blocks[number]
        self.budget_bytes = budget_bytes
        self.bytes = self.made = self.found = 0
        self._kept: dict[bytes, Tensor] = {}
        self._in_tuple = False
        self._try()

    def states(self, row_T: Tensor) -> Tensor:
        """[T, D]: the row's hidden states after the blocks, as they come without a graph."""
        key = blake2b(row_T.cpu().numpy().tobytes(), digest_size=16).digest()
        kept = self._kept.get(key)
        if kept is not None:
            self.found += 1
            return kept.to(row_T.device)
        self.made += 1
        states_TD = self.make(row_T)
        size = states_TD.numel() * states_TD.element_size()
        if self.bytes + size <= self.budget_bytes:
            self._kept[key] = states_TD.cpu()
            self.bytes += size
        return states_TD

    @contextlib.contextmanager
    def replaced(self, fill: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within it the blocks are passed by, and the one above them gets `fill(hidden)`, of the same shape."""

        def by(hidden: Any = None, *args: Any, **given: Any) -> Any:
            hidden = given["hidden_states"] if hidden is None else hidden
            return (hidden,) if self._in_tuple else hidden

        own: list[Any] = [block.__dict__.get("forward") for block in self.below]
        for block in self.below:
            block.forward = by
        handle = self.next.register_forward_pre_hook(_changed(fill), with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()
            for block, forward in zip(self.below, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    @torch.no_grad()
    def make(self, row_T: Tensor) -> Tensor:
        """[T, D]: the row through the blocks, whatever is kept."""
        caught: list[Tensor] = []

        def catch(hidden_NTD: Tensor) -> Tensor:
            caught.append(hidden_NTD)
            raise _Caught

        handle = self.next.register_forward_pre_hook(_changed(catch), with_kwargs=True, prepend=True)
        try:
            self.body(input_ids=row_T[None], use_cache=False)
        except _Caught:
            pass
        finally:
            handle.remove()
        return caught[0][0]

    @torch.no_grad()
    def _try(self) -> None:
        model: Any = self.body
        size = int(model.get_input_embeddings().weight.shape[0])
        ids_NT = (torch.arange(10).view(2, 5) % size).to(next(model.parameters()).device)

        def told(block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._in_tuple = isinstance(out, tuple)

        handle = self.below[0].register_forward_hook(told)
        try:
            want = model(input_ids=ids_NT, use_cache=False)[0].double()
        finally:
            handle.remove()
        try:
            states = torch.stack([self.make(row_T) for row_T in ids_NT])
            with self.replaced(lambda hidden: states):
                got = model(input_ids=ids_NT, use_cache=False)[0].double()
            gap = float((got - want).abs().max())
            wrong = (
                "" if gap <= _tolerance(states.dtype) * (1 + float(want.abs().max())) else f"states differ by {gap:.2g}"
            )
        except Exception as error:  # whatever a model's own code says to it
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise UserError(
                f"the lowest blocks of this model cannot be passed by ({wrong})",
                "runtime.activation_cache_gb: null",
                "adapter.activation_cache",
            )


class _Caught(Exception):  # no error: a run that has given what it was made for
    """The block above the frozen ones has been reached."""


def _changed(change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that changes the hidden states a block is given."""

    def before(block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), given
        return args, {**given, "hidden_states": change(given["hidden_states"])}

    return before


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
