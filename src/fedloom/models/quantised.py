"""A frozen base in 8 or 4 bits (QLoRA, Dettmers et al. 2023), through bitsandbytes as transformers loads it.

int8 has a scale per output row, nf4 blocks of 64 weights with double quantisation of their scales. The output head,
embeddings, norms and biases stay as they are. What is computed is the product with the weights as they read back, in
the base's dtype: forward, backward and in evaluation the same numbers, and one row's do not depend on its neighbours.

bitsandbytes does otherwise in three places, and all are put right here. Its 4 bit layer repacks its weights on CPUs
with AVX-512 in the first evaluation, after which no gradient passes it (see `ops.graph`). On such CPUs it also reads
back other weights than it stored for some shapes whose in-features are no multiple of the block, a quarter of their
size away; so what it reads is compared with the definition, once for each layer. Its 8 bit layer rounds activations
too (LLM.int8()), in float16, with outlier columns looked for in the whole batch, so what a client gets would depend on
who is in the pass with it.

Shape suffixes: D in-features, O out-features; x and y end in D and O.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom.errors import UserError

__all__ = [
    "INSTALL",
    "KINDS",
    "check_installed",
    "dequantised",
    "largest_layer_bytes",
    "num_parameters",
    "num_weights",
    "packed_bytes",
    "pinned_forward",
    "settings_of",
    "stored_bytes",
]

KINDS = ("none", "int8", "nf4")
INSTALL = 'pip install "fedloom[quant]"'
_NEEDED = ("bitsandbytes", "accelerate")


def check_installed(kind: str) -> None:
    """Refuse what cannot be loaded here.

    Raises:
        UserError: `kind` is unknown, or the packages that read it are not installed.
    """
    if kind not in KINDS:
        raise UserError(f"quantization is {kind!r}, but must be one of {', '.join(KINDS)}", code="model.quantization")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if kind != "none" and missing:
        raise UserError(
            f"quantization is {kind}, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"{INSTALL}, or quantization=none",
            code="model.quantization",
        )


def settings_of(kind: str, dtype: torch.dtype) -> Any:
    """transformers' settings for `from_pretrained`; None for "none"."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def pinned_forward(model: nn.Module) -> int:
    """Let quantised layers compute one thing only, in training and evaluation; how many there are."""
    number = 0
    for layer in model.modules():
        holder: Any = layer
        if is_nf4(layer):
            holder.support_avx512bf16_for_cpu = False  # the repacked weights have no backward pass
            if not _reads_back_by_itself(layer):
                holder.forward = functools.partial(_forward, layer)
        elif is_int8(layer):
            holder.init_8bit_state()
            holder.forward = functools.partial(_forward, layer)
        number += is_nf4(layer) or is_int8(layer)
    return number


def is_nf4(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "weight", None), "quant_state")


def is_int8(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "weight", None), "SCB")


def num_weights(layer: nn.Module) -> int:
    """Weights of a layer, whatever they are stored in."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return int(weight.numel()) if isinstance(weight, Tensor) else 0


def num_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once; packed ones as many as they stand for."""
    packed = {id(layer.weight): num_weights(layer) for layer in model.modules() if is_nf4(layer)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they lie in memory, scales included."""
    total = sum(leaf.numel() * leaf.element_size() for leaf in (*model.parameters(), *model.buffers()))
    for layer in model.modules():
        holder: Any = layer
        if is_nf4(layer):
            state = holder.weight.quant_state
            parts = [state.absmax, state.offset, state.state2.absmax if state.nested else None]
            total += sum(part.numel() * part.element_size() for part in parts if part is not None)
        elif is_int8(layer):
            total += holder.state.SCB.numel() * holder.state.SCB.element_size()
    return total


def packed_bytes(model: nn.Module, kind: str) -> int:
    """`stored_bytes` of a plain model, were it loaded in `kind`."""
    total = stored_bytes(model)
    for layer in _packable(model):
        count = layer.weight.numel()
        if kind == "int8":
            packed = count + 4 * layer.out_features
        else:
            blocks = -(-count // 64)  # a scale for each, in 8 bits; a float32 for 256 of these, and their offset
            packed = -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4
        total += packed - count * layer.weight.element_size()
    return total


def largest_layer_bytes(model: nn.Module) -> int:
    """Of the largest layer that `packed_bytes` packs: read back, it lies beside the packed ones while it is used."""
    return max((one.weight.numel() * one.weight.element_size() for one in _packable(model)), default=0)


def _packable(model: nn.Module) -> Iterator[nn.Linear]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    yield from (layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head)


@torch.no_grad()
def dequantised(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weights [O, D] as they read back: the plain layer that a quantised one stands for."""
    holder: Any = layer
    if is_nf4(layer):
        return _nf4_read_back(holder.weight.data, holder.weight.quant_state).to(dtype)
    return holder.state.CB.to(dtype).mul_((holder.state.SCB / 127.0).to(dtype)[:, None])  # type: ignore[no-any-return]


def _nf4_read_back(packed: Tensor, state: Any) -> Tensor:
    """By the definition: two codes in a byte, the first in its upper half, times the largest number of their block."""
    from bitsandbytes.functional import dequantize_blockwise

    largest = state.absmax
    if state.nested:
        largest = dequantize_blockwise(largest, state.state2) + state.offset
    codes = packed.flatten()
    places = torch.stack([codes >> 4, codes & 15], 1).flatten()
    count = state.shape.numel()
    numbers: Tensor = state.code.float()[places.int()][:count]
    numbers.mul_(largest.float().repeat_interleave(state.blocksize)[:count])
    return numbers.view(state.shape)


def _reads_back_by_itself(layer: Any) -> bool:
    """Whether bitsandbytes' own kernel gives the weights that are stored, up to their rounding."""
    from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state
    own, right = (read(layer.weight.data, state).float() for read in (dequantize_4bit, _nf4_read_back))
    return bool((own - right).norm() <= 0.02 * right.norm())


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """x W' + b; the weights are read back a second time for the gradient, so that no layer's stay in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        out: Tensor = F.linear(x, dequantised(layer, x.dtype), bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grad, dequantised(ctx.layer, grad.dtype)), None
