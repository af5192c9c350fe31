"""What trackers are told, and that each library really keeps it, offline and without a question."""

import json
import os
import time
from pathlib import Path

import pytest

from fedloom.errors import UserError
from fedloom.study import trackers
from fedloom.study.load import read_recipe, validate_text
from fedloom.study.recipe import resolved_json
from fedloom.study.run import run_recipe
from fedloom.study.trackers import Tracked, Tracker, Trackers, flat_config, metrics_of

RECIPE = """
model: builtin
dtype: float32
data: {path: "builtin:skills", limit: 200}
split: {clients: 2}
rounds: 2
local_steps: 1
client: {per_device_train_batch_size: 2}
evaluate: {score: none, eval_rounds: 1}
arms: [base, federated]
runtime: {threads: 1}
"""


def recipe(*words: str):
    return validate_text(RECIPE, words)[0]


class Book:
    """A tracker that remembers; it may be told to fail at a round."""

    def __init__(self, fails_at: int = 99) -> None:
        self.logged: list[tuple[str, int, dict[str, float]]] = []
        self.ended: list[tuple[str, bool]] = []
        self.figures: dict[str, dict[str, float]] = {}
        self.opened: list[Tracked] = []
        self.fails_at = fails_at

    def open_tracker(self, tracked: Tracked) -> Tracker:
        self.opened.append(tracked)

        def log(round: int, metrics: dict[str, float]) -> None:
            if round == self.fails_at:
                raise ConnectionError("the server is gone\nlong story")
            self.logged.append((tracked.arm, round, dict(metrics)))

        def end(figures: dict[str, float], finished: bool) -> None:
            self.ended.append((tracked.arm, finished))
            self.figures[tracked.arm] = dict(figures)

        return Tracker(f"id-{tracked.arm}", log, end, "somewhere")


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch):
    """Put a `Book` in TensorBoard's place."""

    def put(one: Book) -> Book:
        monkeypatch.setattr(trackers, "import_module", lambda name: one)
        return one

    return put


class TestMetrics:
    def test_a_round_and_an_outcome_are_told_apart_and_what_was_not_measured_is_left_out(self) -> None:
        line = {"arm": "federated", "round": 2, "val_loss": 1.5, "train_loss": float("inf"), "score": None}
        line |= {"score_per_client": {"a": 1.0}, "failed": {"b": "why"}, "tasks": {"t": {"accuracy": 0.5, "n": None}}}
        assert metrics_of(line) == {"val/loss": 1.5, "train/failed": 1.0, "task/t/accuracy": 0.5}
        outcome = {"loss": 0.5, "score": 0.25, "score_worst": 0.0, "score_per_client": {}, "own_test": {"loss": 1.0}}
        assert metrics_of(outcome) == {"test/loss": 0.5, "test/score": 0.25, "test/score_worst": 0.0}

    def test_a_recipe_is_flattened(self) -> None:
        flat = flat_config({"a": {"b": {"c": 1}}, "d": [1, "x"], "e": True, "f": None, "g": "t"})
        assert flat == {"a.b.c": 1, "d": '[1, "x"]', "e": "true", "f": "null", "g": "t"}


class TestRecipe:
    def test_words_and_lists_are_read(self) -> None:
        assert recipe("report_to=wandb").report_to == ["wandb"]
        assert recipe("report_to=wandb,tensorboard,wandb").report_to == ["wandb", "tensorboard"]
        assert recipe("report_to=wandb").project == "fedloom"
        assert recipe().report_to == "none"

    def test_an_unknown_tracker_names_those_there_are(self) -> None:
        with pytest.raises(UserError, match="wandb"):
            recipe("report_to=wandbb")

    def test_a_project_without_a_tracker_is_refused(self) -> None:
        with pytest.raises(UserError, match="no effect"):
            recipe("project=mine")

    def test_a_library_that_is_not_there_is_told_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
        with pytest.raises(UserError) as caught:
            run_recipe(recipe("report_to=wandb,mlflow", f"output_dir={tmp_path}/run"))
        assert "pip install 'fedloom[wandb,mlflow]'" in str(caught.value)
        assert not (tmp_path / "run").exists()


class TestRun:
    def test_each_arm_is_a_run_of_its_own_with_all_rounds(self, tmp_path: Path, book) -> None:
        kept = book(Book())
        run_recipe(recipe("report_to=tensorboard", f"output_dir={tmp_path}/run"))
        assert [(arm, round) for arm, round, _ in kept.logged] == [("base", 0), *(("federated", n) for n in range(3))]
        assert kept.ended == [("base", True), ("federated", True)]
        assert kept.opened[0].config == resolved_json(read_recipe(tmp_path / "run").recipe)
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert kept.figures["federated"]["test/loss"] == result["arms"]["federated"]["loss"]
        lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
        assert kept.logged[-1][2]["train/loss"] == lines[-1]["train_loss"]

    def test_one_that_fails_is_said_once_and_the_run_goes_on(self, tmp_path: Path, book) -> None:
        kept = book(Book(fails_at=1))
        said: list[str] = []
        some = Trackers(["tensorboard"], tmp_path, "p", recipe())
        some.begin("federated", said.append)
        for round in range(3):
            some.round({"arm": "federated", "round": round, "val_loss": 1.0})
        some.end({"loss": 1.0})
        assert [round for _, round, _ in kept.logged] == [0]
        assert kept.ended == [("federated", False)]
        assert [text for text in said if "ConnectionError: the server is gone" in text] == said[1:]

    def test_a_round_logged_before_an_interruption_is_not_logged_again(self, tmp_path: Path, book) -> None:
        kept = book(Book())
        interrupted = Trackers(["tensorboard"], tmp_path, "p", recipe())
        interrupted.begin("federated", lambda text: None)
        interrupted.round({"arm": "federated", "round": 0, "val_loss": 1.0})
        interrupted.round({"arm": "federated", "round": 1, "val_loss": 1.0})
        interrupted.__exit__()
        assert kept.ended == [("federated", False)]
        with Trackers(["tensorboard"], tmp_path, "p", recipe()) as some:
            some.begin("federated", lambda text: None)
            for round in (1, 2):
                some.round({"arm": "federated", "round": round, "val_loss": 1.0})
            some.end({"loss": 1.0})
        assert [round for _, round, _ in kept.logged] == [0, 1, 2]
        assert (kept.opened[-1].id, kept.opened[-1].first_round) == ("id-federated", 2)

    def test_one_that_cannot_be_opened_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Broken:
            @staticmethod
            def open_tracker(tracked: Tracked) -> Tracker:
                raise ValueError("no such project")

        monkeypatch.setattr(trackers, "import_module", lambda name: Broken)
        with pytest.raises(UserError, match="wandb cannot be opened: ValueError: no such project"):
            Trackers(["wandb"], tmp_path, "p", recipe()).begin("base", lambda text: None)


def tracked_twice(name: str, folder: Path) -> Trackers:
    """Three rounds with an interruption after the first."""
    lines = [{"arm": "federated", "round": round, "val_loss": 3.0 - round} for round in range(3)]
    first = Trackers([name], folder, "clinic", recipe())
    first.begin("federated", lambda text: None)
    first.round(lines[0])
    first.end({}, finished=False)
    second = Trackers([name], folder, "clinic", recipe())
    second.begin("federated", lambda text: None)
    for line in lines[1:]:
        second.round(line)
    second.end({"loss": 0.5, "score": 0.75})
    return second


class TestLibraries:
    """Against the real libraries, each with its own offline store."""

    @pytest.fixture(autouse=True)
    def nobody_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def asked(*prompt: object) -> str:
            raise AssertionError(f"asked: {prompt}")

        monkeypatch.setattr("builtins.input", asked)
        monkeypatch.setattr("getpass.getpass", asked)
        for name in [name for name in os.environ if name.startswith(("WANDB", "MLFLOW", "TRACKIO"))]:
            monkeypatch.delenv(name)

    def test_tensorboard(self, tmp_path: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        tracked_twice("tensorboard", tmp_path)
        events = accumulator.EventAccumulator(str(tmp_path / "trackers" / "tensorboard" / "federated"))
        events.Reload()
        assert [(one.step, one.value) for one in events.Scalars("val/loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
        assert [(one.step, one.value) for one in events.Scalars("test/score")] == [(2, 0.75)]

    def test_mlflow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("mlflow")
        pytest.importorskip("sqlalchemy")
        from mlflow.tracking import MlflowClient

        (tmp_path / "run").mkdir()
        tracked_twice("mlflow", tmp_path / "run")
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        [run] = client.search_runs([client.get_experiment_by_name("clinic").experiment_id])
        assert run.info.run_name == "run/federated"
        assert run.info.status == "FINISHED"
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "val/loss")] == [
            (0, 3.0),
            (1, 2.0),
            (2, 1.0),
        ]
        assert run.data.metrics["test/score"] == 0.75
        assert run.data.params["adapter.lora_r"] == "8"

    def test_wandb_is_offline_without_a_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("wandb")
        monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        tracked_twice("wandb", tmp_path)
        files = sorted((tmp_path / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
        assert len(files) == 2
        assert len({file.name for file in files}) == 1  # the same run, so that a sync joins them
        texts = [b"", b""]
        until = time.monotonic() + 30  # wandb's own process writes, and may be a moment behind
        while b"test/score" not in texts[1] and time.monotonic() < until:
            time.sleep(0.05)
            texts = [file.read_bytes() for file in files]
        assert 0 < texts[0].count(b"val/loss") < texts[1].count(b"val/loss")
        assert [b"test/score" in text for text in texts] == [False, True]

    def test_wandb_finds_a_key_without_asking(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from fedloom.study.trackers.wandb_runs import has_key

        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert not has_key()
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
        assert has_key()
        monkeypatch.setenv("WANDB_BASE_URL", "https://tracks.example.org")
        assert not has_key()
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        assert has_key()

    def test_trackio(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        import sqlite3
        import subprocess
        import sys

        pytest.importorskip("trackio")
        # In a process of its own: trackio reads where its files lie when it is imported.
        code = "import sys; from pathlib import Path; from tests.study.test_trackers import tracked_twice; " \
               "tracked_twice('trackio', Path(sys.argv[1]))"  # fmt: skip
        place = tmp_path / "trackio"
        environment = {**os.environ, "TRACKIO_DIR": str(place)}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        with sqlite3.connect(place / "clinic.db") as store:
            found = store.execute("select step, metrics from metrics order by step, id").fetchall()
        rows = [(step, json.loads(text)) for step, text in found]
        assert [row for row in rows if "val/loss" in row[1]] == [
            (0, {"val/loss": 3.0}),
            (1, {"val/loss": 2.0}),
            (2, {"val/loss": 1.0}),
        ]
        assert rows[-1] == (2, {"test/loss": 0.5, "test/score": 0.75})
