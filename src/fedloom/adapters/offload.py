"""Activation offload: what the backward pass needs of the decoder's blocks waits in the host's memory.

After vDNN (Rhu et al. 2016), with autograd's hooks on saved tensors. Each tensor that a block saves is copied to pinned
memory when it is saved and back when it is due, on the stream that computes, so no copy is read before it is there.
A tensor that several operations of a block share, in whatever shape, is copied once. Weights and what is trained stay
where they are, and so do small tensors and those that are no real numbers (masks, positions, packed weights). The
numbers are the same; nothing changes where no graph is made.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom.adapters.frame import Frame
from fedloom.adapters.recompute import blocks_as_they_are
from fedloom.adapters.targets import decoder_blocks
from fedloom.errors import UserError
from fedloom.types import Adapter

__all__ = ["offloading", "with_activation_offload", "with_offload"]

LEAST_BYTES = 2**20  # of a tensor that is put away: a smaller one is no memory, and each copy has a price of its own


class Away(NamedTuple):
    """A tensor that waits elsewhere, as its numbers lie in memory."""

    flat: Tensor
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]


def with_activation_offload(adapter: Adapter) -> Adapter:
    """The same adapter, whose model's blocks keep their activations in the host's memory.

    Raises:
        UserError: the model is in the host's memory itself, or `with_offload` refuses the adapter.
    """
    device: Any = adapter.model.device
    if device.type == "cpu":
        raise UserError(
            "runtime.activation_offload: true, but the model is on the CPU, whose memory holds activations already",
            "runtime.gradient_checkpointing=true in its place: it keeps fewer",
            "adapter.offload",
        )
    return with_offload(adapter)


def with_offload(adapter: Adapter, least_bytes: int = LEAST_BYTES) -> Adapter:
    """The mechanism alone, wherever the model is.

    Raises:
        UserError: the model has no single stack of blocks, the adapter's training makes no graph, or its blocks run
            again in the backward pass.
    """
    if not isinstance(adapter, Frame) or getattr(adapter, "in_place", False) or adapter.recomputes:
        again = getattr(adapter, "recomputes", False)
        raise UserError(
            f"{getattr(adapter, 'kind', 'this adapter')} keeps no activations that could wait elsewhere"
            + (": its blocks run again (gradient_checkpointing)" if again else ""),
            "runtime.activation_offload: false",
            "adapter.offload",
        )
    if not adapter.offloads:
        for block in decoder_blocks(adapter.model).values():
            block.forward = _put_away(adapter, block, block.forward, least_bytes)
        adapter.offloads = True
    return adapter


@contextlib.contextmanager
def offloading(adapter: Adapter) -> Iterator[None]:
    """Offload for as long as it lasts, to try what it costs.

    Raises:
        UserError: as `with_activation_offload`.
    """
    with blocks_as_they_are(adapter):
        with_activation_offload(adapter)
        yield


def _put_away(frame: Frame, block: nn.Module, forward: Callable[..., Any], least_bytes: int) -> Callable[..., Any]:
    @functools.wraps(forward)
    def offloaded(*args: Any, **given: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **given)
        # asked for in each pass: other weights may be in the block's places now, one client's or just put together
        stay = {_place(leaf) for leaf in (*block.parameters(), *block.buffers(), *frame.leaves)}
        put: dict[Any, tuple[Tensor, Tensor]] = {}  # with the tensor, so that nothing new comes to its place meanwhile

        def pack(x: Tensor) -> Tensor | Away:
            small = min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) < least_bytes
            if small or not x.is_floating_point() or _place(x) in stay:
                return x
            span = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
            if span > x.numel():  # with gaps
                x = x.contiguous()
                span = x.numel()
            key = x.data_ptr(), x.dtype, x._version, span
            if key not in put:
                flat = torch.empty(span, dtype=x.dtype, pin_memory=x.is_cuda)
                put[key] = flat.copy_(x.as_strided((span,), (1,)), non_blocking=x.is_cuda), x
            return Away(put[key][0], x.device, x.shape, x.stride())

        def unpack(kept: Tensor | Away) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return kept.flat.to(kept.device, non_blocking=True).as_strided(kept.shape, kept.stride)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **given)

    offloaded.kept_whole = forward  # type: ignore[attr-defined]  # for a run that is given up half way
    return offloaded


def _place(x: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # each client's own weight is a tensor that minds what is asked of it
        return x.untyped_storage().data_ptr()
