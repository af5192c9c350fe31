"""From recipe to federation: shares, duplicates, test files, counts that add up, and errors with their arithmetic."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data import plain
from tests.data.toys import CHATML, Data, Split, alpaca_rows, tokenizer, write

from fedloom.data import prepare
from fedloom.data import split as splitting
from fedloom.data.federation import PARTS, Federation
from fedloom.data.rows import row_key
from fedloom.data.templates import alpaca_prompt
from fedloom.errors import UserError

PLAIN = tokenizer()
CATEGORIES = ["red", "green", "blue", "black"]


def held(federation: Federation, part: str, client: str | None = None) -> list[int]:
    """Row numbers of a part, of one client or of all."""
    clients = federation.clients.values() if client is None else [federation.clients[client]]
    return [example.row for one in clients for example in getattr(one, part)]


def adds_up(federation: Federation) -> None:
    report = federation.report
    assert report.rows_read == report.rows_used + sum(report.left_out.values())
    assert report.rows_used == sum(len(held(federation, part)) for part in PARTS)
    rows = [row for part in PARTS for row in held(federation, part)]
    assert len(set(rows)) == len(rows), "a row is in two places"
    for line in report.clients:
        client = federation.clients[line.id]
        assert (line.train, line.validation, line.test) == tuple(len(getattr(client, part)) for part in PARTS)
        assert line.train_tokens == sum(len(example.input_ids) for example in client.train)
        assert line.train_target_tokens == sum(int((example.labels != -100).sum()) for example in client.train)
    assert json.loads(json.dumps(report.to_json()))["rows_used"] == report.rows_used


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "d.jsonl", alpaca_rows(120, CATEGORIES))


# ---------------------------------------------------------------- shares


def test_each_clients_parts_have_that_clients_categories(path: str) -> None:
    federation = prepare(Data(path), Split("by_category", None), PLAIN, 0)
    assert sorted(federation.clients) == sorted(CATEGORIES)
    for name in CATEGORIES:
        for part in PARTS:
            rows = held(federation, part, name)
            assert rows and {federation.rows[row]["category"] for row in rows} == {name}
        assert tuple(len(held(federation, part, name)) for part in PARTS) == (24, 3, 3)
        assert len(federation.clients[name].train) == 24  # the FedAvg weight
    assert federation.report.clients[0].categories == {"black": 30}
    adds_up(federation)


def test_the_split_depends_on_rows_and_seed_alone(path: str) -> None:
    first = prepare(Data(path), Split(), PLAIN, 7)
    for other in (
        prepare(Data(path, max_length=260), Split(), tokenizer(bos="<s>", space=True), 7),
        prepare(Data(path), Split(), tokenizer(special=["<|im_start|>", "<|im_end|>"], template=CHATML), 7),
    ):
        for part in PARTS:
            assert held(other, part) == held(first, part)
    assert held(prepare(Data(path), Split(), PLAIN, 8), "test") != held(first, "test")


def test_dirichlet_gives_everybody_training_rows(path: str) -> None:
    federation = prepare(Data(path), Split("dirichlet", 8, 0.5), PLAIN, 3)
    assert all(len(client.train) for client in federation.clients.values()) and len(federation.clients) == 8
    shares = [line.categories for line in federation.report.clients]
    assert len({tuple(sorted(own)) for own in shares}) > 1, "no skew"
    adds_up(federation)
    with pytest.raises(UserError, match=r"needs split\.alpha"):
        prepare(Data(path), Split("dirichlet", 8), PLAIN, 3)


def test_dirichlet_redraws_when_a_client_gets_nothing(path: str) -> None:
    keys = [row["category"] for row in alpaca_rows(120, CATEGORIES)]
    assert not all(map(len, splitting.dirichlet(keys, 12, 0.3, seed=0).values())), "the first draw is fine: no example"
    federation = prepare(Data(path), Split("dirichlet", 12, 0.3), PLAIN, 0)
    assert len(federation.clients) == 12 and all(len(client.train) for client in federation.clients.values())


def test_dirichlet_gives_up_after_bounded_tries(path: str) -> None:
    with pytest.raises(
        UserError, match=r"alpha 0.001, 60 clients and 120 rows, 200 draws each left a client"
    ) as caught:
        prepare(Data(path), Split("dirichlet", 60, 0.001), PLAIN, 0)
    assert caught.value.code == "split.dirichlet" and "larger split.alpha" in caught.value.hint


def test_shards_and_quantity_skew(path: str) -> None:
    shards = prepare(Data(path), Split("shards", 6, shards_per_client=2), PLAIN, 3)
    adds_up(shards)
    assert len(shards.clients) == 6 and {sum(map(len, [own.train, own.validation, own.test]))
                                         for own in shards.clients.values()} == {20}  # fmt: skip
    assert all(len(line.categories) <= 3 for line in shards.report.clients)
    skewed = prepare(Data(path), Split("quantity_skew", 6, 0.4), PLAIN, 3)
    adds_up(skewed)
    sizes = [line.train for line in skewed.report.clients]
    assert min(sizes) >= 1 and max(sizes) > 3 * min(sizes)
    with pytest.raises(UserError, match=r"quantity_skew needs split\.alpha"):
        prepare(Data(path), Split("quantity_skew", 6), PLAIN, 3)
    with pytest.raises(UserError, match=r"quantity_skew: with alpha 0\.001, 60 clients and 120 rows, 200 draws"):
        prepare(Data(path), Split("quantity_skew", 60, 0.001), PLAIN, 0)


def test_rows_of_clients_that_are_too_small_add_up(tmp_path: Path) -> None:
    rows = [*alpaca_rows(40, ["a", "b"]), *alpaca_rows(3, ["c"], first=100), *alpaca_rows(2, ["d"], first=200)]
    tests = alpaca_rows(8, [*CATEGORIES, "a", "b", "c", "d"], first=300)
    federation = prepare(
        Data(write(tmp_path / "d.jsonl", rows), write(tmp_path / "t.jsonl", tests)),
        Split("by_category", None, min_rows=10),
        PLAIN,
        0,
    )
    adds_up(federation)
    assert sorted(federation.clients) == ["a", "b"]
    assert federation.report.left_out["of 2 categories with fewer than split.min_rows 10"] == 5
    assert federation.report.left_out["test row of a category no client has"] == 6


def test_by_column_files_and_built_in(tmp_path: Path) -> None:
    rows = [{**row, "user": f"u{i % 3}"} for i, row in enumerate(alpaca_rows(60))]
    federation = prepare(Data(write(tmp_path / "d.jsonl", rows)), Split("by_column", None, column="user"), PLAIN, 0)
    assert sorted(federation.clients) == ["u0", "u1", "u2"]
    assert federation.report.clients[0].categories == {"u0": 20}
    (tmp_path / "many").mkdir()
    for i in range(3):
        write(tmp_path / "many" / f"site_{i}.jsonl", alpaca_rows(20 + i, first=100 * i))
    federation = prepare(Data(str(tmp_path / "many")), Split("files", None), PLAIN, 0)
    assert {name: sum(len(held(federation, part, name)) for part in PARTS) for name in federation.clients} == {
        "site_0": 20,
        "site_1": 21,
        "site_2": 22,
    }
    adds_up(federation)
    federation = prepare(Data("builtin:skills", val_set_size=None), Split("natural", None), PLAIN, 0)
    assert federation.task is not None and sorted(federation.clients) == sorted(federation.task.clients)
    assert not federation.report.left_out
    adds_up(federation)


def test_built_in_rows_may_be_split_otherwise_and_keep_their_tests() -> None:
    natural = prepare(Data("builtin:skills", val_set_size=None), Split("natural", None), PLAIN, 0)
    dealt = prepare(Data("builtin:skills"), Split("dirichlet", 5, 0.3), PLAIN, 0)

    def tests(federation: Federation) -> Counter[bytes]:
        return Counter(row_key(federation.rows[row]) for row in held(federation, "test"))

    assert len(dealt.clients) == 5 and tests(dealt) == tests(natural)
    adds_up(dealt)


def test_natural_takes_the_first_clients_when_fewer_are_asked_for() -> None:
    federation = prepare(Data("builtin:skills", val_set_size=None), Split("natural", 2), PLAIN, 0)
    assert len(federation.clients) == 2 and federation.report.left_out
    adds_up(federation)
    with pytest.raises(UserError, match=r"99, but builtin:skills has 8 clients: at most 8"):
        prepare(Data("builtin:skills"), Split("natural", 99), PLAIN, 0)


# ---------------------------------------------------------------- test files


def test_a_test_file_is_dealt_by_the_same_key(tmp_path: Path, path: str) -> None:
    tests = write(tmp_path / "test.jsonl", alpaca_rows(20, [*CATEGORIES, "pink"], first=500))
    federation = prepare(Data(path, tests), Split("by_category", None), PLAIN, 0)
    for name in CATEGORIES:
        assert {federation.rows[row]["category"] for row in held(federation, "test", name)} == {name}
        assert tuple(len(held(federation, part, name)) for part in PARTS) == (27, 3, 4)
    assert federation.report.left_out == {"test row of a category no client has": 4}
    adds_up(federation)


def test_a_test_file_of_other_categories_is_refused(tmp_path: Path, path: str) -> None:
    tests = write(tmp_path / "test.jsonl", alpaca_rows(20, ["pink"], first=500))
    words = ("none of its 20 rows", "they have pink", "the clients black, blue, green, red")
    fails(Data(path, tests), Split("by_category", None), "split.no_test", *words)


def test_a_test_file_is_dealt_at_random_otherwise(tmp_path: Path, path: str) -> None:
    tests = write(tmp_path / "test.jsonl", alpaca_rows(20, first=500))
    for split in (Split("iid", 3), Split("dirichlet", 3, 1.0)):
        federation = prepare(Data(path, tests), split, PLAIN, 0)
        assert sorted(len(client.test) for client in federation.clients.values()) == [6, 7, 7]
        assert all(row >= 120 for row in held(federation, "test"))
        adds_up(federation)


def test_test_files_of_a_folder_go_to_the_client_of_their_name(tmp_path: Path) -> None:
    for place, part in enumerate(("train", "test")):
        (tmp_path / part).mkdir()
        for i in range(3):
            write(tmp_path / part / f"site_{i}.jsonl", alpaca_rows(10 + i, first=100 * i + 1000 * place))
    federation = prepare(Data(str(tmp_path / "train"), str(tmp_path / "test")), Split("files", None), PLAIN, 0)
    assert [len(client.test) for client in federation.clients.values()] == [10, 11, 12]
    adds_up(federation)


def test_the_test_file_inside_the_folder_is_no_client(tmp_path: Path) -> None:
    for name in ("a", "b", "test"):
        write(tmp_path / f"{name}.jsonl", alpaca_rows(20, first=100 * ord(name[0])))
    federation = prepare(Data(str(tmp_path), str(tmp_path / "test.jsonl")), Split("files", None), PLAIN, 0)
    assert sorted(federation.clients) == ["a", "b"] and len(held(federation, "test")) == 20


def test_a_test_file_of_another_kind_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"reads as alpaca, but .* as completion"):
        prepare(Data(path, write(tmp_path / "t.jsonl", [{"text": "t"}])), Split(), PLAIN, 0)
    with pytest.raises(UserError, match="brings its own test rows"):
        prepare(Data("builtin:skills", path), Split("natural", None), PLAIN, 0)


# ---------------------------------------------------------------- duplicates


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=20, max_size=60), st.integers(1, 4), st.integers(0, 9))
def test_no_duplicate_is_both_trained_and_tested_anywhere(
    tmp_path_factory: pytest.TempPathFactory, contents: list[int], clients: int, seed: int
) -> None:
    base = alpaca_rows(60)
    rows = base[:40] + [base[40 + i] for i in contents]
    folder = tmp_path_factory.mktemp("d")
    federation = prepare(Data(write(folder / "d.jsonl", rows)), Split("iid", clients), PLAIN, seed)
    kept = {part: {row_key(federation.rows[row]) for row in held(federation, part)} for part in PARTS}
    assert not kept["train"] & kept["test"]
    assert not kept["train"] & kept["validation"] and not kept["validation"] & kept["test"]
    assert federation.report.duplicates == len(contents) - len(set(contents))
    adds_up(federation)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=20, max_size=60), st.integers(1, 4), st.integers(0, 9))
def test_the_parts_are_those_of_plain_lists(
    tmp_path_factory: pytest.TempPathFactory, contents: list[int], clients: int, seed: int
) -> None:
    rows = alpaca_rows(20)
    rows = [rows[i] for i in contents] + rows[13:]
    path = write(tmp_path_factory.mktemp("d") / "d.jsonl", rows)
    federation = prepare(Data(path, val_set_size=4, test_set_size=5), Split("iid", clients), PLAIN, seed)
    groups = dict(zip(splitting.client_ids(clients), plain.iid(len(rows), clients, seed), strict=True))
    sizes = {name: len(members) for name, members in groups.items()}
    num_validation, num_test = (splitting.part_sizes(size, sizes, "x") for size in (4, 5))
    content = [row_key(federation.rows[row]) for row in range(len(rows))]
    wanted = plain.without_crossing(
        {
            name: plain.divide(members, content, num_validation[name], num_test[name], seed, name)
            for name, members in groups.items()
        },
        content,
    )
    for name, parts in wanted.items():
        assert tuple(held(federation, part, name) for part in PARTS) == parts


def test_rows_of_the_test_file_are_taken_out_of_training(tmp_path: Path) -> None:
    rows = alpaca_rows(40)
    federation = prepare(
        Data(write(tmp_path / "d.jsonl", rows), write(tmp_path / "t.jsonl", rows[:5])), Split("iid", 2), PLAIN, 0
    )
    assert federation.report.left_out == {"exact duplicate of a validation or test row": 5}
    assert federation.report.duplicates == 5 and len(held(federation, "test")) == 5
    assert not {row % 40 for row in held(federation, "train")} & set(range(5))
    adds_up(federation)


# ---------------------------------------------------------------- errors


def fails(data: Data, split: Split, code: str, *words: str, made: Any = PLAIN) -> None:
    with pytest.raises(UserError) as caught:
        prepare(data, split, made, 0)
    assert caught.value.code == code and caught.value.exit_code == 2, str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_an_empty_validation_split_is_an_error_with_the_arithmetic(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", alpaca_rows(30))
    fails(
        Data(path, val_set_size=0.01),
        Split("iid", 3),
        "split.no_validation",
        "data.val_set_size 0.01 gives no validation rows",
        "has 10 rows, and 0.01 x 10 = 0.1 is rounded to 0",
        "data.val_set_size=0 to do without",
        "at least 0.05",
    )
    fails(Data(path, test_set_size=0.01), Split("iid", 3), "split.no_test", "0.01 x 10")
    federation = prepare(Data(path, val_set_size=0), Split("iid", 3), PLAIN, 0)
    assert not held(federation, "validation")
    federation = prepare(Data(path, val_set_size=2), Split("iid", 3), PLAIN, 0)
    assert len(held(federation, "validation")) == 2
    assert "1 of 3 clients have no validation rows of their own" in federation.report.notes


def test_a_client_without_training_rows_is_an_error(tmp_path: Path) -> None:
    rows = [{**row, "user": "few" if i == 0 else "many"} for i, row in enumerate(alpaca_rows(30))]
    path = write(tmp_path / "d.jsonl", rows)
    federation = prepare(Data(path), Split("by_column", None, column="user"), PLAIN, 0)
    assert len(federation.clients["few"].train) == 1
    fails(
        Data(path, test_set_size=0.5),
        Split("by_column", None, column="user"),
        "split.no_train",
        "client few has no training rows: of its 1 row, 1 are for test",
    )


def test_more_clients_than_there_is_to_deal(path: str) -> None:
    fails(Data(path), Split("by_category", 9), "split.clients", "9, but the data has 4 categories", "at most 4")
    fails(Data(path), Split("iid", 121), "split.clients", "at most 120")
    fails(Data(path), Split("files", None), "split.files", "single file")
    fails(Data(path), Split("natural", None), "split.natural", "built-in tasks")
    fails(Data(path), Split("by_column", None), "split.column", "needs split.column")
    fails(Data(path), Split("by_colum", None), "split.kind", "did you mean 'by_column'")


def test_all_answers_cut(path: str) -> None:
    fails(
        Data(path, max_length=20), Split(), "data.all_cut", "all 120 rows lose their whole answer", "data.max_length="
    )


def test_a_client_that_loses_all_its_rows_to_the_length_limit(tmp_path: Path) -> None:
    rows = [{**row, "user": "short"} for row in alpaca_rows(20)]
    rows += [{"instruction": f"long {i} " + "x" * 500, "output": "a", "user": "long"} for i in range(20)]
    fails(
        Data(write(tmp_path / "d.jsonl", rows), max_length=300),
        Split("by_column", None, column="user"),
        "split.no_train",
        "client long has no training rows left",
        "max_length 300",
    )


# ---------------------------------------------------------------- the report


def test_what_was_left_out_and_cut_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    room = len(alpaca_prompt("say number 10")) + 6
    rows = [{"instruction": f"say number {i}", "output": f"n{i}"} for i in range(10, 90)]
    rows += [{"instruction": f"say number {i}", "output": f"much too long {i}"} for i in range(10, 15)]
    rows += [{"instruction": f"say the long number {i}", "output": "x"} for i in range(3)]
    rows += [
        {"instruction": "i", "output": None},
        {"instruction": None, "output": "o"},
        {"instruction": "", "output": "o"},
    ]
    with caplog.at_level(logging.INFO, logger="fedloom"):
        federation = prepare(Data(write(tmp_path / "d.jsonl", rows), max_length=room), Split("iid", 2), PLAIN, 0)
    report = federation.report
    assert report.left_out == {"answer wholly cut by max_length": 3, "empty instruction": 2, "empty output": 1}
    assert (report.rows_read, report.rows_used, report.cut, report.max_length) == (91, 85, 5, room)
    assert report.read_as == "alpaca" and report.layout == "the Alpaca layout" and report.stop == "</s>"
    assert (
        report.lengths["p50"] <= room < report.lengths["max"] and report.tokens["train"] > report.tokens["train_target"]
    )
    assert any("3.4% of rows lose their whole answer and are left out; 95 % fit in" in note for note in report.notes)
    assert any("5 rows lose the end of their answer" in note for note in report.notes)
    said = caplog.text
    assert (
        "read as alpaca: 88 rows, 3 left out" in said
        and "2 clients (iid)" in said
        and "lose their whole answer" in said
    )
    adds_up(federation)


def test_rows_a_template_refuses_are_counted(tmp_path: Path) -> None:
    template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    made = tokenizer(eos="<|im_end|>", special=["<|im_start|>"], template=template)
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"a{i}"}]}
        for i, text in enumerate(["bad", *["good"] * 20])
    ]
    federation = prepare(Data(write(tmp_path / "d.jsonl", rows)), Split("iid", 2), made, 0)
    assert federation.report.left_out == {"refused by the chat template": 1}
    assert federation.report.layout == "the tokenizer's chat template" and federation.report.stop == "<|im_end|>"
    adds_up(federation)


def test_rows_without_a_category_are_counted(tmp_path: Path) -> None:
    rows = alpaca_rows(40, CATEGORIES)
    del rows[0]["category"]
    federation = prepare(Data(write(tmp_path / "d.jsonl", rows)), Split("by_category", None), PLAIN, 0)
    assert federation.report.left_out == {"no category": 1}
    adds_up(federation)


def test_pooled_small_prompts_and_preview(path: str) -> None:
    federation = prepare(Data(path, max_length=250), Split("by_category", None), PLAIN, 0)
    pooled = federation.pooled("test")
    assert [example.row for example in pooled] == held(federation, "test")
    small = federation.small(2, 5)
    assert [tuple(len(getattr(client, part)) for part in PARTS) for client in small.clients.values()] == [(5, 3, 3)] * 2
    assert [(line.id, line.train) for line in small.report.clients] == [(name, 5) for name in small.clients]
    assert all("small part" not in note for note in federation.report.notes)
    for example in federation.pooled("train"):
        prompt = federation.prompt_ids([example])[0]
        assert example.input_ids[: len(prompt)].tolist() == prompt
        shades = [shade for _, shade in federation.preview(example)]
        row = federation.rows[example.row]
        text = "".join(text for text, _ in federation.preview(example))
        assert text == alpaca_prompt(row["instruction"], row["input"]) + row["output"] + "</s>"
        cut = len(text) - len("</s>") + 1 > 250
        assert shades == ["masked", "trained", *(["cut"] if cut else [])]
    assert any(len(example.input_ids) == 250 for example in federation.pooled("train"))


def test_a_thousand_clients_share_one_store(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", alpaca_rows(3000))
    federation = prepare(Data(path, val_set_size=0, test_set_size=3), Split("iid", 1000), PLAIN, 0)
    stores = {id(client.train.tokens) for client in federation.clients.values()}
    assert len(stores) == 1 and len(federation.clients) == 1000 and "c999" in federation.clients
    assert np.sum([len(client.train) for client in federation.clients.values()]) == 2997


def test_settings_of_the_recipe_itself_fit(path: str) -> None:
    """The recipe's own models are what `prepare` takes."""
    from fedloom.study.blocks import DataRecipe, SplitRecipe

    federation = prepare(DataRecipe(path=path), SplitRecipe(clients=3), PLAIN, 0)
    assert len(federation.clients) == 3 and held(federation, "validation") and held(federation, "test")


def test_limit_and_train_on_inputs_reach_the_data(path: str) -> None:
    federation = prepare(replace(Data(path), limit=30, train_on_inputs=True), Split("iid", 2), PLAIN, 0)
    assert federation.report.rows_read == 30
    assert federation.report.tokens["train_target"] == federation.report.tokens["train"] - len(
        federation.pooled("train")
    )
