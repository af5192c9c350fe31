"""Half precision on the wire."""

from __future__ import annotations

from typing import Literal

import torch

from fedloom.compress.parts import MARK, floating
from fedloom.types import Site, Transform, Tree

KINDS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def cast(kind: Literal["float16", "bfloat16"]) -> Transform:
    """Real numbers of 32 bits and more travel as 16. float16 keeps 11 bits of a number and overflows beyond 65,504
    (values are held at that); bfloat16 keeps 8 and has float32's range. Decoded values are float32."""
    dtype = KINDS[kind]

    def encode(tree: Tree, site: Site) -> Tree:
        limit = torch.finfo(dtype).max
        small = {name: tree[name].clamp(-limit, limit).to(dtype) for name in floating(tree)}
        return {f"{name}{MARK}{kind}" if name in small else name: small.get(name, leaf) for name, leaf in tree.items()}

    def decode(tree: Tree, site: Site) -> Tree:
        return {
            name.removesuffix(MARK + kind): leaf.float() if leaf.dtype == dtype else leaf for name, leaf in tree.items()
        }

    return Transform(encode, decode)
