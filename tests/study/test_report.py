from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
from tests.study.folders import HOSTILE, a_run, add_measurements
from tests.study.pages import NotDrawn, assert_sound, words

from fedloom.errors import RunError, UserError
from fedloom.study import draw
from fedloom.study.folder import RunFolder
from fedloom.study.report import write_picture, write_report

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # of a picture that found no room for its parts


@pytest.fixture
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures out, which take most of the time."""
    monkeypatch.setattr(draw, "_drawn", NotDrawn())


def page_of(path: Path, **how: Any) -> str:
    a_run(path, **how).close()
    return write_report(path).read_text(encoding="utf-8")


def test_the_report_of_a_finished_run_says_what_was_found(tmp_path: Path) -> None:
    page = page_of(tmp_path / "demo")
    assert_sound(page)
    text = words(page)
    for said in (
        "demo finished Federated reaches 85 %, 73 points above local and 8 points below global.",
        "Highest is global 93 %, federated 85 %, local 12 %, base 2 %",
        "Federated validation loss falls from 2.50 to 0.63 between rounds 0 and 11",
        "Every client does better with the federation than training alone; smallest gain +66 points (skill 0)",
        "A client sends 231 kB and receives 231 kB a round, 34 times less than all weights",
        "231 kB (231,424 bytes)",
        "federated all clients together, data stays where it is 85.0 % 79.5 % 76.5 %",
        "skill 7 640 1.9 % 11.6 % 82.5 % 90.2 %",
        "rows read 6,400",
        "two words and more",
        "clients train test skill 0 640 96 skill 1 640 96",
        "Every random draw comes from seed 42.",
        "model: builtin seed: 42",
        "dropped <b>out</b>",
        "rows, empty <u> 3",
        "torch ",
    ):
        assert said in text, said
    assert page.count("<svg ") == 6
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_what_comes_from_data_is_escaped(tmp_path: Path) -> None:
    recipe = "# </pre><script>alert(2)</script> {{ 7*7 }}\nmodel: builtin\n"
    a_run(tmp_path / "<u>x", clients=HOSTILE, recipe=recipe, categories=HOSTILE).close()
    add_measurements(tmp_path / "<u>x")
    page = write_report(tmp_path / "<u>x").read_text(encoding="utf-8")
    assert_sound(page)
    assert page.count("<script") == 1  # our own
    assert "<img" not in page
    assert "\x00" not in page
    assert "\x1b" not in page
    text = words(page)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7*7 }}" in text
    assert "{{ 7*7 }}" in text and not re.search(r"(?<![\d.,])49(?![\d.,])", text)
    assert "<u>x finished" in text


def test_the_report_of_a_run_that_goes_on(tmp_path: Path) -> None:
    run = a_run(tmp_path / "x", arms=("base", "local"), done=False)
    for n in (1, 2):
        run.append_round({**run.read_rounds()[2], "arm": "federated", "round": n, "bytes_up_per_client": 231_424})
    page = write_report(tmp_path / "x").read_text(encoding="utf-8")
    assert_sound(page)
    assert "x running, federated round 2/40 Local reaches 12 %, 10 points above base." in words(page)
    assert "federated: round 2/40 · 8/8 clients" in words(page)
    run.close()
    assert "x stopped, federated round 2/40" in words(write_report(tmp_path / "x").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("not_drawn")
def test_what_arms_that_are_done_have_is_shown_before_the_end(tmp_path: Path) -> None:
    run = a_run(tmp_path / "x", arms=("base", "local"), done=False)
    stage = run.read_stage("local") or {}
    outcome = {
        "rounds": 12,
        "planned_rounds": 40,
        "stopped_early": True,
        "best_round": 9,
        "best_by": "loss",
        "round": 9,
    }
    run.write_stage("local", {**stage, "tasks": {"mmlu": {"accuracy": 0.31}}, "outcome": outcome})
    run.close()
    text = words(write_report(tmp_path / "x").read_text(encoding="utf-8"))
    assert "Benchmark tasks arm mmlu local 31.0 %" in text
    assert "local 12 40 yes 9 9 loss" in text


def test_a_picture_that_fails_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.study import run as runs

    def fail(_: Path) -> None:
        raise ZeroDivisionError("a drawing")

    said: list[str] = []
    with a_run(tmp_path / "x", arms=("base",), rounds=1) as folder:
        runner = SimpleNamespace(folder=folder, display=SimpleNamespace(message=said.append), reported=0.0)
        monkeypatch.setattr(runs, "write_report", fail)
        runs._Runner._report(runner, force=True)  # type: ignore[arg-type]
        assert "report.html was not written: ZeroDivisionError: a drawing; try `fedloom report" in said[0]
        assert "ZeroDivisionError" in (tmp_path / "x" / "log.txt").read_text()

        def full(_: Path) -> None:
            raise RunError("no space left")

        monkeypatch.setattr(runs, "write_report", full)
        with pytest.raises(RunError, match="no space left"):
            runs._Runner._report(runner, force=True)  # type: ignore[arg-type]


def test_the_report_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "x", "model: builtin\n").close()
    page = write_report(tmp_path / "x").read_text(encoding="utf-8")
    assert_sound(page)
    assert "No round has ended yet." in words(page)
    assert "<svg" not in page
    with RunFolder.resume(tmp_path / "x") as run:
        run.append_round({"arm": "base", "round": 0, "rounds": 0, "val_loss": 2.5, "score": None})
    page = write_report(tmp_path / "x").read_text(encoding="utf-8")
    assert_sound(page)
    assert "No round has ended yet." in words(page)
    assert "base: round 0 · val 2.500" in words(page)


@pytest.mark.usefixtures("not_drawn")
def test_a_base_alone_is_no_headline_once_training_goes_on(tmp_path: Path) -> None:
    run = a_run(tmp_path / "x", arms=("base",), done=False)
    for n, loss in enumerate([2.5, 2.0]):
        line = {"arm": "federated", "round": n, "rounds": 3, "val_loss": loss, "train_loss": loss if n else None}
        run.append_round(line)
    run.close()
    text = words(write_report(tmp_path / "x").read_text(encoding="utf-8"))
    assert "round 1/3 Federated validation loss falls from 2.50 to 2.00 between rounds 0 and 1." in text
    assert "Base gives every client 2 %" in text


def test_one_round_and_one_client_are_enough_for_pictures(tmp_path: Path) -> None:
    page = page_of(tmp_path / "x", clients=["only"], arms=("federated",), rounds=1)
    assert_sound(page)
    assert page.count("<svg ") == 4  # one arm has nobody to be compared with by cost, and one client no partition
    assert "Federated gives the client 76 %" in words(page)
    assert "Federated validation loss falls from 2.50 to 2.06 between rounds 0 and 1" in words(page)


def test_without_scores_the_loss_is_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path / "x", scored=False)
    assert_sound(page)
    text = words(page)
    assert "Federated ends at a loss of 0.402 (base 2.310, local 1.630, global 0.351)." in text
    assert "Lowest is global 0.351, federated 0.402, local 1.630, base 2.310" in text
    assert "worst client" not in text


def test_many_clients_get_curves_and_a_bounded_table(tmp_path: Path) -> None:
    clients = [f"site-{i:04d}" for i in range(1000)]
    page = page_of(tmp_path / "x", clients=clients, arms=("base", "local", "federated"), rounds=3)
    assert_sound(page)
    assert "share of the clients, from the worst to the best" in page
    assert "800 more are in result.json" in page
    assert len(page) < 1_000_000


def test_what_is_measured_by_client_and_task_and_after_equal_samples_is_shown(tmp_path: Path) -> None:
    a_run(tmp_path / "x", categories=["law", "mail", "news"]).close()
    add_measurements(tmp_path / "x")
    page = write_report(tmp_path / "x").read_text(encoding="utf-8")
    assert_sound(page)
    text = words(page)
    for said in (
        "Federated validation score rises from 0 % to 80 % between rounds 0 and 11",
        "Federated gsm8k exact match rises from 0 % to 27 % between rounds 0 and 11",
        "The worst tenth of the clients is 6 points below the mean in federated round 11",
        "Clients hold 2 to 3 of 3 categories; their divergence from the pool is 0.41 of 1 (an even deal: 0.03)",
        "Clients' median rows have 20 to 55 tokens; their divergence from the pool is 0.05 of 1",
        "its model had seen 9,600 samples",
        "federated 2 9.6k 76.5 % 71.5 % 68.8 %",
        "arm gsm8k mmlu: accuracy mmlu: perplexity base 0.7 % 25.5 % 9.5",
        "federated 8 79.5 % 76.5 % 76.5 % 79.5 % 82.5 % 1.9",  # spread: mean, worst tenth, worst, median, best, std
        "federated 8 0.392 0.462 0.462 0.392 0.322 0.046",  # and of the losses, where the worst is the largest
        "federated 231 kB 231 kB 22.0 MB 22.0 MB 12 77k 9.6k 800k 17.5 s 0.8 s 6.5 s 0.3 s 46k 900 MB 3.2 TFLOP 2.96 %",
        "federated 12 40 yes 9 9 loss 0.71",
        "rows by category 0.410 0.520 0.030 0.300 0.500 0.100",
        "skill 7 640 1.9 % 11.6 % 82.5 % 90.2 % 2.657 1.875 0.462 0.404",
    ):
        assert said in text, said
    assert page.count("<svg ") == 10
    assert "skill 7: median 55 tokens, 10 to 90 % 27 to 110" in page


def test_pictures_have_names_and_values_to_hover(tmp_path: Path) -> None:
    page = page_of(tmp_path / "x", rounds=3)
    titles = re.findall(r"<(?:circle|rect)[^>]*><title>([^<]*)</title>", page)
    for said in (
        "federated: 85.0 %",
        "local, round 3: validation loss 1.445",
        "skill 2, federated: 78.2 %",
        "federated: 85.0 % for 17.5 s",
        "federated, sent: 231,424 bytes",
        "skill 3: 640 rows",
    ):
        assert said in titles, said
    svg = re.search(r'<svg viewBox="0 0 [\d.]+ [\d.]+" role="img" aria-labelledby="loss-is"', page)
    assert svg and '<h3 id="loss-is">Federated validation loss falls' in page


@pytest.mark.usefixtures("not_drawn")
def test_many_clients_keep_the_worst_in_the_table(tmp_path: Path) -> None:
    run = a_run(tmp_path / "x", clients=[f"site-{i:04d}" for i in range(1000)], arms=("federated",), rounds=1)
    result = run.read_result() or {}
    result["arms"]["federated"]["own_test"]["score_per_client"]["site-0500"] = 0.01
    run.write_result(result)
    run.close()
    page = write_report(tmp_path / "x").read_text(encoding="utf-8")
    clients = page[page.index('<h2 id="clients">') : page.index("<h2>The run")]
    assert "site-0500" in clients and clients.count("<tr>") == 201
    assert "The 100 that fare best and the 100 that fare worst; 800 more are in result.json." in words(clients)


def test_without_categories_sizes_are_shown(tmp_path: Path) -> None:
    run = a_run(tmp_path / "x", arms=("federated",), rounds=1)
    result = run.read_result() or {}
    for place, client in enumerate(result["data"]["clients"]):
        client["train"] = 100 * (place + 1)
    run.write_result(result)
    run.close()
    page = write_report(tmp_path / "x").read_text(encoding="utf-8")
    assert_sound(page)
    assert "Clients train on 100 to 800 rows, half of them on 500 or fewer" in words(page)
    assert "skill 7: 800 rows" in page


@pytest.mark.usefixtures("not_drawn")
def test_a_report_takes_no_place_of_another_file(tmp_path: Path) -> None:
    a_run(tmp_path / "x", arms=("base",), rounds=1).close()
    notes = tmp_path / "notes.html"
    notes.write_text("<title>mine</title>")
    with pytest.raises(UserError, match="no report of fedloom's, so it stays"):
        write_report(tmp_path / "x", notes)
    assert notes.read_text() == "<title>mine</title>"
    notes.unlink()
    assert write_report(tmp_path / "x", notes).read_text() == write_report(tmp_path / "x", notes).read_text()


@pytest.mark.usefixtures("not_drawn")
def test_halves_of_letters_do_not_stop_a_report(tmp_path: Path) -> None:
    a_run(tmp_path / "x", arms=("base",), rounds=1).close()
    path = tmp_path / "x" / "result.json"
    path.write_text(path.read_text().replace('"<i>x</i>"', '"a\\ud83db\\u0007"'))
    page = write_report(tmp_path / "x").read_text(encoding="utf-8")
    assert "a\ufffdb\ufffd" in words(page)


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_quality_against_bytes_as_a_file(tmp_path: Path, suffix: str, start: bytes) -> None:
    a_run(tmp_path / "x", rounds=2).close()
    picture = write_picture(tmp_path / "x", tmp_path / f"q{suffix}")
    assert picture.read_bytes().startswith(start)
    if suffix == ".svg":
        text = picture.read_text()
        assert "sent and received by all clients" in text and "#0067a8" in text and "var(--" not in text


def test_a_picture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path / "x", arms=("base", "local"), rounds=2).close()
    with pytest.raises(UserError, match=r"ends with \.jpg, and a picture is written as \.svg, \.png, \.pdf"):
        write_picture(tmp_path / "x", tmp_path / "q.jpg")
    with pytest.raises(UserError, match="there is no folder"):
        write_picture(tmp_path / "x", tmp_path / "absent" / "q.svg")
    with pytest.raises(UserError, match="no arm that is done has sent any bytes"):
        write_picture(tmp_path / "x", tmp_path / "q.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("not_drawn")
def test_a_loss_that_turns_is_said(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "x", "model: builtin\n")
    for n, loss in enumerate([2.0, 1.0, 1.5, 1.6], start=1):
        run.append_round({"arm": "federated", "round": n, "rounds": 4, "train_loss": loss / 2, "val_loss": loss})
    run.close()
    text = words(write_report(tmp_path / "x").read_text(encoding="utf-8"))
    assert "validation loss falls from 2.00 to 1.60 between rounds 1 and 4; lowest in round 2 (1.00)" in text


def test_unchanged_pictures_are_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    draw._drawn.clear()
    drawn = 0
    real = Figure.savefig

    def savefig(self: Figure, *args: Any, **how: Any) -> None:
        nonlocal drawn
        drawn += 1
        real(self, *args, **how)

    monkeypatch.setattr(Figure, "savefig", savefig)
    run = a_run(tmp_path / "x", done=False)
    write_report(tmp_path / "x")
    assert drawn == 5
    write_report(tmp_path / "x")
    assert drawn == 5
    run.append_round({**run.read_rounds()[-1], "round": 13, "val_loss": 0.2})
    write_report(tmp_path / "x")
    assert drawn == 6  # the loss alone has changed
    run.close()


def test_pictures_neither_follow_nor_change_a_users_settings(tmp_path: Path) -> None:
    draw._drawn.clear()
    plain = page_of(tmp_path / "a")
    draw._drawn.clear()
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "#ff0000", "text.usetex": True}):
        styled = page_of(tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 31
    svgs = [re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL) for page in (plain, styled)]
    assert svgs[0] == svgs[1]


@pytest.mark.usefixtures("not_drawn")
def test_destinations(tmp_path: Path) -> None:
    a_run(tmp_path / "x").close()
    assert write_report(tmp_path / "x") == tmp_path / "x" / "report.html"
    (tmp_path / "out").mkdir()
    assert write_report(tmp_path / "x", tmp_path / "out") == tmp_path / "out" / "report.html"
    assert write_report(tmp_path / "x", tmp_path / "out" / "a.html").is_file()
    with pytest.raises(UserError, match="there is no folder"):
        write_report(tmp_path / "x", tmp_path / "absent" / "a.html")
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "absent")


@pytest.mark.usefixtures("not_drawn")
def test_a_full_disk_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(tmp_path / "x").close()
    (tmp_path / "x" / "report.html").write_text("old")

    def write(handle: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RunError, match="no space left"):
        write_report(tmp_path / "x")
    assert (tmp_path / "x" / "report.html").read_text() == "old"


@pytest.mark.usefixtures("not_drawn")
def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    a_run(tmp_path / "x").close()
    (tmp_path / "x" / "result.json").write_text('{"schema": 1, "arms"')
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        write_report(tmp_path / "x")


def test_importing_the_report_brings_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, fedloom.study.report; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
