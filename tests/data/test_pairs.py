"""Preference data: its many forms become one, both sides are tokenised alike, and batches keep pairs together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.toys import CHATML, Data, Split, tokenizer, write

from fedloom.data import prepare, read
from fedloom.data.pair_batches import PAIR, Pairs, eval_pair_batches, pair_batches
from fedloom.data.pairs import sides
from fedloom.data.rows import Source
from fedloom.data.tokens import NO_LOSS
from fedloom.errors import UserError

PLAIN = tokenizer()


def of(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Source:
    return read(write(tmp_path / "p.jsonl", rows), **settings)


def asked(*texts: str) -> list[dict[str, str]]:
    """Questions and answers in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CHAT_FORMS = {
    "messages and an answer each": {"messages": asked("q", "a", "r"), "chosen": said("yes"), "rejected": said("no")},
    "share_gpt with single messages": {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(("q", "a", "r"))],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "messages and plain answers": {"messages": asked("q", "a", "r"), "chosen": "yes", "rejected": "no"},
    "a prompt of messages": {"prompt": asked("q", "a", "r"), "chosen": said("yes"), "rejected": said("no")},
    "whole dialogues": {"chosen": asked("q", "a", "r", "yes"), "rejected": asked("q", "a", "r", "no")},
    "whole dialogues, their prompt again": {
        "prompt": "q",
        "messages": asked("q", "a", "r", "yes"),
        "chosen": asked("q", "a", "r", "yes"),
        "rejected": asked("q", "a", "r", "no"),
    },
    "dialogues as text": {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: yes",
        "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: no",
    },
}


@pytest.mark.parametrize("form", CHAT_FORMS)
def test_conversations_come_in_many_forms(tmp_path: Path, form: str) -> None:
    source = of(tmp_path, [CHAT_FORMS[form]])
    assert source.said == "read as preference: 1 row"
    row = source.rows[0]
    assert row["messages"] == asked("q", "a", "r") and (row["chosen"], row["rejected"]) == (said("yes"), said("no"))
    chosen, rejected = sides(row)
    assert chosen["kind"] == "chat" and chosen["messages"][1]["train"] is False
    assert chosen["messages"][:-1] == rejected["messages"][:-1] and rejected["messages"][-1]["content"] == "no"


def test_plain_text_and_instructions(tmp_path: Path) -> None:
    text = of(tmp_path, [{"prompt": "p", "chosen": "c", "rejected": "r", "category": "k"}]).rows[0]
    assert [side["completion"] for side in sides(text)] == ["c", "r"] and text["category"] == "k"
    assert {side["kind"] for side in sides(text)} == {"prompt_completion"}
    task = of(tmp_path, [{"instruction": "i", "input": None, "chosen": "c", "rejected": "r"}]).rows[0]
    assert sides(task)[1] == {"kind": "alpaca", "instruction": "i", "input": "", "output": "r"}
    ruled = of(tmp_path, [{"system": "be brief", "question": "q", "chosen": "c", "rejected": "r"}]).rows[0]
    assert [one["role"] for one in ruled["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen and rejected are the same"),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "empty rejected"),
        ({"prompt": "p", "chosen": " ", "rejected": "r"}, "empty chosen"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "empty prompt"),
        ({"prompt": asked("q", "a"), "chosen": said("c"), "rejected": said("r")}, "the prompt ends with an answer"),
        (
            {"chosen": asked("q", "a", "r", "yes"), "rejected": asked("q", "b", "r", "no")},
            "the dialogues differ before their last answer",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"},
            "empty answer",
        ),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    source = of(tmp_path, [good, row])
    assert source.dropped == {reason: 1} and len(source.rows) == 1


def test_answers_to_nothing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing says to what") as caught:
        of(tmp_path, [{"chosen": "c", "rejected": "r", "ask": "q"}])
    assert "data.columns.prompt" in caught.value.hint
    row = of(tmp_path, [{"chosen": "c", "rejected": "r", "ask": "q"}], columns={"prompt": "ask"}).rows[0]
    assert row["prompt"] == "q"


def rows_of(number: int) -> list[dict[str, Any]]:
    return [
        {"instruction": f"say {i}", "chosen": f"yes {i} " + "so " * (i % 7), "rejected": "no " * (1 + i % 11)}
        for i in range(number)
    ]


def test_both_sides_carry_loss_on_the_answer_alone(tmp_path: Path) -> None:
    federation = prepare(Data(write(tmp_path / "p.jsonl", rows_of(40))), Split(), PLAIN, 0)
    assert federation.report.read_as == "preference" and federation.report.layout == "the Alpaca layout"
    assert federation.report.rows_used == 40 and sum(line.train for line in federation.report.clients) == 34
    client = federation.clients["c00"]
    pairs = Pairs(client.train)
    assert len(pairs) == len(client.train) and len(pairs[:3]) == 3
    for chosen, rejected in pairs:
        assert chosen.row == rejected.row
        row = federation.rows[chosen.row]
        prompt = federation.prompt_ids([chosen])[0]
        for side, answer in ((chosen, row["chosen"]), (rejected, row["rejected"])):
            assert side.input_ids[: len(prompt)].tolist() == prompt
            learnt = side.labels[side.labels != NO_LOSS].tolist()
            assert PLAIN.decode(learnt) == answer + "</s>"
    line = federation.report.clients[0]
    assert line.train_tokens == pairs.both.num_tokens > client.train.num_tokens
    shown = federation.preview(pairs[0].rejected, side=1)
    assert shown[-1] == (federation.rows[pairs[0].chosen.row]["rejected"] + "</s>", "trained")


def test_a_pair_is_kept_or_left_out_as_one(tmp_path: Path) -> None:
    rows = [*rows_of(20), {"prompt": "x" * 400, "chosen": "c", "rejected": "r"}]
    rows += [{"instruction": "long", "chosen": "short", "rejected": "very " * 200} for _ in range(1)]
    path = write(tmp_path / "p.jsonl", [row for row in rows if "instruction" in row])
    federation = prepare(Data(path, max_length=400), Split(), PLAIN, 0)
    report = federation.report
    assert report.cut == 1 and report.rows_used == 21 and report.lengths["max"] > 400
    refusing = tokenizer(
        template="{% if 'bad' in messages[-1]['content'] %}{{ raise_exception('bad') }}{% endif %}" + CHATML
    )
    bad = {"instruction": "one side is refused", "chosen": "good", "rejected": "bad"}
    federation = prepare(Data(write(tmp_path / "q.jsonl", [*rows_of(20), bad])), Split(), refusing, 0)
    assert federation.report.left_out == {"refused by the chat template": 1} and federation.report.rows_used == 20
    used = [example.row for part in ("train", "validation", "test") for example in Pairs(federation.pooled(part)).both]
    assert all(used.count(row) == 2 for row in used)


def test_a_row_of_a_batch_is_a_pair(tmp_path: Path) -> None:
    federation = prepare(Data(write(tmp_path / "p.jsonl", rows_of(40))), Split(clients=1), PLAIN, 0)
    pairs = Pairs(federation.clients["c00"].train)
    settings = {"batch_size": 4, "num_epochs": 1, "pad_id": 0, "seed": 1, "round": 0, "client": "c00"}
    batches = pair_batches(pairs, **settings)
    seen: list[int] = []
    for batch, places in zip(batches, batches.places, strict=True):
        for row, place in enumerate(places.tolist()):
            for ids, mask, side in (
                (batch["input_ids"][row], batch["chosen_mask"][row], pairs[place].chosen),
                (batch["rejected_ids"][row], batch["rejected_mask"][row], pairs[place].rejected),
            ):
                length = len(side.input_ids)
                assert ids[:length].tolist() == side.input_ids.tolist() and not ids[length:].any()
                assert mask[:length].tolist() == (side.labels != NO_LOSS).astype(int).tolist()
                assert not mask[length:].any()
            both = pairs[place].chosen.input_ids, pairs[place].rejected.input_ids
            assert batch["lengths"][row] == sum(map(len, both))
        counted = batch["labels"][:, 1:] != NO_LOSS  # what a mean is over: one place in each row, and no token
        assert counted.sum(1).tolist() == [1] * len(places) and batch["labels"][:, 1].tolist() == [PAIR] * len(places)
        seen += places.tolist()
    assert sorted(seen) == list(range(len(pairs)))
    assert batches.num_tokens == pairs.both.num_tokens == sum(int(batch["lengths"].sum()) for batch in batches)
    again = pair_batches(pairs, **settings)
    assert all(np.array_equal(a, b) for a, b in zip(batches.plan, again.plan, strict=True))
    whole = [place for one in eval_pair_batches(pairs, batch_size=8, pad_id=0).places for place in one.tolist()]
    assert sorted(whole) == sorted(seen)
    with pytest.raises(ValueError, match="not the chosen ones"):
        Pairs(pairs.rejected)


def test_pairs_that_are_cut_to_the_same_answer_are_left_out(tmp_path: Path) -> None:
    rows = [*rows_of(20), {"instruction": "go on", "chosen": "na " * 99 + "yes", "rejected": "na " * 99 + "no"}]
    report = prepare(Data(write(tmp_path / "p.jsonl", rows), max_length=300), Split(), PLAIN, 0).report
    assert report.left_out == {"answer wholly cut by max_length": 1} and report.rows_used == 20
    assert any("1 pair differs only beyond max_length" in note for note in report.notes)


def test_equal_pairs_are_duplicates(tmp_path: Path) -> None:
    rows = [*rows_of(20), rows_of(1)[0], {**rows_of(1)[0], "rejected": "another"}]
    report = prepare(Data(write(tmp_path / "p.jsonl", rows)), Split(), PLAIN, 0).report
    assert report.duplicates == 1
