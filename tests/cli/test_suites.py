"""The commands on a suite, and `compare`: words, streams, exit codes. Runs are stand-ins (test_suite_run.py)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from tests.study.test_suite_run import FAKE
from tests.study.test_suite_table import CELLS, a_cell, a_suite, equal_samples

from fedloom.cli import main, suites
from fedloom.models.load import random_base
from fedloom.study import suite_run
from fedloom.study.suite import SuiteCell, validate_suite_text
from fedloom.study.suite_result import read_suite
from fedloom.study.suite_run import Job

BASE = "# A recipe.\n# time: a minute\nmodel: m\ndata: {path: d.jsonl}\nlocal_steps: 3\n"
SUITE = "suite: s\nbase: one.yaml\ngrid: {lora_r: [4, 8]}\nseeds: [0, 1]\noutput_dir: out\n"


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def fedloom(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Return a function that runs a command line in a folder with the suite s.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite_run, "COMMAND", FAKE)
    monkeypatch.setattr(suite_run, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("FAKE_PLAN", str(tmp_path / "plan.json"))
    Path("one.yaml").write_text(BASE)
    Path("s.yaml").write_text(SUITE)
    Path("plan.json").write_text("{}")

    def run(*words: str) -> Said:
        capsys.readouterr()
        code = main(words)
        return Said(code, *capsys.readouterr())

    return run


def test_validate_lists_the_cells(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom("validate", "s.yaml")
    assert code == 0 and "s.yaml: sound; 4 runs in out" in out and err == "next: fedloom plan s.yaml\n"
    assert "one     4       0, 1   base, federated  a minute" in out
    found = json.loads(fedloom("validate", "s.yaml", "--format", "json").out)
    assert found["ok"] and found["cells"][0]["settings"] == {"recipe": "one", "lora_r": 4} and len(found["cells"]) == 4
    code, out, err = fedloom("validate", "s.yaml", "rounds=0", "--format", "json")
    assert code == 2 and json.loads(out)["problems"][0]["override"] == "rounds=0" and "must be >= 1" in err


@pytest.mark.parametrize("command", ["preview", "cat"])
def test_commands_on_one_run_say_what_takes_suites(fedloom: Callable[..., Said], command: str) -> None:
    code, out, err = fedloom(command, "s.yaml")
    assert (code, out) == (2, "") and "s.yaml is a suite of several runs" in err and "fedloom plan s.yaml" in err


def test_options_of_suites_are_refused_for_a_recipe(fedloom: Callable[..., Said]) -> None:
    code, _, err = fedloom("run", "one.yaml", "--jobs", "2")
    assert code == 2 and "--jobs is for suites" in err and "runtime.threads=N" in err
    code, _, err = fedloom("run", "one.yaml", "--dry-run")
    assert code == 2 and "--dry-run is for suites" in err
    assert fedloom("run", "s.yaml", "--jobs", "0").code == 2


def test_run_prints_the_table_and_what_comes_next(fedloom: Callable[..., Said]) -> None:
    Path("plan.json").write_text(json.dumps({"lora_r 8": {"loss": 0.5}, "seed 1": {"loss": 0.7}}))
    code, out, err = fedloom("run", "s.yaml", "-j", "2")
    assert code == 0
    assert "starts: one, lora_r 4, seed 0" in err and "0 left" in err and "\x1b" not in err
    lines = [line.split() for line in out.splitlines()]
    assert ["8", "base", "2.000", "±", "0.000", "2.000", "±", "0.000", "2", "–", "0.0", "%"] not in lines
    federated = next(line for line in lines if line[:1] == ["federated"] and "0.600" in line)
    assert federated[1:4] == ["0.600", "±", "0.141"]
    assert "differences between values of lora_r at equal rounds" in out
    assert "2 seeds: too few for an interval that says much" in out
    assert "written: out/report.html, out/table.md, out/table.csv, out/suite.json" in out
    code, out, err = fedloom("run", "s.yaml", "--format", "json")
    assert code == 0 and json.loads(out) == read_suite(Path("out")) and "starts" not in err
    assert fedloom("run", "out").code == 0  # the folder of a suite stands for it


def test_a_failure_is_exit_code_1_with_the_table_of_the_rest(fedloom: Callable[..., Said]) -> None:
    Path("plan.json").write_text(json.dumps({"lora_r 8, seed 1": {"code": 2}}))
    code, out, err = fedloom("run", "s.yaml")
    assert code == 1 and out == ""
    assert "fedloom: 1 of 4 runs failed; the table has the others" in err and "[suite.failed]" in err
    assert "failed: one, 8, seed 1: fedloom: no such file: x.jsonl" in err
    assert "scores at equal rounds" in err
    code, out, _ = fedloom("run", "s.yaml", "--format", "json")
    assert code == 1 and json.loads(out)["status"] == "failed"


def test_smoke_has_a_folder_of_its_own(fedloom: Callable[..., Said]) -> None:
    code, out, _ = fedloom("run", "s.yaml", "--smoke")
    assert code == 0 and "out-smoke/suite.json" in out and not Path("out").exists()


def test_plan_and_dry_run_tell_time_bytes_and_what_is_done(fedloom: Callable[..., Said]) -> None:
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"it is {i % 3}"} for i in range(80)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = random_base(hidden_size=16, num_layers=1, vocab_size=300, text=[str(row) for row in rows], max_positions=256)
    base.model.save_pretrained("m")
    base.tokenizer.save_pretrained("m")
    code, out, err = fedloom("plan", "s.yaml")
    assert code == 0 and "4 runs to do, 1 at once" in out and "training" in out and err.endswith("fedloom run s.yaml\n")
    assert not Path("out").exists()
    assert fedloom("run", "s.yaml", "seeds=0").code == 0
    found = json.loads(fedloom("run", "s.yaml", "--dry-run", "--format", "json", "-j", "2").out)
    assert [group["done"] for group in found["runs"]] == [[0], [0]]
    assert all(group["seconds_are"] == "measured" for group in found["runs"]) and found["jobs"] == 2
    assert found["runs"][0]["plan"]["bytes_up_per_client_round"] < found["runs"][1]["plan"]["bytes_up_per_client_round"]
    code, _, err = fedloom("plan", "s.yaml", "data.path=nowhere.jsonl")
    assert code == 2 and "2 of its settings cannot be run" in err and "nowhere.jsonl" in err


def test_cp_of_a_suite_names_its_schema(fedloom: Callable[..., Said]) -> None:
    code, out, _ = fedloom("cp", "suites/paper")
    assert (code, out) == (0, "paper.yaml\n")
    first = Path("paper.yaml").read_text().splitlines()[0]
    assert json.loads(Path(first.partition("$schema=")[2]).read_text())["title"] == "fedloom suite"
    assert fedloom("validate", "paper.yaml").code == 0
    assert "did you mean suites/paper?" in fedloom("validate", "suites/papr").err


def test_ls_runs_names_suites(fedloom: Callable[..., Said]) -> None:
    fedloom("run", "s.yaml", "output_dir=runs/mine", "seeds=0")
    assert "runs/mine  done  suite: 2 of 2 runs" in fedloom("ls", "runs").out


# ---- drawing


def a_job(seed: int, **settings: Any) -> Job:
    cell = SuiteCell(
        {"lora_r": 4}, seed, validate_suite_text(SUITE.replace("one.yaml", "builtin_code")).cells[0].recipe
    )
    return Job(str(seed), cell, Path("r"), Path("c"), Path("l"), **settings)


def test_the_live_line_says_what_is_left() -> None:
    jobs = [a_job(0, status="done", seconds=100.0), a_job(1, status="running"), a_job(2)]
    assert suites.seconds_left(jobs) is None
    jobs[1].process = object()  # type: ignore[assignment]
    jobs[1].seconds, jobs[1].started = 40.0, 1e12  # began in the future, so that no time passes here
    jobs[1].started = suites.time.monotonic()
    left = suites.seconds_left(jobs)
    assert left is not None and 155 < left <= 160
    text = suites.status_text(jobs, 61.0)
    assert text.startswith("1/3 done · 1 running · 1 min 01 s elapsed · about 2 min ")
    assert suites.job_text(jobs[1]).startswith("lora_r 4, seed 1 · loading · 40")
    jobs[1].progress = {"arm": "federated", "round": 3, "rounds": 9, "val_loss": 1.25}
    assert " · federated round 3/9 · val 1.250 · " in suites.job_text(jobs[1])


def test_a_narrow_terminal_keeps_what_matters_most(tmp_path: Path) -> None:
    cells = [a_cell(dict(cell.settings), cell.seed, equal_samples=equal_samples()) for cell in CELLS]
    shown = {}
    for width in (60, 250):
        console = Console(width=width, force_terminal=True, color_system=None, record=True, file=io.StringIO())
        suites.print_suite(a_suite(cells), tmp_path, console)
        shown[width] = console.export_text()
    assert "evaluation" not in shown[60] and "tok/s" in shown[250]
    assert "score" in shown[60] and " n " in shown[60]
    assert "the same at equal samples" in shown[250]
    assert "differences between arms at equal samples" in shown[250]


# ---- compare


def test_compare_in_words_and_as_data(fedloom: Callable[..., Said]) -> None:
    fedloom("run", "s.yaml", "seeds=0")
    runs = [f"out/{cell['run']}" for cell in read_suite(Path("out"))["cells"]]
    code, out, err = fedloom("compare", *runs)
    assert (code, err) == (0, "")
    assert "adapter.lora_r" not in out or "settings that differ" in out
    assert "one run each, so no intervals" in out and "federated, training" in out
    found = json.loads(fedloom("compare", *runs, "--format", "json").out)
    assert found["kind"] == "runs" and found["metrics"][0]["values"] == [2.0, 2.0]
    code, out, _ = fedloom("compare", "out", "out")
    assert code == 0 and "paired by seed" in out
    code, _, err = fedloom("compare", "out")
    assert code == 2 and "[compare.few]" in err
