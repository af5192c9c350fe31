"""The lm-evaluation-harness on a model of ours: the same numbers as its own model class and as our own tasks."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fedloom.adapters.lora import lora
from fedloom.data.templates import alpaca_prompt
from fedloom.errors import RunError, UserError
from fedloom.evaluate import harness
from fedloom.evaluate.harness import Known
from fedloom.evaluate.tasks.base import TaskSettings, Write
from fedloom.evaluate.tasks.run import ModelAnswerer, TaskResult, answerer_of, find_task, rescore, run_task
from fedloom.models import Base, random_base

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")

QUESTIONS = [
    {"question": f"What is {a} and {b} together?", "choices": [str(a + b), str(a - b), f"about {b}"], "answer": n % 3}
    for n, (a, b) in enumerate([(3, 4), (10, 2), (7, 7), (12, 5), (1, 9), (20, 3), (6, 8)])
]
STORIES = [" ".join(f"The {beast} walked {n} miles." for n in range(size)) for beast, size in [("fox", 3), ("owl", 40)]]
CHOICES = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITING = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: stories.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


@pytest.fixture(scope="module")
def base() -> Base:
    text = [str(one) for one in QUESTIONS] + STORIES
    made = random_base(hidden_size=32, num_layers=2, vocab_size=320, max_positions=256, text=text, seed=3)
    first = made.tokenizer.bos_token  # as most tokenizers of large models begin a text
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, made.tokenizer.bos_token_id)]
    )
    return made


@pytest.fixture(scope="module")
def tuned(base: Base) -> tuple[Any, dict[str, torch.Tensor]]:
    """An adapter that makes a random model opinionated."""
    adapter = lora(base.model, rank=4, targets="all-linear")
    draw = torch.Generator().manual_seed(0)
    return adapter, {k: v + 0.7 * torch.randn(v.shape, generator=draw) for k, v in adapter.init(0).items()}


@pytest.fixture(scope="module")
def answerer(base: Base, tuned: Any) -> ModelAnswerer:
    return answerer_of(*tuned, base.tokenizer, batch_size=4)


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write_rows(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks with their data beside them, in a folder that is not the one tests run in."""
    there = tmp_path / "own"
    write_rows(there / "sums.jsonl", QUESTIONS)
    write_rows(there / "stories.jsonl", [{"text": text} for text in STORIES])
    for name, text in {"sums": CHOICES, "letters": WRITING, "stories": ROLLING}.items():
        (there / f"{name}.yaml").write_text(text)
    return there


def measured(path: Path, answerer: ModelAnswerer, **settings: Any) -> tuple[TaskResult, list[dict[str, Any]]]:
    """A task's result, and the lines of its items."""
    out = path.parent / "items" / f"{path.stem}.jsonl"
    task = find_task(f"lm_eval:{path}")
    result = run_task(task, answerer, source=None, settings=TaskSettings(**settings), out=out)
    return result, [json.loads(line) for line in out.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def reference(base: Base, tuned: Any) -> Any:
    """Ask the harness's own model class: the samples of a task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    adapter, tree = tuned

    def ask(path: Path, num_fewshot: int = 0) -> list[dict[str, Any]]:
        loaded = TaskManager(include_defaults=False).load([str(path)])
        [(name, task)] = loaded["tasks"].items()
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=1234)
        with adapter.bound({k: v[None] for k, v in tree.items()}) as model:
            model_of_theirs = HFLM(pretrained=model, tokenizer=base.tokenizer, batch_size=3)
            found = evaluate(lm=model_of_theirs, task_dict=loaded, bootstrap_iters=0)
        return list(found["samples"][name])

    return ask


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_are_as_likely_as_the_harness_finds_them(
    folder: Path, answerer: ModelAnswerer, reference: Any, shots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, lines = measured(folder / "sums.yaml", answerer, num_fewshot=shots)
    monkeypatch.chdir(folder)
    theirs = reference(folder / "sums.yaml", shots)
    for line, sample in zip(lines, theirs, strict=True):
        assert line["prompt"] == sample["arguments"][0][0]
        for (nats, greedy), [(wanted, first)] in zip(line["answers"], sample["resps"], strict=True):
            assert nats == pytest.approx(wanted, abs=1e-4) and greedy == first
        assert line["scores"] == {"acc": sample["acc"], "acc_norm": sample["acc_norm"]}
    assert result.metric == "acc" and result.name == "lm_eval:sums" and result.items == len(QUESTIONS)
    assert result.score == pytest.approx(np.mean([sample["acc"] for sample in theirs]))
    assert result.summary["acc_stderr"] > 0
    assert len({line["scores"]["acc"] for line in lines}) == 2 and len({str(line["answers"]) for line in lines}) > 5


def test_our_own_multiple_choice_says_the_same_of_the_same_items(folder: Path, answerer: ModelAnswerer) -> None:
    theirs, their_lines = measured(folder / "sums.yaml", answerer)
    out = folder / "ours.jsonl"
    ours = run_task(
        find_task("multiple_choice"), answerer, source=folder / "sums.jsonl", settings=TaskSettings(), out=out
    )
    our_lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    for mine, other in zip(our_lines, their_lines, strict=True):
        assert mine["loglikelihoods"] == pytest.approx([nats for nats, _ in other["answers"]], abs=1e-5)
    assert ours.summary["accuracy"] == theirs.summary["acc"]
    assert ours.summary["accuracy_stderr"] == pytest.approx(theirs.summary["acc_stderr"])
    assert ours.summary["accuracy_norm"] == theirs.summary["acc_norm"]


def test_texts_are_those_of_the_harness_and_of_our_own_writing(
    folder: Path, answerer: ModelAnswerer, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [text.strip() for (text,) in answerer.write([Write(one["question"], 24) for one in QUESTIONS])]
    ends = (free[0][5:7], free[1][9])
    (folder / "letters.yaml").write_text(WRITING.replace('["e", "\\n"]', json.dumps(ends)))
    _, lines = measured(folder / "letters.yaml", answerer)
    monkeypatch.chdir(folder)
    texts = [line["answers"][0] for line in lines]
    assert texts == [sample["resps"][0][0] for sample in reference(folder / "letters.yaml")]
    own = answerer.write([Write(one["question"], 24, ends) for one in QUESTIONS])
    assert [text.strip() for (text,) in own] == [text.strip() for text in texts]
    assert len(set(texts)) > 3 and len(texts[0]) < len(free[0])
    assert not any(end in text for text in texts for end in ends)
    [short] = [line["answers"][0] for line in measured(folder / "letters.yaml", answerer, limit=1, max_new_tokens=2)[1]]
    [(own_short,)] = answerer.write([Write(QUESTIONS[0]["question"], 2, ends)])
    assert short.strip() == own_short.strip() != texts[0]


def test_rolling_loglikelihoods_are_the_loss_of_the_whole_text(
    folder: Path, base: Base, tuned: Any, answerer: ModelAnswerer, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lines = measured(folder / "stories.yaml", answerer)
    monkeypatch.chdir(folder)
    found = [line["answers"][0] for line in lines]
    assert found == pytest.approx([sample["resps"][0][0] for sample in reference(folder / "stories.yaml")], rel=1e-5)
    ids = [base.tokenizer.bos_token_id, *base.tokenizer(STORIES[0])["input_ids"]]  # the harness has the first twice
    adapter, tree = tuned
    batch = {"input_ids": torch.tensor([[ids]]), "labels": torch.tensor([[[-100, *ids[1:]]]])}
    nll, tokens = adapter.nll({k: v[None] for k, v in tree.items()}, batch)
    assert found[0] == pytest.approx(-float(nll), rel=1e-5) and int(tokens) == len(ids) - 1
    assert len(base.tokenizer(STORIES[1])["input_ids"]) > 256  # which is more than the model's positions


def test_answers_are_judged_again_without_the_model(folder: Path, answerer: ModelAnswerer, tmp_path: Path) -> None:
    for name in ("sums", "letters", "stories"):
        result, lines = measured(folder / f"{name}.yaml", answerer, num_fewshot=1 if name == "sums" else None)
        again = rescore(result.file, tmp_path / "again.jsonl")
        assert again.summary == result.summary and again.items == result.items and again.name == result.name
        assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()[1:]] == lines
    file = folder / "items" / "letters.jsonl"
    head, first, *rest = file.read_text().splitlines()
    assert json.loads(first)["scores"] == {"exact_match": 0.0}
    other = json.dumps({**json.loads(first), "answers": ["x"]})
    file.write_text("\n".join([head, other, *rest]) + "\n")
    assert rescore(file).score == pytest.approx(1 / len(QUESTIONS))
    write_rows(folder / "sums.jsonl", [*QUESTIONS[:-1], {**QUESTIONS[-1], "question": "Another one?"}])
    with pytest.raises(UserError, match="item 6 is not as it was asked"):
        rescore(file)


def test_what_does_not_fit_is_cut_on_the_left_and_counted_or_refused(
    folder: Path, base: Base, answerer: ModelAnswerer, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {**QUESTIONS[1], "question": "so and so and " * 40 + str(QUESTIONS[1]["question"])}
    write_rows(folder / "sums.jsonl", [QUESTIONS[0], long, *QUESTIONS[2:]])
    result, lines = measured(folder / "sums.yaml", answerer)
    monkeypatch.chdir(folder)
    wanted = [nats for [(nats, _)] in reference(folder / "sums.yaml")[1]["resps"]]
    assert [nats for nats, _ in lines[1]["answers"]] == pytest.approx(wanted, abs=1e-4)
    assert result.notes == {"cut_on_the_left": 1}
    result, lines = measured(folder / "letters.yaml", answerer)
    assert result.notes == {"cut_on_the_left": 1}
    assert lines[1]["answers"] == [reference(folder / "letters.yaml")[1]["resps"][0][0]] != [""]
    with pytest.raises(UserError, match=r"256 positions") as caught:
        measured(folder / "letters.yaml", answerer, max_new_tokens=256)
    assert "--max-new-tokens 64" in caught.value.hint
    write_rows(folder / "sums.jsonl", [{**QUESTIONS[0], "choices": ["a", "b " * 600]}])
    with pytest.raises(UserError, match="item 0: an answer of"):
        measured(folder / "sums.yaml", answerer)


def test_draws_differ_by_repeat_and_seed_and_settings_that_are_not_done_are_refused(
    folder: Path, answerer: ModelAnswerer
) -> None:
    (folder / "drawn.yaml").write_text(
        WRITING.replace("do_sample: false", "do_sample: true, temperature: 1.5").replace("letters", "drawn")
        + "repeats: 3\nfilter_list:\n  - {name: all, filter: [{function: take_first}]}\n"
    )
    _, lines = measured(folder / "drawn.yaml", answerer, limit=2)
    assert all(len(set(line["answers"])) == 3 for line in lines)
    assert measured(folder / "drawn.yaml", answerer, limit=2)[1] == lines
    assert measured(folder / "drawn.yaml", answerer, limit=2, seed=1)[1] != lines
    (folder / "beams.yaml").write_text(WRITING.replace("do_sample: false", "num_beams: 4"))
    with pytest.raises(UserError, match="num_beams: 4"):
        measured(folder / "beams.yaml", answerer)


def test_it_says_nothing_and_leaves_no_trace(
    folder: Path, answerer: ModelAnswerer, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    random.seed(7), np.random.seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    original, bars = datasets.load_dataset, datasets.are_progress_bars_disabled()
    capfd.readouterr()
    measured(folder / "sums.yaml", answerer, num_fewshot=1)
    assert capfd.readouterr() == ("", "")
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert datasets.load_dataset is original and datasets.are_progress_bars_disabled() == bars


def test_questions_are_laid_out_as_in_training_when_asked_for(
    folder: Path, base: Base, answerer: ModelAnswerer
) -> None:
    from fedloom.evaluate.harness_model import HarnessModel

    asked = {"apply_chat_template": "true"}
    with pytest.raises(UserError, match="must be true or false"):
        measured(folder / "letters.yaml", answerer, extra={"apply_chat_template": "perhaps"})
    rows = [{"kind": "alpaca", "instruction": one["question"], "input": "", "output": ""} for one in QUESTIONS]
    result, lines = measured(folder / "letters.yaml", answerer, extra=asked)
    assert [line["prompt"] for line in lines] == [alpaca_prompt(str(one["question"])) for one in QUESTIONS]
    own = answerer.write([Write(row, 24, ("e", "\n")) for row in rows])
    assert [text.strip() for (text,) in own] == [line["answers"][0].strip() for line in lines]
    assert [line["answers"] for line in lines] != [
        line["answers"] for line in measured(folder / "letters.yaml", answerer)[1]
    ]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    told = HarnessModel(answerer).apply_chat_template(turns)
    assert told.startswith(alpaca_prompt("a") + "b</s>\n\n### Instruction:\nc") and told.endswith("### Response:\n")
    assert rescore(result.file).summary == result.summary
    tokenizer = base.tokenizer
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[answer]"
    try:
        result, lines = measured(folder / "letters.yaml", answerer, extra=asked)
        assert lines[0]["prompt"] == f"<s>[user] {QUESTIONS[0]['question']}[answer]"
        with_template = HarnessModel(answerer).tok_encode("<s>hello")  # the first token is there already
        assert with_template.count(tokenizer.bos_token_id) == 1 and with_template[0] == tokenizer.bos_token_id
        assert HarnessModel(answerer).tok_encode("hello") == list(tokenizer("hello")["input_ids"])
    finally:
        tokenizer.chat_template = None
    assert rescore(result.file).summary == result.summary  # the template is not there any more


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_groups_have_a_sum_of_their_own_or_the_mean_of_their_tasks(folder: Path, answerer: ModelAnswerer) -> None:
    parts = {}
    for name, rows in {"small": QUESTIONS[:2], "large": QUESTIONS[2:]}.items():
        write_rows(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(CHOICES.replace("sums", name))
        parts[name] = measured(folder / f"{name}.yaml", answerer)[0].score
    (folder / "both.yaml").write_text(
        "group: both\ntask: [small, large]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "loose.yaml").write_text("group: loose\ntask: [small, large]\n")
    result, lines = measured(folder / "both.yaml", answerer)
    assert result.score == pytest.approx((2 * parts["small"] + 5 * parts["large"]) / 7) and result.items == 7
    assert {name: result.summary[f"acc/{name}"] for name in parts} == parts
    assert [line["id"] for line in lines][:3] == ["small/0", "small/1", "large/0"]
    assert rescore(result.file).summary == result.summary
    result, _ = measured(folder / "loose.yaml", answerer, limit=2)
    assert result.metric == "mean" and result.items == 4
    assert result.score == pytest.approx((result.summary["mean/small"] + result.summary["mean/large"]) / 2)
    (folder / "loose.yaml").unlink()
    assert sorted(Path(name).stem for name in harness.expanded(f"lm_eval:{folder}")) == [
        "both",
        "letters",
        "stories",
        "sums",
    ]


ARC = {
    "id": "x1",
    "question": "Which of these is warm?",
    "choices": {"text": ["ice", "the sun", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the harness's names, so that its fourteen thousand files need not be read."""
    place = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"  # type: ignore[union-attr, arg-type]
    found = {
        "arc_easy": Known("TASK", str(place / "arc/arc_easy.yaml"), [], "acc", "allenai/ai2_arc"),
        "arc_challenge": Known("TASK", str(place / "arc/arc_challenge.yaml"), [], "acc", "allenai/ai2_arc"),
        "ai2_arc": Known("TAG", "", ["arc_challenge", "arc_easy"], "", ""),
        "humaneval": Known("TASK", str(place / "humaneval/humaneval.yaml"), [], "", "openai/openai_humaneval", True),
    }
    from fedloom.evaluate import harness_run

    monkeypatch.setattr(harness, "known", lambda: found)
    monkeypatch.setattr(harness, "_is_written_anywhere", lambda name: True)
    monkeypatch.setattr(harness_run, "known", lambda: found)
    harness_run._all_tasks.cache_clear()


@pytest.mark.usefixtures("names")
def test_a_task_by_name_reads_a_local_copy_of_its_data_set(
    answerer: ModelAnswerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = find_task("lm_eval:arc_easy")
    assert task.metric == "acc" and "allenai/ai2_arc" in task.source
    with pytest.raises(UserError, match=r"allenai/ai2_arc \(ARC-Easy\) is not on this machine") as caught:
        task.load(None, TaskSettings())
    place = tmp_path / "data/hub/allenai/ai2_arc"
    assert str(place) in caught.value.hint and "--tasks lm_eval:arc_easy=DIR" in caught.value.hint
    with pytest.raises(UserError, match="there is no"):
        task.load(tmp_path / "nowhere", TaskSettings())
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"copy/{split}.jsonl", [ARC] * 2)
    files = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in ("train", "validation", "test"))
    (tmp_path / "copy/README.md").write_text(f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}---\n")
    result = run_task(task, answerer, source=tmp_path / "copy", settings=TaskSettings(), out=None)
    assert result.items == 2 and len(list(task.load(tmp_path / "copy", TaskSettings(limit=1)))) == 1
    place.parent.mkdir(parents=True)
    (tmp_path / "copy").rename(place)
    assert run_task(task, answerer, source=None, settings=TaskSettings(), out=None).summary == result.summary


@pytest.mark.usefixtures("names")
def test_names_that_are_no_single_task_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert harness.expanded("lm_eval:ai2_arc") == ["lm_eval:arc_challenge", "lm_eval:arc_easy"]
    assert harness.is_known("arc_easy") and not harness.is_known("gsm8k")
    for name, message in {
        "arc_eazy": "did you mean 'arc_easy'",
        "ai2_arc": "stands for several tasks: lm_eval:arc_challenge, lm_eval:arc_easy",
        "humaneval": "without a sandbox",
        "./missing.yaml": "no task file ./missing.yaml",
    }.items():
        with pytest.raises(UserError, match=message):
            find_task(f"lm_eval:{name}")
    (tmp_path / "wrong.yaml").write_text("dataset_path: json\n")
    with pytest.raises(UserError, match="neither a task nor a group"):
        find_task("lm_eval:./wrong.yaml")
    with pytest.raises(UserError, match="no use for samples"):
        find_task("lm_eval:arc_easy").load(None, TaskSettings(samples=3))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        find_task("lm_eval:arc_easy")
    assert caught.value.hint == "pip install 'fedloom[eval]'" and not harness.is_known("arc_easy")


def test_a_task_that_fails_in_the_harness_is_named(folder: Path, answerer: ModelAnswerer) -> None:
    (folder / "programs.yaml").write_text(WRITING.replace("letters", "programs") + "unsafe_code: true\n")
    (folder / "all.yaml").write_text("group: all\ntask: [programs]\n")
    for name in ("programs", "all"):
        with pytest.raises(UserError, match=r"lm_eval:.*programs.* without a sandbox"):
            measured(folder / f"{name}.yaml", answerer)
    (folder / "broken.yaml").write_text(CHOICES.replace("test_split: test", "test_split: nowhere"))
    with pytest.raises(RunError, match=r"broken.yaml failed in the harness: KeyError"):
        measured(folder / "broken.yaml", answerer)


@pytest.mark.slow
def test_the_names_of_the_harness_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.evaluate import harness_run
    from fedloom.evaluate.tasks.sets import SETS

    harness.known.cache_clear()
    found = harness.known()
    assert found["arc_easy"] == found["arc_easy"]._replace(kind="TASK", metric="acc", data="allenai/ai2_arc")
    assert found["ai2_arc"].kind == "TAG" and found["mmlu"].metric == "acc" and found["humaneval"].unsafe
    assert found["gsm8k"].metric == "exact_match,strict-match"
    for scenarios in SETS.values():
        for one in scenarios:
            assert (one.task or "").partition("lm_eval:")[2] in {"", *found}
    assert harness._is_written_anywhere("arc_easy") and not harness._is_written_anywhere("arc_eazy")
    monkeypatch.setattr(harness_run, "index_of", None)
    harness.known.cache_clear()
    assert harness.known() == found
    (tmp_path / "cache/fedloom/lm_eval_tasks.json").write_text('{"stamp": []}')
    harness.known.cache_clear()
    with pytest.raises(TypeError):  # another version: it would be read anew
        harness.known()
    harness.known.cache_clear()
