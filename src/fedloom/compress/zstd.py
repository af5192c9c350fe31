"""Entropy coding on top: the whole message as one block of zstd, names and shapes included."""

from __future__ import annotations

import torch
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fedloom.errors import RunError
from fedloom.types import Site, Transform, Tree

BLOB = "zstd"
MAX_BYTES = 16 * 2**30  # of what a message unpacks to


def zstd(level: int = 3) -> Transform:
    """Lossless. Last of all: there is one leaf of bytes after it. Pays on quantised and sparse messages, whose numbers
    repeat, and on small ones, whose names are most of them; float32 hardly shrinks."""

    def encode(tree: Tree, site: Site) -> Tree:
        raw = save_tensors({name: leaf.detach().cpu().contiguous().clone() for name, leaf in tree.items()})
        small = zstandard.ZstdCompressor(level=level).compress(raw)
        return {BLOB: torch.frombuffer(bytearray(small), dtype=torch.uint8)}

    def decode(tree: Tree, site: Site) -> Tree:
        blob = tree.get(BLOB)
        if blob is None or blob.dtype != torch.uint8 or len(tree) != 1:
            raise RunError("a message that should be one block of zstd is none", code="compress.content")
        small = blob.cpu().numpy().tobytes()
        try:
            size = zstandard.frame_content_size(small)
            if not 0 <= size <= MAX_BYTES:
                raise RunError(f"a block of zstd claims {size:,} bytes", code="compress.content")
            return load_tensors(zstandard.ZstdDecompressor().decompress(small))
        except (zstandard.ZstdError, SafetensorError, ValueError) as error:
            raise RunError(f"a block of zstd could not be read: {error}", code="compress.content") from error

    return Transform(encode, decode)
