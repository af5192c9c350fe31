"""Commands on a real, tiny run: run, resume, plan, preview, eval, chat, generate, export, watch, report."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import transformers

from fedloom.adapters import Lora
from fedloom.cli import main
from fedloom.errors import RunError, UserError
from fedloom.models.load import load_base, random_base
from fedloom.study.tuned import evaluate_run, export_merged, open_tuned

WORDS = ["apple", "stone", "river", "cloud", "horse", "bread", "night"]
RECIPE = """\
model: model
dtype: float32
data: {path: data.jsonl, max_length: 256, val_set_size: 0.1, test_set_size: 0.1}
split: {kind: by_category}
rounds: 2
local_steps: 2
learning_rate: 1e-2
arms: [base, federated]
evaluate: {eval_rounds: 1, score: exact, max_new_tokens: 4, limit: 2}
threads: 1
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data, and a run that is done."""
    home = tmp_path_factory.mktemp("runs")
    rows = [
        {"instruction": f"Say {word} {i} times", "input": "", "output": f"{word} {i}", "category": "ab"[i % 2]}
        for i, word in enumerate((WORDS * 9)[:60])
    ]
    base = random_base(hidden_size=32, num_layers=2, vocab_size=300, text=[str(row) for row in rows], max_positions=256)
    base.model.save_pretrained(home / "model")
    base.tokenizer.save_pretrained(home / "model")
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "tiny.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["run", "tiny.yaml"]) == 0
    return home


@pytest.fixture
def fedloom(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Return a function that runs a command line in that folder."""
    monkeypatch.chdir(place)

    def run(*words: str, stdin: str = "") -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(words)
        return Said(code, *capsys.readouterr())

    return run


def test_run_says_its_plan_then_rounds_then_the_table(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, err = fedloom("run", "tiny.yaml", "output_dir=runs/second", "--seed", "7")
    assert code == 0
    for part in ("model  ", "adapter", "tokens", "bytes", "round 1/2 · 2/2 clients", "round 2/2"):
        assert part in err
    assert err.index("model  ") < err.index("round 1/2")
    for part in ("base", "federated", "report: runs/second/report.html", "fedloom chat runs/second"):
        assert part in out
    assert "\x1b" not in out + err and "Traceback" not in err
    assert json.loads((place / "runs" / "second" / "result.json").read_text())["seed"] == 7
    shutil.rmtree(place / "runs" / "second")


def test_run_json_puts_the_result_alone_on_stdout(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, _ = fedloom("run", "tiny.yaml", "--format", "json", "output_dir=runs/j", "arms=base")
    assert code == 0 and json.loads(out) == json.loads((place / "runs" / "j" / "result.json").read_text())
    shutil.rmtree(place / "runs" / "j")


def test_a_run_folder_that_exists_is_left_alone(fedloom: Callable[..., Said], place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place / "runs" / "tiny").rglob("*")}
    code, _, err = fedloom("run", "tiny.yaml")
    assert code == 2 and "runs/tiny holds a run already, which is finished" in err and "[run.exists]" in err
    assert {path: path.stat().st_mtime_ns for path in (place / "runs" / "tiny").rglob("*")} == before


def test_a_finished_run_has_nothing_to_resume(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom("run", "--resume", "runs/tiny")
    assert code == 0 and "nothing is left to do" in err and "federated" in out


def test_smoke_goes_through_every_step(fedloom: Callable[..., Said], place: Path) -> None:
    code, _, err = fedloom("run", "tiny.yaml", "--smoke", "rounds=500")
    assert code == 0 and "round 1/1" in err
    smoke = place / "runs" / "tiny-smoke"
    assert {"adapter", "result.json", "report.html", "checkpoints"} <= {path.name for path in smoke.iterdir()}
    assert fedloom("run", "tiny.yaml", "--smoke")[0] == 0, "a smoke run never stands in the way of the next"
    for path in place.glob("runs/tiny-smoke*"):
        shutil.rmtree(path)


def test_ctrl_c_stops_cleanly_and_resume_goes_on(place: Path) -> None:
    code = "import sys; from fedloom.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "run", "tiny.yaml", "output_dir=runs/stopped", "rounds=500"],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if line.startswith("round 1/500"):
            child.send_signal(signal.SIGINT)
    child.stderr.close()
    assert child.stdout is not None
    child.stdout.close()
    assert child.wait(60) == 130
    text = "".join(said)
    assert "fedloom run --resume runs/stopped" in text and "Traceback" not in text
    rounds = len((place / "runs" / "stopped" / "rounds.jsonl").read_text().splitlines())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        recipe = place / "runs" / "stopped" / "recipe.yaml"
        recipe.write_text(re.sub(r"(?m)^rounds: 500", "rounds: 12", recipe.read_text()))  # enough to see it go on
        assert main(["run", "--resume", "runs/stopped"]) == 0
    lines = [json.loads(line) for line in (place / "runs" / "stopped" / "rounds.jsonl").read_text().splitlines()]
    assert rounds > 1 and [line["round"] for line in lines if line["arm"] == "federated"] == list(range(13))
    shutil.rmtree(place / "runs" / "stopped")


# ---- plan and preview


def test_plan_counts_what_a_run_costs(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, _ = fedloom("plan", "tiny.yaml", "--format", "json")
    plan = json.loads(out)
    costs = json.loads((place / "runs" / "tiny" / "result.json").read_text())["costs"]
    assert code == 0 and (plan["clients"], plan["rounds"], plan["clients_per_round"]) == (2, 2, 2)
    assert plan["trainable_parameters"] == costs["trainable_parameters"]
    assert plan["bytes_up_per_client_round"] == costs["bytes_up_per_client_round"]
    # The header of a broadcast names the cohort, so its length changes a little from round to round.
    assert plan["bytes_down_per_client_round"] == pytest.approx(costs["bytes_down_per_client_round"], abs=100)
    code, out, err = fedloom("plan", "tiny.yaml", "--no-probe")
    assert code == 0 and "trainable parameters" in out and "tokens/s" not in out and "fedloom run tiny.yaml" in err


def test_preview_shows_who_holds_what_and_what_is_trained(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom("preview", "tiny.yaml", "--examples", "2")
    assert code == 0 and "read as alpaca, 60 rows; 2 clients (by_category)" in out
    assert out.count("<masked>") == 2 and out.count("<trained>") == 2 and "█" in out
    assert re.search(r"(?m)^ *a +24 ", out), "24 of 30 rows of a client are for training"
    assert "fedloom plan tiny.yaml" in err
    shown = json.loads(fedloom("preview", "tiny.yaml", "--format", "json").out)
    short = fedloom("preview", "tiny.yaml", f"max_length={shown['lengths']['max'] - 2}", "--examples", "48").out
    assert "<cut>" in short and not re.search(r" 0 rows cut", short)
    assert [client["id"] for client in shown["clients"]] == ["a", "b"]
    assert [piece["shade"] for piece in shown["examples"][0]["pieces"]] == ["masked", "trained"]


# ---- what to do with a run


def test_eval_measures_again_what_the_run_measured(fedloom: Callable[..., Said], place: Path) -> None:
    arms = json.loads((place / "runs" / "tiny" / "result.json").read_text())["arms"]
    code, out, _ = fedloom("eval", "runs/tiny", "--format", "json")
    (found,) = json.loads(out)
    assert code == 0 and found["loss"] == pytest.approx(arms["federated"]["loss"], rel=1e-5)
    assert found["score_per_client"] == arms["federated"]["score_per_client"]
    (base,) = json.loads(fedloom("eval", "runs/tiny", "--base", "--format", "json").out)
    assert base["loss"] == pytest.approx(arms["base"]["loss"], rel=1e-5) and base["loss"] > found["loss"]


def test_eval_on_other_data(fedloom: Callable[..., Said], place: Path) -> None:
    rows = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS]
    (place / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = fedloom("eval", "runs/tiny", "--tasks", "other.jsonl", "--limit", "3", "--score", "none")
    assert code == 0 and "other.jsonl: 7 rows, score: none" in out
    home = place / "home" / "alpaca-cleaned"
    home.mkdir(parents=True)
    (home / "alpaca_data_cleaned.json").write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLOOM_DATA", str(home.parent))
        code, out, _ = fedloom("eval", "runs/tiny", "--tasks", "alpaca-cleaned", "--limit", "3", "--score", "none")
    assert code == 0 and "alpaca-cleaned: 7 rows, score: none" in out
    (place / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    code, _, err = fedloom("eval", "runs/tiny", "--tasks", "pairs.jsonl")
    assert code == 2 and "pairs of a chosen and a rejected answer" in err
    code, _, err = fedloom("eval", "runs/tiny", "--tasks", "nowhere.jsonl")
    assert code == 2 and "nowhere.jsonl: no such file" in err
    code, _, err = fedloom("eval", "runs/tiny", "--score", "exacct")
    assert code == 2 and "did you mean 'exact'?" in err


def test_eval_asks_a_run_and_its_base_benchmarks(fedloom: Callable[..., Said], place: Path) -> None:
    rows = [{"question": f"Say {word}", "choices": WORDS, "answer": word} for word in WORDS]
    (place / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--tasks", "multiple_choice=choices.jsonl,exact=data.jsonl", "--limit", "5", "--batch-size", "3")
    code, out, err = fedloom("eval", "runs/tiny", *asked)
    kept = place / "runs" / "tiny" / "eval"
    assert code == 0 and "runs/tiny/eval/multiple_choice_limit5.jsonl" in err and "accuracy_norm" in out
    assert fedloom("eval", "runs/tiny", "--base", *asked).code == 0
    heads, items = {}, {}
    for which in (kept, kept / "base"):
        head, *lines = map(json.loads, (which / "multiple_choice_limit5.jsonl").read_text().splitlines())
        heads[which], items[which] = head["model"], [line["loglikelihoods"] for line in lines]
    assert (heads[kept]["measured"], heads[kept / "base"]["measured"]) == ("tuned", "base")
    assert heads[kept]["dtype"] == "float32" and "adapter_sha256" not in heads[kept / "base"]
    assert items[kept] != items[kept / "base"] and len(items[kept]) == 5
    head, *lines = map(json.loads, (kept / "exact_limit5.jsonl").read_text().splitlines())
    assert head["summary"].keys() >= {"accuracy", "accuracy/a", "accuracy/b"} and len(lines) == 10
    # Data and a benchmark in one call; a file that the run's own test rows are not.
    code, out, _ = fedloom(
        "eval", "runs/tiny", "--tasks", "data.jsonl,exact=data.jsonl", "--limit", "2", "--format", "json"
    )
    first, second = json.loads(out)
    assert code == 0 and (first["data"], second["task"]) == ("data.jsonl", "exact")
    code, _, err = fedloom("eval", "runs/tiny", "--num-fewshot", "2")
    assert code == 2 and "--num-fewshot is for benchmarks, not for the run itself" in err


def test_generate_answers_as_the_tuned_model_does(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, _ = fedloom("generate", "runs/tiny", "Say stone 3 times", "-", "--format", "json", stdin="Say river")
    answers = json.loads(out)
    assert code == 0 and [one["prompt"] for one in answers] == ["Say stone 3 times", "Say river"]
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32),
        place / "runs" / "tiny" / "adapter",
    )
    tuned = open_tuned(Path("runs/tiny"))
    ids = torch.tensor([tuned.prompt([{"role": "user", "content": "Say stone 3 times"}])])
    eos = tuned.base.tokenizer.eos_token_id
    written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=eos, eos_token_id=eos)
    expected = tuned.base.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert answers[0]["completion"] == expected
    draws = [fedloom("generate", "runs/tiny", "Say", "--temperature", "5", "--seed", seed).out for seed in "112345"]
    assert draws[0] == draws[1] and len(set(draws)) > 1
    assert "no effect at temperature 0" in fedloom("generate", "runs/tiny", "Say", "--top-k", "5").err
    assert "top_p is 2.0" in fedloom("generate", "runs/tiny", "Say", "--temperature", "1", "--top-p", "2").err
    assert "generate needs a prompt" in fedloom("generate", "runs/tiny").err


def test_chat_takes_each_question_by_itself_where_training_did(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom(
        "chat", "runs/tiny", "--temperature", "0", stdin="Say stone\nSay stone\n/new\nSay stone\n\nno\n"
    )
    assert code == 0 and "each question stands by itself" in err
    assert out == 3 * fedloom("generate", "runs/tiny", "Say stone").out


def test_a_conversation_is_kept_where_training_had_conversations(fedloom: Callable[..., Said]) -> None:
    from dataclasses import replace

    tuned = replace(open_tuned(Path("runs/tiny")), kind="chat")
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    text = tuned.base.tokenizer.decode(tuned.prompt(talk))
    assert text.count("one") == text.count("two") == text.count("three") == 1
    assert "one" not in replace(tuned, kind="alpaca").base.tokenizer.decode(replace(tuned, kind="alpaca").prompt(talk))


def test_export_merged_is_a_model_that_answers_alike(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, err = fedloom("export", "runs/tiny", "merged", "--format", "merged")
    assert (code, out) == (0, "merged\n") and "logits differ" in err
    tuned, merged = open_tuned(Path("runs/tiny")), load_base("merged", dtype="float32")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad(), tuned.adapter.bound({name: leaf[None] for name, leaf in tuned.tree.items()}) as model:
        wanted = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(merged.model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
        plain = load_base("model", dtype="float32").model(input_ids=ids).logits
    assert (plain - wanted).abs().max() > 1e-3
    code, _, err = fedloom("export", "runs/tiny", "merged", "--format", "merged")
    assert code == 2 and "merged exists already; nothing was written" in err
    shutil.rmtree(place / "merged")


def test_export_lora_is_an_adapter_folder_that_opens_again(fedloom: Callable[..., Said], place: Path) -> None:
    assert fedloom("export", "runs/tiny", "tuned")[:2] == (0, "tuned\n")
    assert fedloom("generate", "tuned", "Say stone", "--max-new-tokens", "4").out == fedloom(
        "generate", "runs/tiny", "Say stone").out  # fmt: skip
    code, _, err = fedloom("export", "runs/tiny", "nowhere/x")
    assert code == 2 and "nowhere: no such folder" in err
    shutil.rmtree(place / "tuned")


def test_a_merge_that_goes_wrong_leaves_nothing(
    fedloom: Callable[..., Said], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lora, "merge", lambda self, tree: None)  # nothing is merged
    before = sorted(place.iterdir())
    with pytest.raises(RunError, match="answers otherwise than the run"):
        export_merged(Path("runs/tiny"), Path("wrong"))
    assert sorted(place.iterdir()) == before


def test_a_full_disk_is_told_and_leaves_nothing(
    fedloom: Callable[..., Said], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["fedloom.models.peft_folder"], "save_file", full)
    before = sorted(place.iterdir())
    code, _, err = fedloom("export", "runs/tiny", "tuned")
    assert code == 1 and "no space left" in err and "Traceback" not in err
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("command", [["chat"], ["generate"], ["export"], ["eval"]])
def test_an_adapter_that_is_not_there_names_those_that_are(
    fedloom: Callable[..., Said], place: Path, command: list[str]
) -> None:
    rest = {"generate": ["Say"], "export": ["dest"]}.get(command[0], [])
    code, _, err = fedloom(*command, "runs/tinny", *rest)
    assert code == 2 and "runs/tiny" in err
    (place / "runs" / "half").mkdir(exist_ok=True)
    shutil.copy(place / "runs" / "tiny" / "recipe.yaml", place / "runs" / "half" / "recipe.yaml")
    code, _, err = fedloom(*command, "runs/half", *rest)
    assert code == 2 and "no adapter in runs/half; runs with one here: runs/tiny" in err
    assert "fedloom run --resume runs/half" in err
    shutil.rmtree(place / "runs" / "half")


def test_an_adapter_of_another_model_is_refused(fedloom: Callable[..., Said], place: Path) -> None:
    other = random_base(hidden_size=64, num_layers=1, vocab_size=300, text=["a b c"] * 9, max_positions=64)
    other.model.save_pretrained(place / "other")
    other.tokenizer.save_pretrained(place / "other")
    code, _, err = fedloom("generate", "runs/tiny", "Say", "--model", "other")
    assert code == 2 and "the adapter does not match the model" in err and "Traceback" not in err
    (place / "other" / "model.safetensors").unlink()
    code, _, err = fedloom("generate", "runs/tiny", "Say", "--model", "other")
    assert code == 2 and "other" in err and "Traceback" not in err
    with pytest.raises(UserError):
        evaluate_run(Path("runs/nowhere"))
    shutil.rmtree(place / "other")


def test_watch_and_report_of_a_run_that_is_done(fedloom: Callable[..., Said], place: Path) -> None:
    code, out, err = fedloom("watch", "runs/tiny")
    assert code == 0 and "round 2/2" in out + err
    code, out, _ = fedloom("watch", "runs/tiny", "--format", "json")
    assert code == 0 and [json.loads(line)["round"] for line in out.splitlines()] == [0, 0, 1, 2]
    (place / "runs" / "tiny" / "report.html").unlink()
    assert fedloom("report", "runs/tiny")[:2] == (0, "runs/tiny/report.html\n")
    assert "<html" in (place / "runs" / "tiny" / "report.html").read_text()
    assert "runs/tiny  done  base" in fedloom("ls", "runs").out


def test_report_of_several_runs_and_a_picture(fedloom: Callable[..., Said], place: Path) -> None:
    shutil.copytree(place / "runs" / "tiny", place / "runs" / "twin")
    code, out, _ = fedloom("report", "runs/tiny", "runs/twin", "-o", "both.html", "--picture", "bytes.svg")
    assert (code, out) == (0, "bytes.svg\nboth.html\n")
    page = (place / "both.html").read_text()
    assert "2 runs" in page and "twin" in page
    assert (place / "bytes.svg").read_text().startswith("<?xml")
    assert fedloom("report", "runs/tiny", "runs/twin")[:2] == (0, "report.html\n")
    code, _, err = fedloom("report", "runs/tiny", "--picture", "bytes.jpeg")
    assert code == 2 and "a picture is written as .svg, .png, .pdf" in err and "[report.picture]" in err
    (place / "mine.html").write_text("mine")
    code, _, err = fedloom("report", "runs/tiny", "-o", "mine.html")
    assert code == 2 and "stays" in err and (place / "mine.html").read_text() == "mine"
    shutil.rmtree(place / "runs" / "twin")


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("model=nowhere", "nowhere"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("data.max_length=8", "answer"),
        ("split.clients=9", "9"),
        ("val_set_size=0.001", "val_set_size"),
        ("split.kind=files", "one client per file"),
        ("lora_target_modules=z_proj", "z_proj"),
        ("data.columns.output=z", "data.columns.output is 'z'"),
    ],
)
def test_bad_input_ends_a_run_before_it_begins(fedloom: Callable[..., Said], place: Path, word: str, part: str) -> None:
    for command in (["run"], ["plan"]):
        code, _, err = fedloom(*command, "tiny.yaml", "output_dir=runs/bad", word)
        assert code == 2 and part in err and "Traceback" not in err
        assert not (place / "runs" / "bad").exists()


@pytest.mark.parametrize("number", [8, 25])
def test_what_init_writes_runs_even_for_little_data(fedloom: Callable[..., Said], place: Path, number: int) -> None:
    rows = [{"prompt": f"{WORDS[i % 7]} {i}", "completion": f"{i}"} for i in range(number)]
    (place / "small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fedloom("init", "small.jsonl", "--model", "model", "rounds=1", "dtype=float32")[0] == 0
    code, _, err = fedloom("run", "small.yaml")
    assert code == 0, err
    for path in (place / "small.jsonl", place / "small.yaml"):
        path.unlink()
    shutil.rmtree(place / "runs" / "small")
