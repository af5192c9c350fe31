"""Prepared data is kept, found only by what made it, checked whenever it is opened, and bounded."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.data.toys import CHATML, Data, Split, alpaca_rows, tokenizer, write

from fedloom.data import cache, prepare, read, rows, tokens
from fedloom.data.cache import HEADER, prepared
from fedloom.data.federation import Federation
from fedloom.errors import RunError, UserError

PLAIN = tokenizer()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no entry counts as used by this process."""
    place = tmp_path / "cache"
    monkeypatch.setenv("FEDLOOM_CACHE", str(place))
    monkeypatch.setattr(cache, "_used", set())
    return place


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "d.jsonl", alpaca_rows(60, ["red", "blue"]))


def contents(federation: Federation) -> Any:
    """All that is prepared, as plain values."""
    examples = {
        client.id: [
            [(one.input_ids.tolist(), one.labels.tolist(), federation.rows[one.row]) for one in part]
            for part in (client.train, client.validation, client.test)
        ]
        for client in federation.clients.values()
    }
    return examples, federation.report.to_json(), federation.digest()


def entries(home: Path) -> dict[str, list[str]]:
    """Kind -> names of what lies in the cache."""
    found: dict[str, list[str]] = {}
    for place in sorted(home.iterdir()):
        if not place.name.startswith("."):
            found.setdefault(place.name.partition("-")[0], []).append(place.name)
    return found


def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("made anew")

    monkeypatch.setattr(rows, "_gather", never)
    monkeypatch.setattr(tokens, "_tokenise", never)


# ---------------------------------------------------------------- found again


def test_the_second_time_nothing_is_read_or_tokenised(
    home: Path, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = contents(prepare(Data(path), Split("by_column", None, column="category"), PLAIN, 0))
    assert {kind: len(names) for kind, names in entries(home).items()} == {"keys": 1, "rows": 1, "tokens": 1}
    nothing_is_made(monkeypatch)
    assert contents(prepare(Data(path), Split("by_column", None, column="category"), PLAIN, 0)) == first
    # Another split and another seed are of the same rows and tokens, and the same file elsewhere is the same file.
    assert contents(prepare(Data(path), Split("iid", 4), PLAIN, 7)) != first
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "other.jsonl"
    os.rename(path, moved)
    again = prepare(Data(str(moved)), Split("by_column", None, column="category"), PLAIN, 0)
    assert again.digest() == first[2] and again.report.source == str(moved)


def test_without_the_cache_nothing_is_kept(home: Path, path: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    kept = contents(prepare(Data(path), Split(), PLAIN, 0))
    before = entries(home)
    for place in before.values():
        for name in place:
            cache._remove(home / name)
    assert contents(prepare(Data(path, cache=False), Split(), PLAIN, 0)) == kept
    assert not entries(home) and not list((tmp_path / "tmp").iterdir())


def test_a_changed_file_is_another_one_even_with_the_same_size_and_time(home: Path, path: str) -> None:
    before, stamp = read(path).rows[3]["output"], os.stat(path)
    text = Path(path).read_text()
    assert text.count(before) == 1
    Path(path).write_text(text.replace(before, before[::-1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert os.stat(path).st_size == stamp.st_size
    assert read(path).rows[3]["output"] == before[::-1]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 200},
        {"max_length": None},
        {"train_on_inputs": True},
        {"limit": 30},
        {"type": "prompt_completion", "columns": {"prompt": "instruction", "completion": "output"}},
        {"columns": {"output": "instruction", "instruction": "output"}},
        {"columns": {"category": "input"}},
    ],
    ids=str,
)
def test_another_setting_is_another_entry(path: str, change: dict[str, Any]) -> None:
    plain, changed = Data(path, max_length=260), replace(Data(path, max_length=260), **change)
    wanted = [contents(prepare(replace(data, cache=False), Split(), PLAIN, 0)) for data in (plain, changed)]
    for _ in range(2):  # made, then found
        assert contents(prepare(plain, Split(), PLAIN, 0)) == wanted[0]
        assert contents(prepare(changed, Split(), PLAIN, 0)) == wanted[1]
    assert wanted[0] != wanted[1]


def test_another_tokenizer_is_another_entry(home: Path, path: str) -> None:
    made: list[Any] = [
        PLAIN,
        tokenizer(bos="<s>"),
        tokenizer(space=True),
        tokenizer(eos="<end>"),
        tokenizer(special=["<|im_start|>", "<|im_end|>"], template=CHATML),
        tokenizer(special=["<|im_start|>", "<|im_end|>"], template="." + CHATML),
        tokenizer(corpus=["number so it is"] * 3, merges=5),
        tokenizer(corpus=["number so it is"] * 3, merges=6),
        tokenizer(model_max_length=50),
    ]
    digests = [tokens.tokenizer_digest(one) for one in made]
    assert len(set(digests)) == len(made)
    wanted = [contents(prepare(Data(path, cache=False), Split(), one, 0)) for one in made]
    for _ in range(2):
        for one, before in zip(made, wanted, strict=True):
            assert contents(prepare(Data(path), Split(), one, 0)) == before
    assert len(entries(home)["tokens"]) == len(made) and len(entries(home)["rows"]) == 1


def test_what_calls_leave_in_a_tokenizer_is_not_another_tokenizer() -> None:
    made = tokenizer(pad="<pad>")
    before = tokens.tokenizer_digest(made)
    made(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokens.tokenizer_digest(made) == before


def test_a_template_with_a_date_is_another_one_each_day(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer(template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    plain = tokenizer(template=CHATML)
    before = tokens.tokenizer_digest(made), tokens.tokenizer_digest(plain)

    class Tomorrow:
        class date:
            @staticmethod
            def today() -> Any:
                return Tomorrow

        @staticmethod
        def isoformat() -> str:
            return "2999-01-01"

    monkeypatch.setattr(tokens, "datetime", Tomorrow)
    after = tokens.tokenizer_digest(made), tokens.tokenizer_digest(plain)
    assert after[0] != before[0] and after[1] == before[1]


def test_other_code_finds_nothing(home: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read(path)
    monkeypatch.setattr(cache, "code_digest", lambda: "another version")
    read(path)
    assert len(entries(home)["rows"]) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(
    home: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = rows._gather

    def meanwhile(*arguments: Any, **settings: Any) -> Any:
        made = gather(*arguments, **settings)
        with open(path, "a") as stream:
            stream.write("\n")
        return made

    monkeypatch.setattr(rows, "_gather", meanwhile)
    with pytest.raises(UserError, match="changed while it was read") as caught:
        read(path)
    assert caught.value.code == "data.changed" and not entries(home) and not list(home.glob(".*.tmp"))


# ---------------------------------------------------------------- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink], ids=["flip", "shorten", "missing"])
def test_every_damage_is_found_and_mended(
    home: Path, path: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    split = Split("by_column", None, column="category")
    wanted = contents(prepare(Data(path), split, PLAIN, 0))
    files = [file for names in entries(home).values() for name in names for file in (home / name).iterdir()]
    assert len(files) >= 5 + 1 + 8 + 3, "a store, its keys, tokens, and a header each"
    for file in files:
        if not file.stat().st_size:
            continue
        caplog.clear()
        damage(file)
        assert contents(prepare(Data(path), split, PLAIN, 0)) == wanted, file
        told = [record.message for record in caplog.records if "damaged" in record.message]
        assert len(told) == 1, file
        assert file.exists() and not list(home.glob(".*.gone"))


def test_an_entry_in_anothers_place_is_not_taken(home: Path, path: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", alpaca_rows(10, first=900))
    read(path)
    (mine,) = entries(home)["rows"]
    wanted = read(other).rows[0]
    (theirs,) = set(entries(home)["rows"]) - {mine}
    cache._remove(home / theirs)
    os.rename(home / mine, home / theirs)
    assert read(other).rows[0] == wanted


# ---------------------------------------------------------------- several processes

# Reads rows, which needs neither numpy nor torch; tokens go the same way through the cache.
RACE = """
import sys, time
from fedloom.data import rows
real, made = rows._gather, []
def slowly(*arguments, **settings):
    made.append("made")
    time.sleep(0.5)
    return real(*arguments, **settings)
rows._gather = slowly
print("ready", flush=True)
sys.stdin.readline()
found = rows.read(sys.argv[1]).rows
print(found.digest, len(found[0]["output"]), *made, flush=True)
"""


def start(path: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RACE, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_two_processes_at_once_make_it_once(home: Path, path: str) -> None:
    racers = [start(path), start(path)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60) for racer in racers]
    told = [out.split() for out, _ in said]
    assert told[0][:2] == told[1][:2] and told[0][0] == read(path).rows.digest
    assert [*told[0][2:], *told[1][2:]] == ["made"], said
    assert any("another process is preparing data" in err for _, err in said)
    assert {kind: len(names) for kind, names in entries(home).items()} == {"rows": 1}
    assert not list(home.glob(".*.tmp"))


def test_a_process_killed_in_the_middle_leaves_nothing_that_counts(home: Path, path: str) -> None:
    process = start(path)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    until = time.monotonic() + 30
    while not list(home.glob(".rows-*.tmp")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(home.glob(".rows-*.tmp")) and not entries(home)
    assert len(read(path).rows) == 60
    assert not list(home.glob(".*.tmp")) and len(entries(home)["rows"]) == 1


def test_without_locks_the_second_one_throws_its_own_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    inner: list[cache.Entry] = []

    def build(folder: Path) -> dict[str, Any]:
        if not inner:  # another process is quicker
            inner.append(prepared("rows", {"x": 1}, lambda other: inner.append(None) or build(other)))  # type: ignore[func-returns-value, arg-type]
        (folder / "data").write_bytes(b"whole")
        return {}

    entry = prepared("rows", {"x": 1}, build)
    assert bytes(entry.view("data")) == b"whole" and len(entries(home)["rows"]) == 1 and not list(home.glob(".*.tmp"))


def test_what_is_open_stays_readable_when_it_is_evicted(home: Path, path: str) -> None:
    federation = prepare(Data(path), Split(), PLAIN, 0)
    wanted = contents(federation)
    assert cache.clear()[0] == 2 and not entries(home)
    assert contents(federation) == wanted


# ---------------------------------------------------------------- how much


def fill(home: Path, name: str, size: int, age: float) -> Path:
    prepared("rows", {"name": name}, lambda folder: {"source": name, "n": (folder / "data").write_bytes(b"x" * size)})
    (place,) = [one.path for one in cache.entries() if one.source == name]
    os.utime(place / HEADER, (time.time() - age, time.time() - age))
    return place


def test_what_was_not_used_for_longest_goes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, used, new = (fill(home, name, 10_000, age) for name, age in (("old", 300.0), ("used", 200.0), ("new", 100.0)))
    assert [one.source for one in cache.entries()] == ["new", "used", "old"]
    monkeypatch.setenv("FEDLOOM_CACHE_LIMIT", "35kB")
    prepared("rows", {"name": "old"}, lambda folder: {})  # found: now the one used last
    monkeypatch.setattr(cache, "_used", set())
    fill(home, "newest", 10_000, 0)
    assert not used.exists() and old.exists() and new.exists()
    monkeypatch.setenv("FEDLOOM_CACHE_LIMIT", "1 kB")
    place = fill(home, "large", 50_000, 0)
    # What this process uses stays, although it is over the limit.
    assert {one.source for one in cache.entries()} == {"large", "newest"} and place.exists()
    assert cache.clear() == (2, sum(one.bytes for one in cache.entries())) or not cache.entries()


@pytest.mark.parametrize("said", ["much", "-1", "5 GBB"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE_LIMIT", said)
    with pytest.raises(UserError, match="FEDLOOM_CACHE_LIMIT"):
        cache.cache_limit()
    monkeypatch.setenv("FEDLOOM_CACHE_LIMIT", "1.5GB")
    assert cache.cache_limit() == 1_500_000_000


def test_a_full_disk_is_told_and_leaves_nothing(home: Path) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "data").write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="does not fit") as caught:
        prepared("rows", {}, build)
    assert caught.value.code == "disk.full" and "fedloom cache --clear" in caught.value.hint
    with pytest.raises(RunError, match="does not fit"):
        prepared("rows", {}, build, keep=False)
    assert not entries(home) and not list(home.glob(".*.tmp"))


def test_a_cache_that_cannot_be_written_is_done_without(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = contents(prepare(Data(path), Split(), PLAIN, 0))
    monkeypatch.setenv("FEDLOOM_CACHE", f"{path}/below/a/file")
    assert contents(prepare(Data(path), Split(), PLAIN, 0)) == wanted
    assert "cannot be written" in caplog.text


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert cache.cache_home() == home
    monkeypatch.delenv("FEDLOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_home() == Path("/x/fedloom/prepared")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_home() == Path.home() / ".cache/fedloom/prepared"


# ---------------------------------------------------------------- the tokenizer's threads


def test_the_tokenizer_has_all_cores_while_it_works_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seen(said: str | None, quiet: bool) -> tuple[str | None, str | None]:
        for name, value in (("TOKENIZERS_PARALLELISM", said), ("FEDLOOM_TOKENIZERS", "quiet" if quiet else None)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        with tokens._all_cores():
            inside = os.environ.get("TOKENIZERS_PARALLELISM")
        return inside, os.environ.get("TOKENIZERS_PARALLELISM")

    monkeypatch.setattr(tokens, "_threads_of", {})
    assert seen(None, False) == ("true", "false")
    assert seen("false", True) == ("true", "false")
    assert seen("false", False) == ("false", "false") and seen("true", False) == ("true", "true")
    monkeypatch.setattr(tokens, "_threads_of", {"pid": os.getppid()})  # as in a process forked from that one
    assert seen("false", True) == ("false", "false")
