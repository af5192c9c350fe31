"""The codec: exact both ways, bounded, and nothing but a sound frame is read."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom import wire
from fedloom.errors import RunError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.uint8, torch.bool]


def frame() -> bytes:
    return wire.encode("train", {"round": 3}, params={"a.b": torch.arange(6.0).reshape(2, 3)}, base={})


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact(dtype):
    leaf = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)
    expanded = leaf[:1].expand(3, 5)
    raw = wire.encode("x", {"n": 1, "s": "ü"}, p={"w": leaf, "v": expanded, "t": leaf.T}, q={"w": torch.zeros(0)})
    message = wire.decode(raw)
    assert message.kind == "x"
    assert message.header == {"n": 1, "s": "ü"}
    assert torch.equal(message.trees["p"]["w"], leaf)
    assert torch.equal(message.trees["p"]["v"], expanded)
    assert torch.equal(message.trees["p"]["t"], leaf.T)
    assert message.trees["p"]["w"].dtype == dtype
    assert message.trees["q"]["w"].shape == (0,)


def test_num_bytes_is_the_length_of_the_frame():
    tree = {"w": torch.randn(3, 5), "layer.0.x": torch.randn(7).bfloat16()}
    for header, trees in [({}, {"p": tree}), ({"seed": 12}, {"p": tree, "q": {}}), ({"é": None}, {"p": {}})]:
        assert wire.num_bytes("k", header, **trees) == len(wire.encode("k", header, **trees))


def test_every_flipped_byte_and_every_cut_is_noticed():
    raw = frame()
    for i in range(len(raw)):
        damaged = raw[:i] + bytes([raw[i] ^ 0x10]) + raw[i + 1 :]
        with pytest.raises(RunError):
            wire.decode(damaged)
        with pytest.raises(RunError):
            wire.decode(raw[:i])


def test_an_announced_size_is_refused_before_anything_is_read():
    head = struct.pack("<8sIQI", wire.MAGIC, 10, 2**60, 0)
    with pytest.raises(RunError, match="at most"):
        wire.decode(head + b"x" * 10)
    with pytest.raises(RunError, match="at most 10 are taken"):
        wire.decode(frame(), max_bytes=10)


def test_a_sound_frame_with_nonsense_inside_is_a_clear_error():
    import zlib

    for content in (b"[]", b"{}", b"\xff\xfe", json.dumps({"kind": "x", "trees": 3}).encode()):
        head = struct.pack("<8sIQI", wire.MAGIC, len(content), 0, zlib.crc32(content))
        with pytest.raises(RunError, match="could not be read"):
            wire.decode(head + content)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_never_read(noise):
    with pytest.raises(RunError):
        wire.decode(wire.MAGIC + noise)


def test_num_bytes_needs_shapes_alone_of_every_type_and_size():
    draw = random.Random(3)
    for _ in range(20):
        trees = {
            group: {
                f"{draw.choice('abcé')}{i}": torch.zeros([draw.randrange(7) for _ in range(draw.randrange(4))], dtype=t)
                for i, t in enumerate(draw.sample(list(wire._DTYPES), 9))
            }
            for group in ("params", "base")
        }
        want = len(wire.encode("train", {"round": 3}, **trees))
        assert wire.num_bytes("train", {"round": 3}, **trees) == want
        shapes = {group: {k: leaf.to("meta") for k, leaf in tree.items()} for group, tree in trees.items()}
        assert wire.num_bytes("train", {"round": 3}, **shapes) == want
    whole = {"w": torch.empty(2**40, dtype=torch.bfloat16, device="meta")}
    assert wire.num_bytes("train", {}, params=whole) > 2**41
