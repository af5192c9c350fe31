from __future__ import annotations

import io
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom.cli.display import (
    Pace,
    RichDisplay,
    equal_samples_table,
    next_commands,
    print_result,
    result_table,
    stderr_console,
    watch,
)
from fedloom.errors import UserError
from fedloom.study import progress
from fedloom.study.folder import RunFolder
from fedloom.study.progress import Display, Silent, round_text
from fedloom.study.result import Result, build_result, check_result, scores

LINE = {
    "arm": "federated",
    "round": 12,
    "rounds": 50,
    "cohort": 4,
    "clients": 4,
    "failed": {},
    "train_loss": 1.412,
    "val_loss": 1.377,
    "score": None,
    "bytes_up_per_client": 8_000_000,
    "bytes_down_per_client": 8_000_000,
    "tokens": 1_964_000,
    "seconds": 47.9,
    "tokens_per_second": 41_000.0,
    "slowest": ["c07", 1.38],
    "learning_rate": 2e-4,
}
ROW = (
    "round 12/50 · 4/4 clients · train 1.412 · val 1.377 (-0.011) · up 8.0 MB/client · 41k tok/s"
    " · slowest c07 +38 % · 47.9 s"
)


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=40, highlight=False), file


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=140, highlight=False, legacy_windows=False), file


def a_result(status: Any = "done", **more: Any) -> Result:
    arms: dict[str, Any] = {}
    for arm, mean in (("global", 0.93), ("federated", 0.85), ("base", 0.0), ("local", 0.12)):
        own = scores({"c0": mean, "c1": mean / 2}, loss=1.5 - mean)
        arms[arm] = {**scores({"c0": mean, "c1": mean}, loss=1.6 - mean), "own_test": own}
    arm_costs: dict[str, Any] = {
        "bytes_up_per_client_round": 230_000,
        "bytes_down_per_client_round": 240_000,
        "train_tokens": 1_000_000,
        "train_seconds": 31.2,
        "tokens_per_second": 32_000.0,
    }
    nothing: dict[str, Any] = dict.fromkeys(arm_costs, 0)
    costs: Any = {
        **arm_costs,
        "peak_memory_bytes": 900_000_000,
        "trainable_parameters": 49_152,
        "total_parameters": 1_900_000,
    }
    parts: dict[str, Any] = {
        "seed": 42,
        "arms": arms,
        "costs": costs,
        "costs_per_arm": {arm: arm_costs if arm != "base" else nothing for arm in arms},
        "data": {},
        "model": {"name": "builtin"},
        "recipe": {"model": "builtin"},
        "status": status,
    }
    return build_result(**{**parts, **more})


# ---------------------------------------------------------------------------------------------------------- the row


def test_the_row_of_a_round_is_the_one_in_the_manual() -> None:
    assert round_text(LINE, last_val_loss=1.388) == ROW


def test_what_was_not_measured_is_left_out() -> None:
    line = {**LINE, "val_loss": None, "slowest": None, "tokens_per_second": 0, "bytes_up_per_client": 0, "rounds": None}
    assert round_text(line) == "round 12 · 4/4 clients · train 1.412 · 47.9 s"
    assert "val 1.377 · up" in round_text(LINE)  # the first validation has nothing to compare with
    assert "val 1.377 (+0.000)" in round_text(LINE, 1.377)


def test_failed_clients_and_scores_are_in_the_row() -> None:
    line = {**LINE, "clients": 2, "failed": {f"c{i}": "dropped out" for i in range(5)}, "score": 0.734}
    row = round_text(line)
    assert "2/4 clients" in row
    assert "score 73.4 %" in row
    assert row.endswith("failed: c0 (dropped out), c1 (dropped out), c2 (dropped out) and 2 more")


def test_numbers_read_well() -> None:
    assert [progress.amount(x) for x in (0, 999.4, 999.6, 9_949, 9_951, 999_499, 999_501, 5e9, 2e15)] == [
        *("0", "999", "1.0k", "9.9k", "10k", "999k", "1.0M", "5.0G", "2000.0T"),
    ]
    assert [progress.byte_text(x) for x in (0, 999, 1_000, 8e6, 99_960_000, 1e9, 3e12)] == [
        *("0 B", "999 B", "1.0 kB", "8.0 MB", "100 MB", "1.0 GB", "3.0 TB"),
    ]
    assert [progress.duration(x) for x in (0, 59.94, 59.96, 60, 3599.6, 86_400, 172_800)] == [
        *("0.0 s", "59.9 s", "1 min 00 s", "1 min 00 s", "1 h 00 min", "24 h 00 min", "2 d 00 h"),
    ]


# ------------------------------------------------------------------------------------------------------ the display


def drive(display: Display) -> None:
    display.plan(["model builtin, 1.9 M parameters", "8 clients"])
    display.message("one prompt as the model sees it")
    display.arm("federated", 50)
    for done in range(3):
        display.advance(done, 3, "local steps")
    display.round({**LINE, "round": 11, "val_loss": 1.388, "slowest": ["[red]c\x1b[7m", 1.1]})
    display.round(LINE)
    display.end({})


def test_without_a_terminal_there_are_exactly_the_lines() -> None:
    console, file = plain()
    drive(RichDisplay(console))
    lines = file.getvalue().splitlines()
    assert lines[:4] == [
        "model builtin, 1.9 M parameters",
        "8 clients",
        "one prompt as the model sees it",
        "federated: 50 rounds",
    ]
    assert len(lines) == 6
    assert lines[5] == ROW  # whole, though the console is 40 wide
    assert "\x1b" not in file.getvalue()
    assert "slowest [red]c\ufffd[7m +10 %" in lines[4]


def test_no_terminal_means_no_escape_codes_even_when_colour_is_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    drive(RichDisplay())
    print_result(a_result(), Path("runs/x"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ROW in captured.err
    assert "\x1b" not in captured.err
    assert not stderr_console().is_terminal


def test_on_a_terminal_a_live_line_runs_and_the_cursor_comes_back() -> None:
    console, file = terminal()
    with RichDisplay(console, rounds={"federated": 50, "global": 10}) as display:
        drive_until_round(display)
        status = "\n".join(str(part) for part in display._status_lines(100))
        assert re.search(
            r"federated round 13/50 · \d+\.\d s elapsed · 3[0-9] min \d\d s left · ends .*\d\d:\d\d", status
        )
        display.advance(1, 4, "clients")
        assert len(display._status_lines(100)) == 2
    text = file.getvalue()
    assert ROW in text
    assert "\x1b[?25l" in text
    assert text.rstrip("\n").rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def drive_until_round(display: Display) -> None:
    display.arm("federated", 50)
    display.round({**LINE, "round": 11, "val_loss": 1.388})
    display.round(LINE)


def test_the_cursor_comes_back_after_an_error() -> None:
    console, file = terminal()
    display = RichDisplay(console)

    def interrupted() -> None:
        with display:
            display.arm("federated", 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    display.close()  # twice does no harm


def test_time_left_counts_the_clock_and_later_arms() -> None:
    pace = Pace(100.0)
    assert pace.left(10, 105.0) is None
    pace.tick(110.0, 8.0)  # two seconds of evaluation beside the round
    pace.tick(120.0, 8.0)
    assert pace.left(3, 120.0) == pytest.approx(30.0)
    assert pace.left(3, 124.0) == pytest.approx(26.0)
    assert pace.left(0, 150.0) == 0.0
    replayed = Pace(0.0)
    for _ in range(20):
        replayed.tick(0.0, 4.0)
    assert replayed.left(2, 0.0) == pytest.approx(8.0)

    display = RichDisplay(plain()[0])
    display.arm("federated", 7)
    display.round({"arm": "federated", "round": 0, "rounds": 7, "val_loss": 2.0, "score": None})
    assert display._pace.left(7, time.monotonic()) is None  # a measurement before round 1 is no round
    display = RichDisplay(plain()[0], rounds={"local": 5, "federated": 7, "global": 9})
    display.arm("federated", 7)
    display.round({**LINE, "round": 3})
    assert display._rounds_left() == 4 + 9


def test_silent_is_a_display(capsys: pytest.CaptureFixture[str]) -> None:
    drive(Silent())
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------------------- the table


def test_the_table_has_the_arms_in_order_and_all_figures() -> None:
    console, file = plain()
    print_result(a_result(), Path("runs/my demo"), console)
    text = file.getvalue()
    rows = [line.split() for line in text.splitlines() if line.split() and line.split()[0] in a_result()["arms"]]
    assert [row[0] for row in rows] == ["base", "local", "federated", "global"]
    assert " ".join(rows[2]) == "federated 85.0 % 63.7 % 42.5 % 21.2 0.750 230 kB 240 kB 31.2 s 32k"
    assert rows[0][-4:] == ["–"] * 4  # the base trains and sends nothing
    assert "samples" not in text.split("own test, worst")[0]  # an older result does not say
    assert "equal" not in text
    assert "fedloom report 'runs/my demo'" in text  # ready to paste, so quoted
    assert "--resume" not in text
    assert "chat" not in text  # there is no adapter yet


def with_everything() -> Result:
    """A result as runs write it now: samples, FLOPs, benchmarks, equal samples, outcomes."""
    plain_result: Any = json.loads(json.dumps(a_result()))
    arms = plain_result["arms"]
    costs = plain_result["costs_per_arm"]
    for arm, cost in costs.items():
        if arm != "base":
            cost.update(samples=480, samples_per_model=120.0 if arm == "local" else 480.0, flops=1.5e12)
    early = {**scores({"c0": 0.4, "c1": 0.4}, loss=1.2), "own_test": scores({"c0": 0.4}, loss=1.2)}
    compared = {arm: {"round": 10, "samples": 120.0, "result": arms[arm]} for arm in arms}
    compared["base"].update(round=0, samples=0.0)
    compared["federated"].update(round=3, samples=144.0, result=early)
    ended = {"rounds": 10, "planned_rounds": 10, "stopped_early": False, "best_round": 10, "best_by": "loss"}
    ended |= {"best_value": 0.7, "round": 10}
    return a_result(
        arms=arms,
        costs_per_arm=costs,
        tasks={arm: {"gsm8k": {"accuracy": 0.125, "answered": 1.0}} for arm in ("base", "federated")},
        equal_samples={"samples": 120, "arms": compared},
        outcomes={
            "local": {**ended, "best_round": 4},
            "federated": {**ended, "rounds": 6, "stopped_early": True, "best_round": 5, "round": 5},
            "global": ended,
        },
    )


def test_both_comparisons_are_printed_with_the_samples_that_a_model_saw() -> None:
    console, file = plain()
    print_result(with_everything(), Path("x"), console)
    text = file.getvalue()
    first, second = text.split("after equal samples: 120 for each model")
    assert "at the end of each arm" in first, "one has stopped early"
    same = with_everything()
    same["outcomes"]["federated"]["rounds"] = 10
    console, file = plain()
    print_result(same, Path("x"), console)
    assert "after equal rounds" in file.getvalue()
    row = next(line.split() for line in first.splitlines() if line.strip().startswith("federated"))
    assert " ".join(row) == "federated 85.0 % 63.7 % 42.5 % 21.2 12.5 % 0.750 480 230 kB 240 kB 31.2 s 1.5e+12 32k"
    assert next(line.split() for line in first.splitlines() if line.strip().startswith("local"))[10] == "120"
    row = next(line.split() for line in second.splitlines() if line.strip().startswith("federated"))
    assert " ".join(row) == "federated 40.0 % 40.0 % 40.0 % 0.0 1.200 144 3"
    assert next(line.split() for line in second.splitlines() if line.strip().startswith("base"))[-2:] == ["–", "–"]
    lines = second.splitlines()
    assert "federated: stopped early, after round 6 of 10" in lines
    assert "federated: its best state by loss, after round 5, is what is shown" in lines
    assert "local: its last state is shown; by loss that after round 4 was better" in lines
    assert not [line for line in lines if line.startswith("global:")]


def test_a_run_without_scores_has_no_score_columns() -> None:
    nothing = {**scores({"c0": None}, loss=2.0), "own_test": scores({}, loss=None)}
    console, file = plain()
    print_result(
        a_result(arms={"federated": nothing}, skipped={"rows": {"local[x]": "no \x1b[31mtime", "y": 0}}),
        Path("x"),
        console,
    )
    assert "score" not in file.getvalue()
    assert "2.000" in file.getvalue()
    assert "skipped rows, local[x]: no \ufffd[31mtime" in file.getvalue()
    assert "rows, y" not in file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    console.print(result_table(with_everything(), width))
    console.print(equal_samples_table(with_everything()["equal_samples"], width))
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert not any("…" in line for line in lines)


def test_next_commands_fit_the_run(tmp_path: Path) -> None:
    assert next_commands(a_result("stopped"), tmp_path)[0] == f"fedloom run --resume {tmp_path}"
    (tmp_path / "adapter").mkdir()
    commands = next_commands(a_result(), tmp_path)
    assert commands[0] == f"fedloom chat {tmp_path}"
    assert commands[1].endswith("--format merged")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    assert not any("merged" in command for command in next_commands(a_result(), tmp_path))
    (tmp_path / "model").mkdir()  # its own weights were trained: a model already
    assert next_commands(a_result(), tmp_path)[:2] == [f"fedloom chat {tmp_path}", f"fedloom report {tmp_path}"]


# -------------------------------------------------------------------------------------------------------- result.json


def test_the_result_names_every_difference_to_its_form() -> None:
    result: dict[str, Any] = json.loads(json.dumps(a_result()))
    assert check_result(result) == result
    assert set(result) >= {"schema", "fedloom_version", "seed", "arms", "costs", "skipped"}
    result["arms"]["local"]["score"] = 12.0
    del result["costs"]["train_tokens"]
    result["costs"]["typo"] = 1
    result["arms"]["base"]["loss"] = float("inf")
    with pytest.raises(ValueError) as caught:
        check_result(result)
    for place in ("arms.local.score:", "costs.train_tokens: Field required", "costs.typo:", "arms.base.loss:"):
        assert place in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ watch


def test_watch_follows_a_run_to_its_result(tmp_path: Path) -> None:
    path = tmp_path / "x"
    run = RunFolder.create(path, "model: builtin\n")
    run.append_round({**LINE, "round": 1, "val_loss": 1.388})
    console, file = plain()
    watcher = threading.Thread(target=watch, args=(path,), kwargs={"console": console, "interval": 0.02})
    watcher.start()
    try:
        wait_for(lambda: "round 1/50" in file.getvalue())
        run.append_round(LINE)
        wait_for(lambda: ROW in file.getvalue())
        assert watcher.is_alive()
        run.write_result(a_result())
    finally:
        run.close()
        watcher.join(60)
    assert not watcher.is_alive()
    assert file.getvalue().count("round 12/50") == 1
    assert re.search(r"federated +85\.0 %", file.getvalue())


def wait_for(met: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_watch_of_a_run_that_has_died_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "x"
    RunFolder.create(path, "model: builtin\n").close()
    console, file = plain()
    watch(path, console=console)
    assert "is not running and has no result; no round has ended yet" in file.getvalue()
    assert f"fedloom run --resume {path}" in file.getvalue()


def test_watch_gives_json_on_standard_output(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with RunFolder.create(path, "model: builtin\n") as run:
        run.append_round(LINE)
        console, file = plain()
        out = io.StringIO()
        watch(path, console=console, format="json", out=out, follow=False)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [LINE]
    assert file.getvalue() == ""
    with pytest.raises(UserError, match="neither text nor json"):
        watch(path, format="xml")
    with pytest.raises(UserError, match="no run folder"):
        watch(tmp_path / "absent")
