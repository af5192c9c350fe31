"""Integers of 8 or 4 bits on the wire (QSGD's idea, Alistarh et al. 2017, with the largest value as the norm).

Shape suffixes: N numbers of a leaf, K blocks of S numbers.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.compress.parts import floating, names_with, part, shape_leaf, shape_of
from fedloom.errors import RunError
from fedloom.seeds import generator
from fedloom.types import Site, Transform, Tree


def quantize(bits: Literal[8, 4] = 8, *, block_size: int | None = None, stochastic: bool = True) -> Transform:
    """x -> s * round(x / s) with s = max |x| / (2^(bits - 1) - 1), per leaf or per block of `block_size` numbers.

    With stochastic rounding the expectation of what is decoded is x (drawn from the site, so a message is the same
    whenever it is made again); without, the error is at most s / 2. Scales travel as float32. Two 4-bit numbers share a
    byte. Decoded values are float32.

    Args:
        bits: 8 or 4.
        block_size: numbers that share a scale; None is the whole leaf.
        stochastic: round up or down at random, or to the nearest.
    """
    top = 2 ** (bits - 1) - 1

    def encode(tree: Tree, site: Site) -> Tree:
        out = {}
        real = set(floating(tree))
        for name, leaf in tree.items():
            if name not in real:
                out[name] = leaf
                continue
            x_KS = blocks(leaf.detach().float().flatten(), block_size)
            scale_K1 = x_KS.abs().amax(1, keepdim=True) / top
            unit_KS = torch.where(scale_K1 > 0, x_KS / scale_K1, torch.zeros_like(x_KS))
            if stochastic:
                draw = generator(site.seed, site.round, site.client, f"quantize/{name}")
                unit_KS = (unit_KS + torch.rand(unit_KS.shape, generator=draw).to(unit_KS.device)).floor()
            codes_N = unit_KS.round().clamp(-top, top).to(torch.int8).flatten()[: leaf.numel()]
            out[part(name, f"q{bits}")] = codes_N if bits == 8 else packed(codes_N)
            out[part(name, "scale")] = scale_K1.flatten()
            out[part(name, "shape")] = shape_leaf(leaf)
        return out

    def decode(tree: Tree, site: Site) -> Tree:
        names = names_with(tree, f"q{bits}")
        parts = {part(name, which) for name in names for which in (f"q{bits}", "scale", "shape")}
        out = {name: leaf for name, leaf in tree.items() if name not in parts}
        for name in names:
            shape = shape_of(tree, name)
            number = int(torch.Size(shape).numel())
            codes, scale_K = tree[part(name, f"q{bits}")], tree.get(part(name, "scale"))
            sent = number if bits == 8 else -(-number // 2)
            wanted = -(-number // block_size) if block_size else 1
            if scale_K is None or codes.numel() != sent or scale_K.numel() != max(wanted, 1):
                raise RunError(
                    f"a quantised leaf does not fit its shape {list(shape)}: {name}", code="compress.content"
                )
            codes_N = codes if bits == 8 else unpacked(codes)[:number]
            x_KS = blocks(codes_N.float(), block_size) * scale_K.float()[:, None]
            out[name] = x_KS.flatten()[:number].view(shape)
        return out

    return Transform(encode, decode)


def blocks(x_N: Tensor, block_size: int | None) -> Tensor:
    """[N] as [K, S], zeros behind the last number."""
    if block_size is None:
        return x_N[None]
    return F.pad(x_N, (0, -len(x_N) % block_size)).view(-1, block_size)


def packed(codes_N: Tensor) -> Tensor:
    """Numbers from -7 to 7, two in a byte: the first in the low half."""
    high = F.pad(codes_N, (0, len(codes_N) % 2)).to(torch.uint8) + 8  # -7 is 249 as a byte: the sum wraps to 1
    pair = (high & 15).view(-1, 2)
    return pair[:, 0] | (pair[:, 1] << 4)


def unpacked(bytes_H: Tensor) -> Tensor:
    return torch.stack([bytes_H & 15, bytes_H >> 4], 1).flatten().to(torch.int8) - 8
