from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import RunError, UserError
from fedloom.study import folder as folder_module
from fedloom.study.folder import RunFolder, find_runs, is_running, json_text, read_lines, write_atomic

RECIPE = "model: builtin\nseed: 3\n"


def line(arm: str, round: int, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "round": round, "rounds": 9, "train_loss": 1 / 3, **more}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------------------- making, refusing


def test_create_writes_the_recipe_and_makes_parents(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "deep" / "x"
    with RunFolder.create(path, RECIPE) as run:
        assert run.recipe.read_text() == RECIPE
        assert sorted(entry.name for entry in path.iterdir()) == [".lock", "recipe.yaml"]
    assert find_runs(tmp_path / "runs" / "deep") == [path]
    assert find_runs(tmp_path / "absent") == []


def test_an_existing_run_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    path = tmp_path / "dolly"
    RunFolder.create(path, RECIPE).close()
    (tmp_path / "dolly-2").mkdir()
    with pytest.raises(UserError) as caught:
        RunFolder.create(path, "other: recipe\n")
    assert caught.value.code == "run.exists"
    assert caught.value.exit_code == 2
    assert "did not finish" in caught.value.message
    assert f"--resume {path}" in caught.value.hint
    assert f"output_dir={tmp_path / 'dolly-3'}" in caught.value.hint
    assert (path / "recipe.yaml").read_text() == RECIPE

    (path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="finished") as caught:
        RunFolder.create(path, RECIPE)
    assert "--resume" not in caught.value.hint
    assert f"fedloom report {path}" in caught.value.hint


def test_a_strangers_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds no run \(it has thesis\.tex\)"):
        RunFolder.create(tmp_path, RECIPE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_one_where_nothing_began_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir()
    (path / ".lock").write_text("pid 1")
    leftover = path / f".recipe.yaml.{'0' * 32}.tmp"
    leftover.write_text("mod")
    RunFolder.create(path, RECIPE).close()
    assert not leftover.exists()


def test_a_file_in_the_way_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="not a folder") as caught:
            RunFolder.create(path, RECIPE)
        assert "output_dir=DIR" in caught.value.hint


def test_no_room_for_the_recipe_leaves_a_folder_that_can_be_used_later(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with file_size_limit(5), pytest.raises(RunError, match="file size limit"):
        RunFolder.create(path, RECIPE)
    assert [entry.name for entry in path.iterdir()] == [".lock"]
    RunFolder.create(path, RECIPE).close()


def test_look_and_resume_name_the_runs_that_are_there(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", RECIPE).close()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        for open_ in (RunFolder.look, RunFolder.resume):
            with pytest.raises(UserError) as caught:
                open_(path)
            assert caught.value.code == "run.missing"
            assert str(tmp_path / "a") in caught.value.hint


# ------------------------------------------------------------------------------------------------------------- lock

HOLDER = """
import sys, time
from pathlib import Path
from fedloom.study.folder import RunFolder
run = RunFolder.resume(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_write_at_once_and_a_killed_one_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_LOCK_PATIENCE_SECONDS", 0.1)
    path = tmp_path / "x"
    RunFolder.create(path, RECIPE).close()
    assert not is_running(path)
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert is_running(path)
        with pytest.raises(RunError) as caught:
            RunFolder.resume(path)
        assert caught.value.code == "run.locked"
        assert f"pid {child.pid}" in caught.value.message
        assert RunFolder.look(path).read_rounds() == []  # readers need no lock
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert not is_running(path)
    RunFolder.resume(path).close()


def test_the_lock_holds_within_one_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_LOCK_PATIENCE_SECONDS", 0.0)
    with RunFolder.create(tmp_path / "x", RECIPE):
        with pytest.raises(RunError, match="in use"):
            RunFolder.resume(tmp_path / "x")
    RunFolder.resume(tmp_path / "x").close()


def test_a_file_system_without_locks_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_module.fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING, logger="fedloom"):
        RunFolder.create(tmp_path / "x", RECIPE).close()
    assert "has no locks" in caplog.text


# ------------------------------------------------------------------------------------------------------------ files


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    os.link(path, tmp_path / "still open")
    write_atomic(path, "neu: ü".encode())
    assert (tmp_path / "still open").read_text() == "old"  # another file took the name: no reader sees half of it
    (tmp_path / "still open").unlink()
    assert path.read_text() == "neu: ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_write_atomic_on_a_full_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def write(handle: int, data: memoryview) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RunError) as caught:
        write_atomic(path, "new")
    assert caught.value.code == "disk.full"
    assert str(path) in caught.value.message
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_other_errors_of_the_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "x", "new")


def test_json_refuses_what_other_readers_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"line\.a\[1\]\.b is nan"):
        json_text({"a": [1, {"b": float("nan")}]}, where="line")
    with pytest.raises(TypeError, match="the key 3"):
        json_text({"a": {3: 1}})
    with pytest.raises(TypeError):
        json_text({"a": object()})


# ----------------------------------------------------------------------------------------------------- rounds.jsonl


def test_rounds_are_appended_and_read_back(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        lines = [line("federated", 1, text="ü\u2028\n"), line("federated", 2)]
        for one in lines:
            run.append_round(one)
        assert run.read_rounds() == lines
        assert run.rounds.read_bytes().count(b"\n") == 2


def test_a_torn_last_line_is_left_out_and_a_torn_middle_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 1}\n{"round": 2}\n{"rou')
    assert read_lines(path) == [{"round": 1}, {"round": 2}]
    path.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_lines(path)
    path.write_text('{"round": 1}\n{"rou\n')  # a newline follows, so it was not a kill
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_lines(path)


def test_resume_cuts_the_rounds_back_to_the_checkpoints(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        for arm, rounds in (("local", 3), ("federated", 4), ("global", 1)):
            for round in range(1, rounds + 1):
                run.append_round(line(arm, round))
        with run.rounds.open("a") as file:
            file.write('{"arm": "global", "rou')
    with RunFolder.resume(tmp_path / "x") as run:
        run.keep_rounds({"local": 3, "federated": 2})
        kept = [(one["arm"], one["round"]) for one in run.read_rounds()]
        assert kept == [("local", 1), ("local", 2), ("local", 3), ("federated", 1), ("federated", 2)]
        run.append_round(line("federated", 3))
        assert run.read_rounds()[-1] == line("federated", 3)
        before = run.rounds.stat().st_ino
        run.keep_rounds({"local": 3, "federated": 3})
        assert run.rounds.stat().st_ino == before  # nothing to cut, nothing written


def test_no_room_for_a_line_leaves_the_lines_before_it(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        run.append_round(line("federated", 1))
        size = run.rounds.stat().st_size
        with file_size_limit(size + 10), pytest.raises(RunError, match="lines before this one are untouched"):
            run.append_round(line("federated", 2))
        assert run.rounds.stat().st_size == size
        run.append_round(line("federated", 2))
        assert [one["round"] for one in run.read_rounds()] == [1, 2]


def test_a_log_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        run.log("one\ntwo")
        with (run.path / "log.txt").open("a") as file:
            file.write("2026-01-01T00:00:00 cut he")
        run.log("three")
    texts = [one.partition(" ")[2] for one in (run.path / "log.txt").read_text().splitlines()]
    assert texts == ["one", "two", "cut he", "three"]


# ---------------------------------------------------------------------------------------------------------- the rest


def test_stages_and_facts(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        assert run.read_stage("local") is None
        assert run.read_stages() == {}
        assert run.read_facts() == {}
        run.write_stage("local", {"result": {"loss": 1.5}})
        run.write_stage("base", {"result": {"loss": 2.5}})
        run.write_facts({"model": {"name": "builtin"}})
        assert run.read_stage("local") == {"result": {"loss": 1.5}}
        assert list(run.read_stages()) == ["base", "local"]
        assert run.read_facts() == {"model": {"name": "builtin"}}
        (run.path / "stages" / "local.json").write_text("{")
        with pytest.raises(UserError, match=r"local\.json is damaged"):
            run.read_stage("local")


@pytest.mark.parametrize("arm", ["", "..", "a/b", "/etc", ".hidden", "a\n"])
def test_an_arm_cannot_lead_out_of_the_folder(tmp_path: Path, arm: str) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        for use in (run.checkpoints, run.read_stage):
            with pytest.raises(ValueError, match="an arm's name"):
                use(arm)


def test_resume_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        run.write_stage("local", {})
        places = [run.path, run.path / "stages", run.path / "checkpoints" / "local"]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            (place / f".result.json.{'a' * 32}.tmp").write_text("{")
            (place / f".round_00001.{'b' * 32}.tmp").mkdir()
            (place / f".round_00001.{'b' * 32}.tmp" / "state.json").write_text("{")
            (place / "mine.tmp").write_text("a stranger's")
    RunFolder.resume(tmp_path / "x").close()
    for place in places:
        assert [entry.name for entry in place.iterdir() if entry.name.endswith(".tmp")] == ["mine.tmp"]


def test_result_is_checked_before_it_is_written(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RECIPE) as run:
        with pytest.raises(ValueError, match="schema"):
            run.write_result({"schema": 2})
        assert run.read_result() is None
        run.result.write_text("[]")
        with pytest.raises(UserError, match="no JSON object"):
            run.read_result()


def test_importing_the_folder_brings_no_torch() -> None:
    code = "import sys, fedloom.study.folder, fedloom.study.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_json_of_a_round_is_one_line() -> None:
    assert "\n" not in json_text(line("a", 1, reason="a\nb"), indent=None)
    assert json.loads(json_text(line("a", 1)))["train_loss"] == 1 / 3
