"""Driving a suite's runs: at once, within memory, once only, stopped and gone on with. Most runs here are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedloom.errors import RunError, TimeoutOrTooFewClients, UserError
from fedloom.study import suite_run
from fedloom.study.folder import RunFolder
from fedloom.study.suite import validate_suite_text
from fedloom.study.suite_result import SuiteResult, read_suite

FAKE = [sys.executable, "-S", str(Path(__file__).with_name("fake_fedloom.py"))]
BASE = "model: m\ndata: {path: d.jsonl}\nlocal_steps: 3\n"
SUITE = "suite: s\nbase: one.yaml\ngrid: {lora_r: [4, 8]}\nseeds: [0, 1]\noutput_dir: out\n"


class Heard:
    """A display that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.at_once = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def draw(self, jobs: Any, started: float) -> None:
        self.at_once = max(self.at_once, sum(job.process is not None for job in jobs))

    @property
    def text(self) -> str:
        return "\n".join(self.said)


class Place(NamedTuple):
    """A folder in which stand-ins run."""

    folder: Path
    run: Callable[..., SuiteResult]
    heard: Heard

    def plan(self, settings: dict[str, dict[str, Any]] | None = None) -> None:
        """What the stand-ins do, by parts of their names; later ones win."""
        (self.folder / "plan.json").write_text(json.dumps(settings or {}))

    def events(self, what: str) -> list[str]:
        lines = [json.loads(line) for line in (self.folder / "plan.events").read_text().splitlines()]
        return [line["name"] for line in lines if line["what"] == what]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite_run, "COMMAND", FAKE)
    monkeypatch.setattr(suite_run, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("FAKE_PLAN", str(tmp_path / "plan.json"))
    (tmp_path / "one.yaml").write_text(BASE)
    heard = Heard()

    def run(text: str = SUITE, *overrides: str, **settings: Any) -> SuiteResult:
        return suite_run.run_suite(validate_suite_text(text, overrides), display=heard, **settings)

    made = Place(tmp_path, run, heard)
    made.plan()
    return made


def test_every_cell_is_run_and_the_table_has_them(place: Place) -> None:
    place.plan({"seed 1": {"loss": 0.6}, "lora_r 8": {"loss": 0.5}})
    found = place.run()
    assert found["status"] == "done" and [cell["status"] for cell in found["cells"]] == ["done"] * 4
    assert found == read_suite(Path("out"))
    assert [(cell["settings"]["lora_r"], cell["seed"]) for cell in found["cells"]] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    rows = {(row["settings"]["lora_r"], row["arm"]): row for row in found["table"] if row["metric"] == "loss"}
    assert rows[4, "federated"]["values"] == {"0": 1.0, "1": 0.6} and rows[4, "federated"]["n"] == 2
    assert rows[8, "federated"]["values"] == {"0": 0.5, "1": 0.5}
    assert rows[8, "base"]["values"] == {"0": 2.0, "1": 2.0}
    assert rows[4, "federated"]["costs"]["bytes_up"] == 200 and rows[4, "federated"]["costs"]["train_seconds"] == 3.5
    assert {path.name for path in Path("out").iterdir()} == {
        ".lock", "report.html", "suite.yaml", "suite.json", "table.md", "table.csv", "cells", "logs", "base", "runs"
    }  # fmt: skip
    run = Path("out", found["cells"][0]["run"])
    assert (run / "result.json").is_file()
    assert "a line for the log" in (Path("out") / "logs" / f"{run.name}.log").read_text()
    assert place.events("starts") == ["one, lora_r 4, seed 0", "one, lora_r 8, seed 0", "one, lora_r 4, seed 1",
                                      "one, lora_r 8, seed 1"]  # fmt: skip


def test_a_suite_may_go_without_a_page(place: Place) -> None:
    place.run(SUITE, "report=false", "seeds=0")
    assert not Path("out/report.html").exists() and Path("out/table.md").is_file()


def test_what_is_done_is_not_run_again_also_in_another_suite(place: Place) -> None:
    place.run(SUITE, "run_store=store", "seeds=0")
    place.run(SUITE, "run_store=store", "seeds=0")
    assert len(place.events("starts")) == 2
    again = place.run("suite: other\nbase: one.yaml\nset: {lora_r: 4}\nseeds: [0, 1]\nrun_store: store\n")
    assert place.events("starts")[2:] == ["one, seed 1"]
    assert again["cells"][0]["run"].startswith("../../store/")
    assert again["cells"][0]["seconds"] == 3.5  # by its own result
    assert "2 runs; 1 done already" in place.heard.text


def test_other_data_or_settings_are_other_runs(place: Place) -> None:
    Path("d.jsonl").write_text("{}\n")
    first = place.run(SUITE, "seeds=0", "grid.lora_r=[4]")
    Path("d.jsonl").write_text("{} \n")
    second = place.run(SUITE, "seeds=0", "grid.lora_r=[4]")
    third = place.run(SUITE, "seeds=0", "grid.lora_r=[4]", "rounds=3")
    assert len({found["cells"][0]["id"] for found in (first, second, third)}) == 3
    assert len(place.events("starts")) == 3


def test_cells_that_are_the_same_are_run_once(place: Place) -> None:
    text = "suite: s\nbase: one.yaml\ngrid: {a: {x: {lora_r: 8}, y: {}}}\nseeds: [0]\noutput_dir: out\n"
    found = place.run(text)
    assert len(place.events("starts")) == 1 and len(found["cells"]) == 2
    assert "1 runs for 2 cells (1 are the same as others)" in place.heard.text


def test_a_failed_run_is_told_and_the_others_go_on(place: Place) -> None:
    place.plan({"lora_r 8": {"code": 2}})
    with pytest.raises(RunError, match="2 of 4 runs failed; the table has the others") as failed:
        place.run()
    assert failed.value.exit_code == 1
    found = read_suite(Path("out"))
    assert found["status"] == "failed"
    assert [cell["status"] for cell in found["cells"]] == ["done", "done", "failed", "failed"]
    assert found["cells"][2]["reason"] == "fedloom: no such file: x.jsonl\n  fetch it\n  [data.missing]"
    assert "    fedloom: no such file: x.jsonl" in place.heard.said
    assert {row["settings"]["lora_r"] for row in found["table"]} == {4}
    assert "no such file: x.jsonl" in Path("out/table.md").read_text()
    place.plan()
    assert place.run()["status"] == "done"
    assert place.events("resumes") == ["one, lora_r 8, seed 0", "one, lora_r 8, seed 1"]  # and no other again


def test_the_first_goes_alone_until_a_round_tells_its_memory(place: Place) -> None:
    place.plan({"seed 0": {"sleep": 0.5, "loading": True}, "seed": {"sleep": 0.5}})
    text = SUITE.replace("[0, 1]", "[0, 1, 2]")
    place.run(text, jobs=3)
    lines = [json.loads(line) for line in Path("plan.events").read_text().splitlines()]
    assert [line["what"] for line in lines][:2] == ["starts", "ends"]  # nothing beside the first
    assert place.heard.at_once == 3
    recipe = next(Path("out/cells").glob("*.yaml")).read_text()
    assert f"threads: {max(1, suite_run.available_cores() // 3)}" in recipe


def test_too_little_memory_for_two_is_one_after_the_other(place: Place) -> None:
    place.plan({"seed": {"sleep": 0.1}})
    place.run(SUITE, "limits.memory_gb=0.015", jobs=4)  # a stand-in takes 10 MB
    assert place.heard.at_once == 1
    other = Heard()
    suite_run.run_suite(validate_suite_text(SUITE, ["output_dir=b", "memory_gb=0.2"]), jobs=4, display=other)
    assert other.at_once == 4


def test_a_run_that_the_system_kills_beside_others_goes_on_alone(place: Place) -> None:
    place.plan({"seed": {"sleep": 0.3}, "lora_r 8, seed 0": {"kill": True}})
    found = place.run(jobs=2)
    assert found["status"] == "done"
    assert "killed, for want of memory it seems: one, lora_r 8, seed 0; it goes on alone later" in place.heard.said
    lines = [json.loads(line) for line in Path("plan.events").read_text().splitlines()]
    place_of = next(number for number, line in enumerate(lines) if line["what"] == "resumes")
    assert lines[place_of + 1]["what"] == "ends" and "lora_r 8, seed 0" in lines[place_of + 1]["name"]


def test_the_limit_of_time_stops_what_runs_and_the_next_call_goes_on(place: Place) -> None:
    place.plan({"seed": {"sleep": 30}})
    with pytest.raises(TimeoutOrTooFewClients, match=r"limit of 0.01 minutes was reached: 4 of 4 runs are not done"):
        place.run(SUITE, "limits.minutes=0.01")
    found = read_suite(Path("out"))
    assert found["status"] == "stopped"
    assert sorted(cell["status"] for cell in found["cells"]) == ["stopped", "waiting", "waiting", "waiting"]
    place.plan()
    assert place.run()["status"] == "done"
    assert place.events("resumes") == ["one, lora_r 4, seed 0"]


DRIVE = """
import sys
from fedloom.study import suite_run
from fedloom.study.suite import read_suite_file
suite_run.COMMAND = {fake!r}
try:
    suite_run.run_suite(read_suite_file("s.yaml"), jobs=2)
except Exception as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def _driver(place: Place) -> subprocess.Popen[str]:
    (place.folder / "s.yaml").write_text(SUITE)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVE.format(fake=FAKE)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def _starts(place: Place) -> int:
    return len(place.events("starts")) if (place.folder / "plan.events").exists() else 0


def test_ctrl_c_lets_runs_finish_their_round_and_leaves_nobody_behind(place: Place) -> None:
    place.plan({"seed": {"sleep": 30}})
    driver = _driver(place)
    _until(lambda: _starts(place) == 2)
    os.kill(driver.pid, signal.SIGINT)
    _, said = driver.communicate(timeout=20)
    assert driver.returncode == 130 and "stopped: 4 of 4 runs are not done" in said
    assert sorted(place.events("ends")) == sorted(place.events("starts"))
    assert (
        sorted(cell["status"] for cell in read_suite(Path("out"))["cells"]) == ["stopped", "stopped"] + ["waiting"] * 2
    )
    place.plan()
    assert place.run()["status"] == "done"
    assert sorted(place.events("resumes")) == ["one, lora_r 4, seed 0", "one, lora_r 8, seed 0"]


def test_ctrl_c_three_times_kills_what_does_not_listen(place: Place) -> None:
    place.plan({"seed": {"sleep": 30, "deaf": True}})
    driver = _driver(place)
    _until(lambda: _starts(place) == 2)
    for _ in range(3):
        os.kill(driver.pid, signal.SIGINT)
        time.sleep(0.4)
    _, said = driver.communicate(timeout=20)
    assert driver.returncode == 130 and "are not done" in said


def test_a_driver_that_was_killed_is_gone_on_with_where_its_runs_are(place: Place) -> None:
    place.plan({"seed 0": {"sleep": 1.0}})
    driver = _driver(place)
    _until(lambda: _starts(place) == 2)
    driver.kill()
    driver.communicate()
    found = place.run()  # its runs go on by themselves, and are waited for
    assert found["status"] == "done"
    assert len(place.events("starts")) == 4 and not place.events("resumes")


def test_one_process_at_a_time_in_a_suites_folder(place: Place) -> None:
    place.run()
    with RunFolder.hold(Path("out")), pytest.raises(RunError, match="out is in use: this suite is being run") as used:
        place.run()
    assert used.value.code == "suite.locked"


def test_a_strangers_folder_is_left_alone(place: Place) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no suite") as refused:
        place.run()
    assert refused.value.exit_code == 2
    assert [path.name for path in Path("out").iterdir()] == ["thesis.tex"]
    place.run(SUITE, "output_dir=b")
    with pytest.raises(UserError, match="b holds the suite s, and this one is t"):
        place.run(SUITE, "output_dir=b", "suite=t")


def test_smoke_is_each_setting_once(place: Place) -> None:
    found = place.run(smoke=True)
    assert [(cell["settings"]["lora_r"], cell["seed"]) for cell in found["cells"]] == [(4, 0), (8, 0)]
    assert not Path("out").exists()
    assert all(cell["run"].endswith("-smoke") for cell in found["cells"])
    lines = [json.loads(line) for line in Path("plan.events").read_text().splitlines()]
    assert all("--smoke" in line["words"] for line in lines)


def test_a_suite_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands in for anything here but a small model."""
    from fedloom.models.load import random_base

    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"it is {i % 3}"} for i in range(24)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = random_base(hidden_size=16, num_layers=1, vocab_size=300, text=[str(row) for row in rows], max_positions=256)
    base.model.save_pretrained("m")
    base.tokenizer.save_pretrained("m")
    Path("one.yaml").write_text(BASE + "rounds: 1\nsplit: {clients: 2}\nlearning_rate: 1e-2\nscore: none\nthreads: 1\n")
    suite = validate_suite_text("suite: real\nbase: one.yaml\nseeds: [0]\noutput_dir: out\n")
    found = suite_run.run_suite(suite)
    assert found["status"] == "done"
    rows_found = {(row["arm"], row["metric"]): row for row in found["table"] if row["comparison"] == "rounds"}
    assert rows_found["federated", "loss"]["mean"] < rows_found["base", "loss"]["mean"]
    assert rows_found["federated", "loss"]["costs"]["bytes_up"] > 0
    assert found["cells"][0]["peak_memory_bytes"] > 10**8
    assert found["cells"][0]["cpu_seconds"] > 0.5 and "of processor time" in Path("out/table.md").read_text()
    again = suite_run.run_suite(suite)
    assert again["table"] == found["table"] and again["cells"] == found["cells"]
