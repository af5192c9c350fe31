"""The one codec: a message (kind, header, tree) to bytes and back.

Frame: magic (8 bytes), header length (u32), payload length (u64), CRC-32 of header and payload (u32), header (JSON),
payload (safetensors). Lengths are checked before anything is allocated, and nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fedloom.errors import RunError
from fedloom.types import Tree

MAGIC = b"FEDLOOM\x01"
_PREFIX = struct.Struct("<8sIQI")
MAX_HEADER_BYTES = 16 * 2**20
MAX_PAYLOAD_BYTES = 64 * 2**30
_GROUP = "::"  # separates a group's name from a parameter's in the payload; parameter names never hold it


class Message(NamedTuple):
    kind: str
    header: Mapping[str, Any]
    trees: Mapping[str, Tree]


def encode(kind: str, header: Mapping[str, Any], **trees: Tree) -> bytes:
    """A frame that `decode` reads back exactly, whatever the dtypes. `header` is JSON; each tree has a name."""
    head = json.dumps({"kind": kind, "trees": sorted(trees), **header}, allow_nan=False).encode()
    payload = save_tensors(_joined(trees)) if any(trees.values()) else b""
    check = zlib.crc32(payload, zlib.crc32(head))
    return b"".join((_PREFIX.pack(MAGIC, len(head), len(payload), check), head, payload))


def num_bytes(kind: str, header: Mapping[str, Any], **trees: Tree) -> int:
    """`len(encode(...))` without copying the tensors."""
    head = json.dumps({"kind": kind, "trees": sorted(trees), **header}, allow_nan=False).encode()
    leaves = tuple((k, tuple(x.shape), x.dtype) for k, x in sorted(_joined(trees, contiguous=False).items()))
    return _PREFIX.size + len(head) + _payload_bytes(leaves)


def decode(raw: bytes, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> Message:
    """Read a frame.

    Raises:
        RunError: it is no frame, is longer than `max_bytes`, was cut, or its checksum does not match.
    """
    if len(raw) < _PREFIX.size or raw[:8] != MAGIC:
        raise RunError("this is not a fedloom message (wrong first bytes)", code="wire.magic")
    _, head_bytes, payload_bytes, check = _PREFIX.unpack_from(raw)
    if head_bytes > MAX_HEADER_BYTES or payload_bytes > max_bytes:
        raise RunError(
            f"a message announces {head_bytes + payload_bytes:,} bytes; at most {max_bytes:,} are taken",
            code="wire.size",
        )
    if len(raw) != _PREFIX.size + head_bytes + payload_bytes:
        announced = _PREFIX.size + head_bytes + payload_bytes
        raise RunError(f"a message of {announced:,} bytes arrived with {len(raw):,}", code="wire.cut")
    body = memoryview(raw)[_PREFIX.size :]
    if zlib.crc32(body) != check:
        raise RunError("a message was damaged on its way (checksum)", code="wire.checksum")
    try:
        header = json.loads(bytes(body[:head_bytes]))
        tensors = load_tensors(bytes(body[head_bytes:])) if payload_bytes else {}
        kind, names = header.pop("kind"), header.pop("trees")
        trees: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
        for key, leaf in tensors.items():
            group, _, name = key.partition(_GROUP)
            trees[group][name] = leaf
    except (ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise RunError(f"a message could not be read: {error}", code="wire.content") from error
    return Message(kind, header, trees)


def _joined(trees: Mapping[str, Tree], *, contiguous: bool = True) -> dict[str, torch.Tensor]:
    joined = {f"{group}{_GROUP}{name}": leaf for group, tree in trees.items() for name, leaf in tree.items()}
    # safetensors refuses views of one storage, which expanded cohorts and slices are
    return {k: x.detach().cpu().contiguous().clone() for k, x in joined.items()} if contiguous else joined


# safetensors' names of types, in the order in which it lays tensors out
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACES = {dtype: place for place, dtype in enumerate(_DTYPES)}


@functools.lru_cache(maxsize=64)
def _payload_bytes(leaves: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]) -> int:
    """The length of the safetensors payload, from shapes alone: whole models are told of this way."""
    if not leaves:
        return 0
    header, end = {}, 0
    for name, shape, dtype in sorted(leaves, key=lambda leaf: (_PLACES[leaf[2]], leaf[0])):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end  # the header's length, the header padded to 8 bytes, the numbers
