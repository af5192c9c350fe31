from __future__ import annotations

import html
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from fedloom.errors import RunError, UserError
from fedloom.study import pictures
from fedloom.study.folder import RunFolder
from fedloom.study.report import write_report
from fedloom.study.result import build_result, scores

CLIENTS = [f"skill {i}" for i in range(8)]
HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{x$",
    "</text></svg><img src=x onerror=alert(1)>",
    '" onload="x',
    "{{ 7*7 }}",
    "a\x00b\x1b[31m\n",
    "https://example.org/pixel.png",
    "x" * 3000,
]
LEVELS = {"base": 0.02, "local": 0.12, "federated": 0.85, "global": 0.93}
LOSSES = {"base": 2.31, "local": 1.63, "federated": 0.402, "global": 0.351}


def an_arm(arm: str, clients: Sequence[str], scored: bool = True) -> Any:
    level = LEVELS[arm]
    own = {id: level * (0.9 + 0.01 * (i % 10)) if scored else None for i, id in enumerate(clients)}
    common = dict.fromkeys(clients, level if scored else None)
    return {**scores(common, loss=LOSSES[arm]), "own_test": scores(own, loss=LOSSES[arm] * 0.9)}


def arm_costs(arm: str) -> Any:
    wire = 231_424 if arm == "federated" else 0
    return {
        "bytes_up_per_client_round": wire,
        "bytes_down_per_client_round": wire,
        "train_tokens": 0 if arm == "base" else 800_000,
        "train_seconds": 0 if arm == "base" else 17.5,
        "tokens_per_second": 0 if arm == "base" else 45_714.0,
    }


def a_run(
    path: Path,
    clients: Sequence[str] = CLIENTS,
    arms: Sequence[str] = ("base", "local", "federated", "global"),
    rounds: int = 12,
    done: bool = True,
    scored: bool = True,
    recipe: str = "model: builtin\nseed: 42\n",
) -> RunFolder:
    run = RunFolder.create(path, recipe)
    for arm in arms:
        run.append_round({"arm": arm, "round": 0, "rounds": 0, "val_loss": 2.5, "score": None})
        for n in range(1, rounds + 1) if arm != "base" else ():
            run.append_round(
                {
                    "arm": arm,
                    "round": n,
                    "rounds": 40,
                    "cohort": 8,
                    "clients": 8 - (n == 2),
                    "failed": {clients[0]: "dropped <b>out</b>"} if n == 2 else {},
                    "train_loss": 0.4 + 2 * math.exp(-n / 4),
                    "val_loss": 0.5 + 2 * math.exp(-n / 4) if n % 2 else None,
                    "score": None,
                    "bytes_up_per_client": arm_costs(arm)["bytes_up_per_client_round"],
                    "bytes_down_per_client": arm_costs(arm)["bytes_down_per_client_round"],
                    "tokens": 20_000,
                    "seconds": 0.5,
                    "tokens_per_second": 40_000.0,
                    "slowest": [clients[-1], 1.2],
                    "learning_rate": 1e-3,
                }
            )
        if not done:
            run.write_stage(arm, {"result": an_arm(arm, clients, scored), "costs": arm_costs(arm)})
    if done:
        costs: Any = {
            **arm_costs("federated"),
            "peak_memory_bytes": 9e8,
            "trainable_parameters": 57_856,
            "total_parameters": 1_953_120,
        }
        result = build_result(
            seed=42,
            arms={arm: an_arm(arm, clients, scored) for arm in arms},
            costs=costs,
            costs_per_arm={arm: arm_costs(arm) for arm in arms},
            data={
                "source": "<i>x</i>",
                "rows_read": 6400,
                "notes": ["two words", "and more"],
                "clients": [{"id": id, "train": 640, "test": 96, "categories": {}} for id in clients],
            },
            model={"name": "builtin"},
            recipe={"model": "builtin"},
            skipped={"rows": {"empty <u>": 3, "cut": 0}},
        )
        run.write_result(result)
    return run


def page_of(path: Path, **how: Any) -> str:
    a_run(path, **how).close()
    return write_report(path).read_text(encoding="utf-8")


def words(page: str) -> str:
    """The page's text as a person reads it, on one line."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)))


class Balance(HTMLParser):
    """Complains about tags that are not closed in order, and collects what a browser would fetch or run."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def assert_sound(page: str) -> None:
    """Well formed, self-contained, inert, and drawn in the page's own colours."""
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    for tag, attributes in parser.seen:
        assert tag not in ("script", "img", "link", "iframe", "object", "image", "foreignobject")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset"), (tag, name)
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#"), (tag, value)
            assert "url(" not in (value or "").replace("url(#", ""), (tag, value)
    assert "default-src 'none'" in page
    assert "@import" not in page
    ids = [attributes["id"] for _, attributes in parser.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
        assert not set(re.findall(r"#[0-9a-f]{6}\b", " ".join(re.findall(r'style="[^"]*"', svg))))
        assert "var(--arm-" in svg
        assert "DejaVu" not in svg


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
        "skill 7 1.9 % 11.6 % 82.5 % 90.2 %",
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
    assert page.count("<svg ") == 4
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_what_comes_from_data_is_escaped(tmp_path: Path) -> None:
    recipe = "# </pre><script>alert(2)</script> {{ 7*7 }}\nmodel: builtin\n"
    page = page_of(tmp_path / "<u>x", clients=HOSTILE, recipe=recipe)
    assert_sound(page)
    assert "<script" not in page
    assert "<img" not in page
    assert "\x00" not in page
    assert "\x1b" not in page
    text = words(page)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7*7 }}" in text
    assert "49" not in re.sub(r"[\d.]*49[\d.]+|[\d.]+49[\d.]*", "", text)
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
    assert page.count("<svg ") == 4
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


def test_a_loss_that_turns_is_said(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "x", "model: builtin\n")
    for n, loss in enumerate([2.0, 1.0, 1.5, 1.6], start=1):
        run.append_round({"arm": "federated", "round": n, "rounds": 4, "train_loss": loss / 2, "val_loss": loss})
    run.close()
    text = words(write_report(tmp_path / "x").read_text(encoding="utf-8"))
    assert "validation loss falls from 2.00 to 1.60 between rounds 1 and 4; lowest in round 2 (1.00)" in text


def test_unchanged_pictures_are_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    pictures._drawn.clear()
    drawn = 0
    real = Figure.savefig

    def savefig(self: Figure, *args: Any, **how: Any) -> None:
        nonlocal drawn
        drawn += 1
        real(self, *args, **how)

    monkeypatch.setattr(Figure, "savefig", savefig)
    run = a_run(tmp_path / "x", done=False)
    write_report(tmp_path / "x")
    assert drawn == 4
    write_report(tmp_path / "x")
    assert drawn == 4
    run.append_round({**run.read_rounds()[-1], "round": 13, "val_loss": 0.2})
    write_report(tmp_path / "x")
    assert drawn == 5  # the loss alone has changed
    run.close()


def test_pictures_neither_follow_nor_change_a_users_settings(tmp_path: Path) -> None:
    pictures._drawn.clear()
    plain = page_of(tmp_path / "a")
    pictures._drawn.clear()
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "#ff0000", "text.usetex": True}):
        styled = page_of(tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 31
    svgs = [re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL) for page in (plain, styled)]
    assert svgs[0] == svgs[1]


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


def test_a_full_disk_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(tmp_path / "x").close()
    (tmp_path / "x" / "report.html").write_text("old")

    def write(handle: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RunError, match="no space left"):
        write_report(tmp_path / "x")
    assert (tmp_path / "x" / "report.html").read_text() == "old"


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
