from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fedloom import tree
from fedloom.errors import RunError, UserError
from fedloom.study import checkpoint
from fedloom.types import State


class Inner(NamedTuple):
    count: Tensor
    moments: dict[str, Tensor]


class Server(NamedTuple):
    inner: Inner
    nothing: None
    pair: tuple[Tensor, tuple[()]]
    empty: dict[str, Tensor]


AWKWARD = ["plain", "a/b", "../../etc/passwd", "", "ü 漢字", "a\nb", "~1", "x" * 5000, ".", "NUL\x00"]


def state_of(round: int, seed: int = 7) -> State:
    """Every dtype and shape that a state may have, different in every round."""
    g = torch.Generator().manual_seed(round)
    params = {
        "base_model.model.layers.0.q_proj.lora_A.weight": torch.randn(4, 8, generator=g),
        "bf16": torch.randn(3, 5, generator=g).to(torch.bfloat16),
        "float64": torch.randn(2, 3, generator=g, dtype=torch.float64),
        "fixed/scale": torch.tensor(2.0 + round),
        "int64": torch.randint(-(2**62), 2**62, (3,), generator=g),
        "none_inside": torch.zeros(0, 4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "bool": torch.tensor([True, False]),
        "strided": torch.randn(4, 6, generator=g).t(),
    }
    count = torch.tensor([round], dtype=torch.int64)
    inner = Inner(count, {"m/v": torch.randn(2, generator=g)})
    server = Server(inner, None, (torch.randn(2, 2, generator=g), ()), {})
    personal: dict[str, dict[str, Tensor]] = {
        name: {"head/w": torch.randn(2, generator=g), "n": count} for name in AWKWARD
    }
    personal["stateless"] = {}
    return State(seed, round, params, server, personal, {"added/~x": torch.randn(1, generator=g)})


def bits(state: State) -> dict[str, Any]:
    flat = tree.flatten(
        {
            "params": state.params,
            "server": state.server,
            "base": state.base,
            **{f"personal {name}": part for name, part in state.personal.items()},
        }
    )
    return {
        "seed": state.seed,
        "round": state.round,
        "clients": list(state.personal),
        **{
            name: (x.dtype, tuple(x.shape), x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, x in flat.items()
        },
    }


def test_round_trip_is_exact_to_the_bit(tmp_path: Path) -> None:
    state = state_of(3)
    extra = {"val": 0.1 + 0.2, "tiny": 5e-324, "text": "ü\u2028", "list": [1, None, True], "big": 2**80}
    path = checkpoint.save(tmp_path / "new" / "arm", state, extra, keep_last=2, best=False)
    assert path == tmp_path / "new" / "arm" / "round_00003"
    loaded, back = checkpoint.load(tmp_path / "new" / "arm", state_of(0))
    assert bits(loaded) == bits(state)
    assert back == extra
    assert isinstance(loaded.server, Server)
    assert isinstance(loaded.server.inner, Inner)
    assert loaded.server.nothing is None
    assert list(loaded.base) == ["added/~x"]
    assert {p.name for p in path.iterdir()} == {"state.safetensors", "state.json"}


def test_a_state_with_nothing_in_it_comes_back(tmp_path: Path) -> None:
    state = State(seed=1, round=0, params={}, server=None)
    checkpoint.save(tmp_path, state, {}, keep_last=1, best=False)
    loaded, extra = checkpoint.load(tmp_path, state)
    assert loaded == state
    assert extra == {}


def test_order_of_names_and_clients_is_kept(tmp_path: Path) -> None:
    names = ["z", "a", "m"]
    trees = {name: {key: torch.tensor(float(i)) for i, key in enumerate(names)} for name in names}
    state = State(1, 1, {}, None, trees, trees["z"])
    checkpoint.save(tmp_path, state, {}, keep_last=1, best=False)
    loaded, _ = checkpoint.load(tmp_path, State(1, 0, {}, None))
    assert list(loaded.personal) == names
    assert [list(part) for part in loaded.personal.values()] == [names] * 3
    assert list(loaded.base) == names


def test_loaded_state_outlives_its_file(tmp_path: Path) -> None:
    state = state_of(1)
    checkpoint.save(tmp_path, state, {}, keep_last=1, best=False)
    loaded, _ = checkpoint.load(tmp_path, state_of(0))
    file = tmp_path / "round_00001" / "state.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert bits(loaded) == bits(state)


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for round in range(1, 8):
        checkpoint.save(tmp_path, state_of(round), {"r": round}, keep_last=2, best=round in (1, 3))
    assert checkpoint.rounds(tmp_path) == [3, 6, 7]
    assert checkpoint.best_round(tmp_path) == 3
    assert json.loads((tmp_path / "best.json").read_text()) == {"round": 3}
    best, extra = checkpoint.load(tmp_path, state_of(0), which="best")
    assert best.round == 3
    assert extra == {"r": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.json", "round_00003", "round_00006", "round_00007"]


def test_a_kill_before_best_json_does_not_lose_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state_of(1), {}, keep_last=1, best=True)
    before = (tmp_path / "best.json").read_bytes()
    checkpoint.save(tmp_path, state_of(2), {}, keep_last=1, best=True)
    (tmp_path / "best.json").write_bytes(before)  # as if the process had died in between
    checkpoint.save(tmp_path, state_of(3), {}, keep_last=1, best=False)
    assert checkpoint.load(tmp_path, state_of(0), which="best")[0].round == 2


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    assert checkpoint.rounds(tmp_path / "none") == []
    with pytest.raises(RunError, match="no checkpoint in"):
        checkpoint.load(tmp_path / "none", state_of(0))
    checkpoint.save(tmp_path, state_of(1), {}, keep_last=1, best=False)
    with pytest.raises(RunError, match="marked as the best"):
        checkpoint.load(tmp_path, state_of(0), which="best")


def flip(position: float) -> Any:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x10
        file.write_bytes(data)

    return damage


def huge_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[:8] = (2**62).to_bytes(8, "little")
    file.write_bytes(data)


def other_round(file: Path) -> None:
    file.write_text(file.read_text().replace('"round": 2', '"round": 9'))


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = [
    ("state.safetensors", cut, "bytes instead of"),
    ("state.safetensors", longer, "bytes instead of"),
    ("state.safetensors", flip(1.0), "checksum"),
    ("state.safetensors", flip(0.5), "checksum"),
    ("state.safetensors", huge_header, "claims a header of 4,611,686,018,427,387,904 bytes"),
    ("state.safetensors", Path.unlink, "is missing"),
    ("state.safetensors", lambda file: file.write_bytes(b""), "0 bytes"),
    ("state.json", cut, "no JSON"),
    ("state.json", Path.unlink, "is missing"),
    ("state.json", lambda file: file.write_bytes(b"\xff\xfe"), "no JSON"),
    ("state.json", lambda file: file.write_text("[]"), "no checksum"),
    ("state.json", lambda file: file.write_text("[" * 100_000), "no JSON"),
    ("state.json", other_round, "does not match its checksum"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any, said: str
) -> None:
    for round in (1, 2):
        checkpoint.save(tmp_path, state_of(round), {"r": round}, keep_last=2, best=False)
    damage(tmp_path / "round_00002" / name)
    with caplog.at_level(logging.WARNING, logger="fedloom"):
        loaded, extra = checkpoint.load(tmp_path, state_of(0))
    assert bits(loaded) == bits(state_of(1))
    assert extra == {"r": 1}
    assert "round_00002 is damaged" in caplog.text
    assert said in caplog.text
    assert "round_00001 instead" in caplog.text

    damage(tmp_path / "round_00001" / name)
    if damage is not other_round:
        with pytest.raises(RunError, match=r"(?s)no checkpoint .* is sound.*round_00002.*round_00001"):
            checkpoint.load(tmp_path, state_of(0))


def test_every_flipped_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the tensors always; in the JSON file wherever it would change what is read."""
    state = State(1, 1, {"w": torch.arange(4.0)}, None)
    template = State(1, 0, {"w": torch.zeros(4)}, None)
    path = checkpoint.save(tmp_path, state, {"best": 1.5, "name": "x"}, keep_last=1, best=False)
    for name in ("state.safetensors", "state.json"):
        sound = (path / name).read_bytes()
        for position in range(len(sound)):
            for mask in (0x01, 0x80):
                broken = bytearray(sound)
                broken[position] ^= mask
                (path / name).write_bytes(broken)
                try:
                    loaded, extra = checkpoint.load(tmp_path, template)
                except RunError:
                    continue
                assert name == "state.json"
                assert bits(loaded) == bits(state)
                assert extra == {"best": 1.5, "name": "x"}
        (path / name).write_bytes(sound)


def test_going_on_from_an_older_round_drops_the_abandoned_ones(tmp_path: Path) -> None:
    for round in (1, 2, 3):
        checkpoint.save(tmp_path, state_of(round), {}, keep_last=3, best=False)
    flip(0.9)(tmp_path / "round_00003" / "state.safetensors")
    # keep_last=1 must keep round 2 that was just written again, not the damaged round 3 with the higher number
    checkpoint.save(tmp_path, state_of(2), {"again": True}, keep_last=1, best=False)
    assert checkpoint.rounds(tmp_path) == [2]
    loaded, extra = checkpoint.load(tmp_path, state_of(0))
    assert loaded.round == 2
    assert extra == {"again": True}


def test_every_difference_to_the_template_is_listed(tmp_path: Path) -> None:
    params = {"same": torch.zeros(2), "shape": torch.zeros(2), "dtype": torch.zeros(2), "gone": torch.zeros(1)}
    saved = State(1, 1, params, (torch.zeros(1), None), {"c": {"p": torch.zeros(1)}})
    checkpoint.save(tmp_path, saved, {}, keep_last=1, best=False)
    params = {"same": torch.zeros(2), "shape": torch.zeros(3), "dtype": torch.zeros(2).double(), "new": torch.zeros(1)}
    template = State(2, 0, params, (None, torch.zeros(1)), {"c": {"p": torch.zeros(2)}})
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path, template)
    message = caught.value.message
    for said in (
        "seed is 1, the run's is 2",
        "params: missing new",
        "params: unexpected gone",
        "params: shape is [2] torch.float32, expected [3]",
        "params: dtype is [2] torch.float32, expected [2] torch.float64",
        "server: missing 1",
        "server: unexpected 0",
        "personal of c: p is [1]",
    ):
        assert said in message
    assert "same" not in message


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    folder = tmp_path / "arm"
    with pytest.raises(ValueError, match=r"extra\.extra\.val is nan"):
        checkpoint.save(folder, state_of(1), {"val": float("nan")}, keep_last=1, best=False)
    with pytest.raises(TypeError, match="complex"):
        checkpoint.save(folder, State(1, 1, {"c": torch.zeros(1).cfloat()}, None), {}, keep_last=1, best=False)
    with pytest.raises(TypeError, match="int"):
        checkpoint.save(folder, State(1, 1, {}, {"step": 3}), {}, keep_last=1, best=False)
    with pytest.raises(ValueError, match="keep_last"):
        checkpoint.save(folder, state_of(1), {}, keep_last=0, best=False)
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ killed, and no room

WRITERS = """
import os, sys, torch
from pathlib import Path
from fedloom.study import checkpoint
from fedloom.types import State

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def write_on(round):
    print("pid", os.getpid(), flush=True)
    while True:
        round += 1
        w = torch.full((400_000,), float(round))
        state = State(5, round, {"w": w}, {"m": w.double()}, {f"c{i}": {"p": w[:1000] + i} for i in range(5)})
        checkpoint.save(folder, state, {"round": round}, keep_last=2, best=round % 3 == 0)
        print(round, flush=True)

for line in sys.stdin:  # one process after the other, each forked, since importing torch takes seconds
    child = os.fork()
    if child == 0:
        write_on(int(line))
    print("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_while_writing_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(11)
    template = State(5, 0, {"w": torch.zeros(400_000)}, {"m": torch.zeros(400_000).double()})
    last = 0
    leftovers = 0
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(15):
            writers.stdin.write(f"{last}\n")
            pid = int(writers.stdout.readline().split()[1])
            said = int(writers.stdout.readline())  # at least one is written
            time.sleep(draw.uniform(0.0, 0.08))
            os.kill(pid, signal.SIGKILL)
            while not (line := writers.stdout.readline()).startswith("end"):
                said = int(line)
            assert line == f"end {-signal.SIGKILL}\n"
            leftovers += sum(entry.name.endswith(".tmp") for entry in tmp_path.iterdir())

            state, extra = checkpoint.load(tmp_path, template)
            assert state.round in (said, said + 1)  # the word may have been cut off, the checkpoint never
            assert extra == {"round": state.round}
            assert torch.equal(state.params["w"], torch.full((400_000,), float(state.round)))
            assert torch.equal(state.personal["c3"]["p"], torch.full((1000,), float(state.round)) + 3)
            if state.round >= 3:
                assert checkpoint.load(tmp_path, template, which="best")[0].round == state.round // 3 * 3
            last = state.round
        writers.stdin.close()
    assert leftovers > 0, "no kill came in the middle of a write; the test proves nothing"
    checkpoint.save(tmp_path, State(5, last + 1, {}, None), {}, keep_last=1, best=False)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_keeps_what_was_there(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state_of(1), {}, keep_last=1, best=False)
    big = State(7, 2, {"w": torch.zeros(100_000)}, None)
    with file_size_limit(50_000), pytest.raises(RunError) as caught:
        checkpoint.save(tmp_path, big, {}, keep_last=1, best=False)
    assert caught.value.code == "disk.full"
    assert "the checkpoints before it are untouched" in caught.value.message
    assert "--resume" in caught.value.hint
    assert [entry.name for entry in tmp_path.iterdir()] == ["round_00001"]
    assert bits(checkpoint.load(tmp_path, state_of(0))[0]) == bits(state_of(1))


@pytest.mark.parametrize("call", range(1, 5))
def test_no_room_at_any_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    checkpoint.save(tmp_path, state_of(1), {}, keep_last=1, best=False)
    real, calls = os.fsync, 0

    def fsync(handle: int) -> None:  # where systems that delay writing report a full disk
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(RunError, match="no space left"):
            checkpoint.save(tmp_path, state_of(2), {}, keep_last=1, best=False)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]
    assert bits(checkpoint.load(tmp_path, state_of(0))[0]) == bits(state_of(1))
