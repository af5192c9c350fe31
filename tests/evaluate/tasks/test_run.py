"""Asking a model, judging its answers, and the file that both can be judged from again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.adapters.lora import lora
from fedloom.data.tokens import prompt_ids
from fedloom.errors import UserError
from fedloom.evaluate.generate import Sampling, drawn
from fedloom.evaluate.tasks import run as running
from fedloom.evaluate.tasks.base import Answer, Choose, Item, Task, TaskSettings, Write
from fedloom.evaluate.tasks.run import answerer_of, rescore, run_task
from fedloom.models import Base, random_base

WORDS = [f"{one} {other}" for one in ("the cat", "a dog", "it rained") for other in ("sat", "on", "while", "all day")]


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=300, max_positions=256, dtype=torch.float64, seed=3
    )


@pytest.fixture(scope="module")
def tuned(base: Base) -> tuple[Any, dict[str, torch.Tensor]]:
    """An adapter that makes a random model opinionated."""
    adapter = lora(base.model, rank=4, targets="all-linear")
    draw = torch.Generator().manual_seed(0)
    tree = {k: v + 0.7 * torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in adapter.init(0).items()}
    return adapter, tree


def answerer(base: Base, tuned: tuple[Any, Any], batch_size: int = 4, **more: Any) -> running.ModelAnswerer:
    return answerer_of(*tuned, base.tokenizer, batch_size=batch_size, **more)


def text(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 5 + k) % len(WORDS)] for k in range(length))


def greedy_by_hand(base: Base, tuned: tuple[Any, Any], prompt: str, new: int) -> str:
    """No cache, no batch, no padding."""
    ids = base.tokenizer(prompt)["input_ids"]
    made: list[int] = []
    adapter, tree = tuned
    with torch.no_grad(), adapter.bound({k: v[None] for k, v in tree.items()}) as model:
        for _ in range(new):
            token = int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
            if token == base.tokenizer.eos_token_id:
                break
            made.append(token)
    return str(base.tokenizer.decode(made, skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_greedy_texts_do_not_depend_on_the_batch(base: Base, tuned: Any, batch_size: int) -> None:
    requests = [Write(text(n, 2 + n), 6 + n % 2) for n in range(8)]
    wanted = [(greedy_by_hand(base, tuned, str(one.prompt), one.max_new_tokens),) for one in requests]
    assert answerer(base, tuned, batch_size).write(requests) == wanted
    assert answerer(base, tuned, batch_size).write(requests[::-1]) == wanted[::-1]
    assert len(set(wanted)) > 4


def test_draws_depend_on_the_items_seed_only(base: Base, tuned: Any) -> None:
    requests = [Write(text(n, 2 + n), 8, sampling=Sampling(1.0, seed=n), samples=3) for n in range(5)]
    first = answerer(base, tuned, 1).write(requests)
    assert answerer(base, tuned, 7).write(requests[::-1])[::-1] == first
    assert all(len(set(samples)) > 1 for samples in first)  # samples of one question differ
    assert len(set(first)) == 5
    other = [one._replace(sampling=Sampling(1.0, seed=9)) for one in requests]
    assert answerer(base, tuned, 7).write(other) != first
    [few] = answerer(base, tuned).write([requests[2]._replace(samples=2)])
    assert few == first[2][:2]


def test_run_task_gives_each_item_draws_of_its_own(base: Base, tuned: Any) -> None:
    same = Write("the cat", 8, sampling=Sampling(1.0), samples=2)
    seen: dict[int, list[tuple[str, ...]]] = {}

    def judge(items: Sequence[Item], answers: Sequence[Answer]) -> list[dict[str, float]]:
        seen[len(seen)] = [answer.texts for answer in answers]
        return [{"accuracy": 1.0} for _ in items]

    task = made([Item(str(n), same, None) for n in range(4)], judge)
    for seed in (0, 0, 1):
        run_task(task, answerer(base, tuned), source=None, settings=TaskSettings(seed=seed), out=None)
    assert len(set(seen[0])) == 4 and seen[1] == seen[0] and seen[2] != seen[0]


def test_samples_without_draws_are_the_same_text(base: Base, tuned: Any) -> None:
    [texts] = answerer(base, tuned).write([Write("the dog", 5, samples=3)])
    assert len(texts) == 3 and len(set(texts)) == 1 and texts[0]


def test_writing_ends_at_the_first_stop_text(base: Base, tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [text(n, 3) for n in range(6)]
    free = [greedy_by_hand(base, tuned, prompt, 40) for prompt in prompts]
    stops = (free[0][10:13], free[1][20:22])
    calls = 0
    forward = base.model.forward

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **more)

    monkeypatch.setattr(base.model, "forward", counted)
    [[short]] = answerer(base, tuned).write([Write(prompts[0], 40, stop=stops)])
    assert calls < 40  # it did not write on
    whole = answerer(base, tuned).write([Write(prompt, 40, stop=stops) for prompt in prompts])
    assert short == whole[0][0]
    assert [one for [one] in whole] == [running.until(one, stops) for one in free]
    assert free[0] != short and free[0].startswith(short)


def test_choices_equal_a_plain_pass_each(base: Base, tuned: Any) -> None:
    requests = [Choose(text(n, 1 + n), (" the", " dog sat", " it rained all day")) for n in range(5)]
    requests.append(Choose("ends in a space ", ("cat", "dog")))
    adapter, tree = tuned
    found = answerer(base, tuned).choose(requests)
    for request, got in zip(requests, found, strict=True):
        for choice, nats in zip(request.choices, got, strict=True):
            before = base.tokenizer(str(request.prompt).rstrip())["input_ids"]
            ids = base.tokenizer(str(request.prompt) + choice)["input_ids"]
            with torch.no_grad(), adapter.bound({k: v[None] for k, v in tree.items()}) as model:
                z = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted = sum(float(z[p, ids[p + 1]]) for p in range(len(before) - 1, len(ids) - 1))
            assert nats == pytest.approx(wanted, abs=1e-4)
    assert answerer(base, tuned, 1).choose(requests[::-1])[::-1] == [pytest.approx(one, abs=1e-9) for one in found]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    ],
)
def test_rows_are_asked_as_training_had_them(base: Base, tuned: Any, template: str | None) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "alpaca", "instruction": "say it", "input": "", "output": "unused"},
        {"kind": "chat", "messages": [_turn("user", "a"), _turn("assistant", "b"), _turn("user", "c")]},
    ]
    tokenizer = base.tokenizer
    tokenizer.chat_template = template
    adapter, tree = tuned
    try:
        one = answerer(base, tuned)
        found = one.choose([Choose(row, ("yes", "not at all")) for row in rows])
        for row, got in zip(rows, found, strict=True):
            [prompt] = prompt_ids([row], tokenizer)
            for choice, nats in zip(("yes", "not at all"), got, strict=True):
                ids = [*prompt, *tokenizer(choice, add_special_tokens=False)["input_ids"]]
                with torch.no_grad(), adapter.bound({k: v[None] for k, v in tree.items()}) as model:
                    z = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                wanted = sum(float(z[p, ids[p + 1]]) for p in range(len(prompt) - 1, len(ids) - 1))
                assert nats == pytest.approx(wanted, abs=1e-6)
        asked = one.asked(Write(rows[0], 4))
        assert ("<user>say it<assistant>" in asked.text) is (template is not None)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(("words", "least"), [(8, 1), (1, 4)])  # long shots, and ones so short that a guess is off
def test_as_many_shots_as_fit_stand_before_a_question(base: Base, tuned: Any, words: int, least: int) -> None:
    one = answerer(base, tuned)
    shots = tuple(f"Q: {text(n, words)}\nA: yes\n\n" for n in range(24))
    asked = one.asked(Write("Q: dog?\nA:", 30, shots=shots, head="Look.\n\n"))
    assert least <= asked.shots < 24 and asked.room == 30
    assert asked.text == "Look.\n\n" + "".join(shots[: asked.shots]) + "Q: dog?\nA:"
    used = len(base.tokenizer(asked.text)["input_ids"])
    more = len(base.tokenizer("Look.\n\n" + "".join(shots[: asked.shots + 1]) + "Q: dog?\nA:")["input_ids"])
    assert used + 30 <= 256 < more + 30


def test_an_overlong_question_is_not_asked(base: Base, tuned: Any) -> None:
    one = answerer(base, tuned)
    shots = tuple(f"Q: {text(n, 8)}\nA: yes\n\n" for n in range(8))  # about 40 tokens each, of 256 positions
    fits = Write("Q: dog?\nA:", 30, shots=shots)
    tight = Write("x" * 250, 30, shots=shots)
    assert (one.asked(tight).shots, one.asked(tight).room) == (0, 6)
    long = Write("x" * 256, 30)
    choose = [Choose("x" * 200, (" a", " " + "b" * 56)), Choose("x" * 200, (" a", " " + "b" * 57))]
    written = one.write([long, fits, tight])
    assert written[0] == () and len(written[1]) == 1 and len(written[2]) == 1
    assert [len(nats) for nats in one.choose(choose)] == [2, 0]


def made(items: Sequence[Item], judge: Any = None) -> Task:
    def right(items: Sequence[Item], answers: Sequence[Answer]) -> list[dict[str, float]]:
        found = []
        for item, answer in zip(items, answers, strict=True):
            best = max(range(len(answer.loglikelihoods)), key=answer.loglikelihoods.__getitem__, default=None)
            got = answer.texts[0] if answer.texts else best
            found.append({"accuracy": float(got == item.reference)})
        return found

    def summarise(items: Sequence[Item], scores: Sequence[Any]) -> dict[str, float]:
        return {"accuracy": sum(score["accuracy"] for score in scores) / len(scores)}

    return Task("toy", "Toys", "accuracy", "nowhere", lambda source, settings: items, judge or right, summarise)


class Told:
    """An answerer that says what it is told to."""

    def __init__(self, texts: dict[str, str], choice: int = 0) -> None:
        self.texts, self.choice = texts, choice

    def write(self, requests: Sequence[Write]) -> list[tuple[str, ...]]:
        return [(self.texts[str(one.prompt)],) if one.prompt in self.texts else () for one in requests]

    def choose(self, requests: Sequence[Choose]) -> list[tuple[float, ...]]:
        return [tuple(-float(n != self.choice) for n in range(len(one.choices))) for one in requests]


ITEMS = [
    Item("a", Write("1+1=", 4), "2", "sums"),
    Item("b", Write("1+2=", 4), "3", "sums"),
    Item("c", Choose("best?", (" A", " B")), 1, "letters"),
    Item("d", Write("too long", 4), "5", "sums"),
]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Task]:
    """Make the toy task the one that is found by its name."""

    def make(items: Sequence[Item] = ITEMS, judge: Any = None) -> Task:
        task = made(items, judge)
        monkeypatch.setattr(running, "find_task", lambda name: {"toy": task}[name])
        return task

    return make


def test_items_are_kept_in_a_file_and_scored_again_without_the_model(toy: Callable[..., Task], tmp_path: Path) -> None:
    task, out = toy(), tmp_path / "new" / "toy.jsonl"
    told = Told({"1+1=": "2", "1+2=": "4"}, choice=1)
    settings = TaskSettings(seed=7, extra={"k": 1})
    result = run_task(task, told, source=Path("x"), settings=settings, out=out, about={"model": "told"})
    assert (result.summary, result.items, result.skipped) == ({"accuracy": 0.5}, 4, {"too_long": 1})
    head, *rows = lines_of(out)
    assert (head["task"], head["model"], head["source"], head["settings"]["seed"]) == ("toy", {"model": "told"}, "x", 7)
    assert head["versions"]["torch"] == torch.__version__
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["scores"]["accuracy"] for row in rows] == [1.0, 0.0, 1.0, 0.0]
    assert rows[2]["loglikelihoods"] == [-1.0, 0.0] and rows[2]["lengths"] == [1, 1]
    assert rows[3]["unanswered"] == "too_long" and rows[3]["answers"] == []
    assert [path.name for path in out.parent.iterdir()] == ["toy.jsonl"]
    again = rescore(out)
    assert replace(again, file=None) == replace(result, file=None)
    # Another answer in the file gives another score, and a new judge is at work.
    changed = out.read_text().replace('"answers": ["4"]', '"answers": ["3"]')
    out.write_text(changed)
    assert rescore(out).summary == {"accuracy": 0.75}
    toy(judge=lambda items, answers: [{"accuracy": 0.0} for _ in items])
    assert rescore(out, tmp_path / "again.jsonl").summary == {"accuracy": 0.0}
    assert lines_of(tmp_path / "again.jsonl")[0]["summary"] == {"accuracy": 0.0}
    assert out.read_text() == changed


def test_judges_see_the_same_items_again(toy: Callable[..., Task], tmp_path: Path) -> None:
    seen: list[list[Item]] = []

    def judge(items: Sequence[Item], answers: Sequence[Answer]) -> list[dict[str, float]]:
        seen.append(list(items))
        return [{"accuracy": 1.0} for _ in items]

    row = {"kind": "alpaca", "instruction": "i", "input": "", "output": "o"}
    items = [
        Item("a", Write("1+1=", 4, ("\n",), Sampling(0.3, 0.9, 5), 1), {"tests": ["t"]}),
        Item("b", Choose(row, ("x", "y")), 1, "g"),
    ]
    run_task(toy(items, judge), Told({"1+1=": "2"}), source=None, settings=TaskSettings(), out=tmp_path / "f.jsonl")
    rescore(tmp_path / "f.jsonl")
    assert seen[0] == seen[1]


def test_a_limit_takes_the_first_of_each_group(toy: Callable[..., Task]) -> None:
    items = [Item(str(n), Choose("?", (" A", " B")), 0, "ab"[n % 2]) for n in range(10)]
    assert [one.id for one in running.limited(items, 2)] == ["0", "1", "2", "3"]
    assert len(running.limited(items, None)) == 10
    result = run_task(toy(items), Told({}), source=None, settings=TaskSettings(limit=3), out=None)
    assert result.items == 6


def test_items_that_cannot_be_told_apart_and_no_items_are_refused(toy: Callable[..., Task]) -> None:
    for items, match in (([], "no item"), ([ITEMS[0], ITEMS[0]], "'a' is there twice")):
        with pytest.raises(UserError, match=match):
            run_task(toy(items), Told({}), source=None, settings=TaskSettings(), out=None)


def test_a_failed_write_leaves_the_old_file(toy: Callable[..., Task], tmp_path: Path) -> None:
    out = tmp_path / "toy.jsonl"
    out.write_text("old")
    items = [Item("a", Write("1+1=", 4), object())]  # has no form in JSON
    with pytest.raises(TypeError):
        run_task(toy(items), Told({"1+1=": "2"}), source=None, settings=TaskSettings(), out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.jsonl"] and out.read_text() == "old"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "no file of items"),
        ('{"id": 1}\n', "no file of items"),
        ("hello\n", "line 1 is damaged"),
        ('{"format": 9, "task": "toy", "items": 0, "skipped": {}, "notes": {}, "seconds": 0}\n', "format 9"),
        ('{"format": 1, "task": "toy", "items": 1, "skipped": {}, "notes": {}, "seconds": 0}\n', "1 items and has 0"),
        ('{"format": 1, "task": "toy", "items": 1, "skipped": {}, "notes": {}, "seconds": 0}\n{}\n', "line 2"),
    ],
)
def test_what_is_no_file_of_items_is_refused(
    toy: Callable[..., Task], tmp_path: Path, content: str, match: str
) -> None:
    toy()
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(UserError, match=match):
        rescore(tmp_path / "f.jsonl")
    with pytest.raises(UserError, match="no file"):
        rescore(tmp_path / "absent.jsonl")


def test_fewer_shots_and_less_room_are_counted(
    base: Base, tuned: Any, toy: Callable[..., Task], tmp_path: Path
) -> None:
    shots = tuple(f"Q: {text(n, 8)}\nA: yes\n\n" for n in range(8))
    items = [
        Item("few", Write("Q: dog?\nA:", 30, shots=shots), "?"),
        Item("all", Write("Q: dog?\nA:", 30, shots=shots[:1]), "?"),
        Item("tight", Write("x" * 250, 30), "?"),
        Item("long", Write("x" * 300, 30), "?"),
        Item("choose", Choose("Q: dog?\nA:", (" A", " B"), shots), 0),
    ]
    told: list[tuple[int, int, str]] = []
    out = tmp_path / "toy.jsonl"
    one = answerer(base, tuned, on_progress=lambda *what: told.append(what))
    result = run_task(toy(items), one, source=None, settings=TaskSettings(), out=out)
    assert result.skipped == {"too_long": 1} and result.notes == {"fewer_shots": 2, "less_room": 1}
    rows = {row["id"]: row for row in lines_of(out)[1:]}
    assert rows["long"]["prompt"] == "x" * 300 and rows["long"]["scores"] == {"accuracy": 0.0}
    assert rows["few"]["prompt"].count("Q:") == rows["few"]["shots"] + 1
    assert told[-1][2] == "rows" and (told[-1][0], told[-1][1]) == (1, 1) and (3, 3, "answers") in told
    assert replace(rescore(out), file=None) == replace(result, file=None)


def test_drawing_keeps_to_top_k_and_top_p() -> None:
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3])
    u_N = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]

    def found(**how: Any) -> list[float]:
        token_N = drawn(shares.log().expand(len(u_N), 4), Sampling(**how), u_N)
        return [float((token_N == token).double().mean()) for token in range(4)]

    assert found(temperature=1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1e-3)
    assert found(temperature=1.0, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert found(temperature=1.0, top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=1e-3)
    assert found(temperature=1.0, top_p=0.1) == [0, 1, 0, 0]
    halved = (shares**2 / (shares**2).sum()).tolist()
    assert found(temperature=0.5) == pytest.approx(halved, abs=1e-3)


def test_drawing_is_as_hugging_face_filters(base: Base) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    kept = TopPLogitsWarper(0.6)(None, TopKLogitsWarper(12)(None, TemperatureLogitsWarper(0.8)(None, scores)))
    tokens = {
        (n, int(token))
        for u in torch.linspace(0, 0.9999, 400)
        for n, token in enumerate(drawn(scores, Sampling(0.8, 0.6, 12), u.double().expand(64)))
    }
    assert tokens == {(int(n), int(token)) for n, token in torch.isfinite(kept).nonzero()}
