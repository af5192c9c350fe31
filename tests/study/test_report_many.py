"""The pages of several runs and of suites."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.study.folders import HOSTILE, a_run, a_suite, add_measurements
from tests.study.pages import NotDrawn, assert_sound, words

from fedloom.errors import UserError
from fedloom.study import draw
from fedloom.study.report import write_picture, write_report
from fedloom.study.suite_result import read_suite

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures out, which take most of the time."""
    monkeypatch.setattr(draw, "_drawn", NotDrawn())


def three_runs(folder: Path) -> list[Path]:
    runs = [folder / name for name in ("rank4", "rank16", "prompt")]
    for run, level, wire, settings in zip(
        runs,
        (0.78, 0.86, 0.55),
        (60_000, 231_424, 8_000),
        ({"kind": "lora", "lora_r": 4}, {"kind": "lora", "lora_r": 16}, {"kind": "prompt"}),
        strict=True,
    ):
        a_run(run, level=level, wire=wire, settings={"adapter": settings}, rounds=3).close()
    return runs


def test_runs_are_set_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = three_runs(tmp_path)
    add_measurements(runs[0])
    add_measurements(runs[1])
    assert write_report(runs) == Path("report.html")
    page = Path("report.html").read_text(encoding="utf-8")
    assert_sound(page)
    text = words(page)
    for said in (
        "3 runs Federated reaches 86 % in rank16 and 55 % in prompt.",
        "Each run is one seed",
        "run adapter.kind adapter.lora_r rank4 lora 4 rank16 lora 16 prompt prompt –",
        "rank16 federated 86.0 % 80.4 %",
        "rank4 federated 60.0 kB 60.0 kB 1.4 MB 1.4 MB",
        "rank16 reaches 86 % for 10.6 MB",
        "Federated validation loss ends lowest in rank4 (1.44)",
        "Federated validation score ends highest in rank4",
        "rank4 federated 28.3 % 46.2 % 9.5",
        "Within each run: its arms where each of its models has seen the same number of samples. run arm round",
        "Resolved recipe of prompt",
    ):
        assert said in text, said
    assert page.count("<svg ") == 4
    assert "rank4, federated: 78.0 % for 2.8 MB" in page  # to hover over


@pytest.mark.usefixtures("not_drawn")
def test_settings_are_the_rows_when_few_runs_differ_in_much(tmp_path: Path) -> None:
    for run, settings in (("a", {"x": 1, "y": "p", "z": [1]}), ("b", {"x": 2, "y": "q", "z": [2, 3]})):
        a_run(tmp_path / run, settings=settings, rounds=1, arms=("base",)).close()
    text = words(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "setting a b x 1 2 y p q z 1 2, 3" in text


@pytest.mark.usefixtures("not_drawn")
def test_equal_names_are_told_apart_and_a_run_stands_there_once(tmp_path: Path) -> None:
    for place in ("one", "two"):
        a_run(tmp_path / place / "run", rounds=1, arms=("base",)).close()
    runs = [tmp_path / "one" / "run", tmp_path / "two" / "run", tmp_path / "one" / "run"]
    text = words(write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "2 runs" in text and "one/run" in text and "two/run" in text
    assert "The runs do not differ in their settings." in text


def test_runs_on_other_data_and_unfinished_ones_are_marked(tmp_path: Path) -> None:
    for name, digest, done in (("a", "1", True), ("b", "2", False)):
        run = a_run(tmp_path / name, rounds=2, done=done, recipe="model: builtin\nseed: 42\nrounds: 3\n")
        run.write_facts({"data_digest": digest})
        run.close()
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").read_text(encoding="utf-8")
    assert_sound(page)
    text = words(page)
    assert "The runs do not share their data" in text and "Not finished: b." in text
    assert "b federated 85.0 %" in text  # an arm that is done is shown


def test_what_comes_from_several_runs_is_escaped(tmp_path: Path) -> None:
    recipe = "# </script><script>alert(2)</script>\nmodel: builtin\n"
    runs = [tmp_path / "<img src=x>", tmp_path / "$b$"]
    for place, run in enumerate(runs):
        a_run(run, clients=HOSTILE, rounds=3, recipe=recipe, settings={"</td><script>": HOSTILE[place]}).close()
    page = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
    assert_sound(page)
    assert page.count("<script") == 1 and "<img" not in page
    assert "</td><script> <img src=x> <script>alert(1)</script>" in words(page)


# -------------------------------------------------------------------------------------------------------------- suites


def test_the_page_of_a_suite(tmp_path: Path) -> None:
    a_suite(tmp_path / "paper")
    assert write_report(tmp_path / "paper") == tmp_path / "paper" / "report.html"
    page = (tmp_path / "paper" / "report.html").read_text(encoding="utf-8")
    assert_sound(page)
    text = words(page)
    suite = read_suite(tmp_path / "paper")
    rounds, samples = ([one for one in suite["table"] if one["comparison"] == kind] for kind in ("rounds", "samples"))
    row = next(one for one in rounds if one["arm"] == "federated" and one["metric"] == "score")
    assert f"builtin_code lora federated {100 * row['mean']:.1f} ± {100 * row['std']:.1f} %" in text
    later = next(one for one in samples if one["arm"] == "federated" and one["metric"] == "score")
    assert f"builtin_code lora federated {100 * later['mean']:.1f} ± {100 * later['std']:.1f} %" in text
    for said in (
        "paper finished By score, federated is better than local in 6 of 6; ",
        "18 of 18 runs done 3 seeds each",
        "3 941 kB 941 kB 226 MB 226 MB 22.5 s 0.7 s 4.1 s 247k 8.2k 898 MB 2.9 TFLOP 12.1 % 30",  # every row's costs
        "builtin_code: lora reaches 87 % for 452 MB",
        "Notes Equal samples: local at its end",
        "fedloom run",
        "cores 2",
        "011a7f3c2d1 builtin_code prompt 1 done",
    ):
        assert said in text, said
    for verdict in ("** federated better", "~ not resolved"):
        assert verdict in text, verdict
    assert re.search(
        r"federated − local builtin_code lora score, equal rounds \+\d+\.\d points \+\d+\.\d to \+\d", text
    )
    assert re.search(r"adapter: lora − prompt federated builtin_code – score, equal samples", text)
    assert page.count("<svg ") == 6
    assert re.search(r"<title>federated − global, builtin_code, lora, equal rounds: −[\d.]+ points \(−", page)
    assert len(page) < 500_000


@pytest.mark.usefixtures("not_drawn")
def test_marks_follow_the_files_verdict(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "s", recipes=["r"], adapters=["a"], arms=("local", "federated"), seeds=(0, 1))
    suite = json.loads((folder / "suite.json").read_text())
    for one in suite["differences"]:
        one.update(mean=-0.02, low=-0.03, high=-0.01, p=0.01, p_holm=0.2, resolved=True, resolved_holm=False)
    (folder / "suite.json").write_text(json.dumps(suite))
    text = words(write_report(folder).read_text(encoding="utf-8"))
    assert "By score, federated is 2 points below local." in text
    assert "federated − local score, equal rounds −2.0 points −3.0 to −1.0 * local better, not after Holm" in text
    assert "federated − local loss, equal rounds −0.020 −0.030 to −0.010 * federated better, not after Holm" in text
    assert "Two seeds" in text
    for one in suite["differences"]:
        one.update(low=-0.05, high=0.01, resolved=False)
    (folder / "suite.json").write_text(json.dumps(suite))
    text = words(write_report(folder).read_text(encoding="utf-8"))
    assert "federated is 2 points below local (not resolved)." in text
    assert "−2.0 points −5.0 to +1.0 ~ not resolved" in text


@pytest.mark.usefixtures("not_drawn")
def test_a_suite_that_goes_on_or_failed_says_so(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "s", failed=2, running=3, seeds=(0, 1))
    text = words(write_report(folder).read_text(encoding="utf-8"))
    assert "running (7 of 12 runs)" in text
    assert "2 of 12 runs failed, and their seeds are missing from the means." in text
    assert "fedloom: loss is nan <b>in</b> round 3" in text


def test_a_suite_before_its_first_run_has_ended(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "s", seeds=(0,))
    suite: Any = json.loads((folder / "suite.json").read_text())
    suite.update(table=[], differences=[], status="running")
    for one in suite["cells"]:
        one.update(status="waiting", seconds=None)
    (folder / "suite.json").write_text(json.dumps(suite))
    page = write_report(folder).read_text(encoding="utf-8")
    assert_sound(page)
    assert "No run has ended yet." in words(page)
    assert "<svg" not in page


def test_names_of_a_suite_are_escaped(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "<script>s", recipes=HOSTILE[:2], adapters=HOSTILE[2:4])
    page = write_report(folder).read_text(encoding="utf-8")
    assert_sound(page)
    assert page.count("<script") == 1 and "<img" not in page
    assert "</text></svg><img src=x onerror=alert(1)>" in words(page)


def test_a_long_suite_is_cut_and_says_so(tmp_path: Path) -> None:
    names = [f"r{i:02d}" for i in range(15)]
    folder = a_suite(tmp_path / "s", recipes=names, adapters=["a", "b", "c"], arms=("local", "federated", "global"))
    page = write_report(folder).read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    suite = read_suite(folder)
    more = len(suite["differences"]) - 200
    assert f"{more:,} more rows are in suite.json." in words(page)
    assert "The first 40 of 45 are shown." in words(page)


@pytest.mark.usefixtures("not_drawn")
def test_a_suite_among_others_stands_for_its_runs(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "s", recipes=["r"], adapters=["a"], seeds=(0, 1))
    with pytest.raises(UserError, match=r"none of the runs of .* is there yet"):
        write_report([folder, folder], tmp_path / "r.html")
    for cell in read_suite(folder)["cells"]:
        a_run(folder / cell["run"], rounds=1).close()
    a_run(tmp_path / "other", rounds=1).close()
    text = words(write_report([folder, tmp_path / "other"], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "3 runs" in text and "other federated 85.0 %" in text
    assert "seed 0 federated 85.0 %" in text and "seed 1 federated" in text


def test_the_picture_of_a_suite_has_a_panel_per_task(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "s")
    text = write_picture(folder, tmp_path / "q.svg").read_text()
    assert "builtin_code" in text and "builtin_skills" in text and "p-tuning" in text


def test_damaged_suites_are_named(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "s", recipes=["r"], adapters=["a"])
    (folder / "suite.json").write_text('{"schema": 1')
    with pytest.raises(UserError, match=r"suite\.json is damaged"):
        write_report(folder)
