"""Gradient checkpointing (Chen et al. 2016): of each decoder block only the input is kept, and it runs again backward.

Activations then take memory for one block and not for all; a step has one more forward pass through the blocks. The
numbers are the same. transformers' own checkpointing is not used: it asks for training mode, which switches the base's
dropout on, empties the cache that prefix tuning fills, and knows nothing of a tree that is on only while the loss is
made. Here the tree that was on in the forward pass is put on again while a block runs a second time, its dropout seeds
and the layout of packed rows with it. Nothing changes where no graph is made.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedloom.adapters.frame import Frame
from fedloom.adapters.targets import decoder_blocks
from fedloom.errors import UserError
from fedloom.types import Adapter

__all__ = ["blocks_as_they_are", "recomputing", "with_recompute"]


def with_recompute(adapter: Adapter) -> Adapter:
    """The same adapter, whose model's blocks keep no activations for the backward pass.

    Raises:
        UserError: the model has no single stack of blocks, or the adapter's training makes no graph.
    """
    if not isinstance(adapter, Frame) or getattr(adapter, "in_place", False):
        raise UserError(
            f"{getattr(adapter, 'kind', 'this adapter')} keeps no activations that could be made again",
            hint="runtime.gradient_checkpointing: false",
            code="adapter.recompute",
        )
    if not adapter.recomputes:
        for block in decoder_blocks(adapter.model).values():
            # on the instance: hooks on the block itself stay outside, as they do in transformers
            block.forward = _again(adapter, block, block.forward)
        adapter.recomputes = True
    return adapter


@contextlib.contextmanager
def recomputing(adapter: Adapter) -> Iterator[None]:
    """Checkpointing for as long as it lasts, to try what it costs.

    Raises:
        UserError: as `with_recompute`.
    """
    with blocks_as_they_are(adapter):
        with_recompute(adapter)
        yield


@contextlib.contextmanager
def blocks_as_they_are(adapter: Adapter) -> Iterator[None]:
    """Whatever is put around the blocks' forward passes within it is gone after it."""
    if not isinstance(adapter, Frame):
        yield
        return
    kept = {block: vars(block).get("forward") for block in decoder_blocks(adapter.model).values()}
    before = adapter.recomputes, adapter.offloads
    try:
        yield
    finally:
        adapter.recomputes, adapter.offloads = before
        for block, forward in kept.items():
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


def _again(frame: Frame, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checkpointed(*args: Any, **given: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **given)

        def run(*args: Any) -> Any:
            # the block writes into the cache: each time into one of its own, else the second time would add to it
            return forward(*args, **{name: _own_cache(value) for name, value in given.items()})

        # dropout is drawn from seeds, so there is no state of a generator to keep
        return checkpoint(
            run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=frame.contexts_of_a_second_run
        )

    checkpointed.kept_whole = forward  # type: ignore[attr-defined]  # for a run that is given up half way
    return checkpointed


def _own_cache(value: Any) -> Any:
    layers = getattr(value, "layers", None)
    if not isinstance(layers, list):
        return value
    own = copy.copy(value)
    own.layers = [copy.copy(layer) for layer in layers]
    return own
