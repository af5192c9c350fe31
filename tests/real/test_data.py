"""Real data through a real tokenizer: counts that are known, and that nothing is lost without being said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.toys import Data, Split
from transformers import AutoTokenizer

from fedloom.data import prepare, read, render_tokens, round_batches
from fedloom.data.catalog import CATALOG
from fedloom.data.federation import PARTS, Federation
from fedloom.data.pair_batches import Pairs
from fedloom.data.sources import find_files, sources_of, state_of
from fedloom.data.tokens import NO_LOSS, pad_id_of
from fedloom.study.blocks import DataRecipe
from fedloom.study.recipe import Recipe

Find = Callable[[str], Path]
CATEGORIES = [
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
]


@pytest.fixture(scope="module")
def stories(real_path: Find) -> Any:
    return AutoTokenizer.from_pretrained(real_path("models/stories260K"))


def adds_up(federation: Federation) -> None:
    report = federation.report
    used = sum(len(getattr(client, part)) for client in federation.clients.values() for part in PARTS)
    assert report.rows_used == used and report.rows_read == used + sum(report.left_out.values())


def test_gsm8k_whole(real_path: Find, stories: Any) -> None:
    data = Data(
        str(real_path("data/gsm8k/train.jsonl")),
        str(real_path("data/gsm8k/test.jsonl")),
        max_length=512,
        val_set_size=0.05,
    )
    federation = prepare(data, Split("iid", 3), stories, 0)
    report = federation.report
    assert report.read_as == "alpaca" and report.rows_read == 7473 + 1319
    assert [client.train + client.validation for client in report.clients] == pytest.approx([2491] * 3, abs=5)
    assert all(row["output"].rpartition("\n")[2].startswith("The answer is ") for row in federation.rows)
    assert "<<" in federation.rows[0]["output"]
    adds_up(federation)
    assert (
        report.cut > 2000 and "answer wholly cut by max_length" in report.left_out
    )  # 512 is short for this vocabulary
    for example in federation.clients["c00"].train[:50]:
        text = "".join(text for text, _ in render_tokens(example, stories))
        whole = federation.rows[example.row]
        assert whole["instruction"] in text
        prompt = federation.prompt_ids([example])[0]
        assert example.input_ids[: len(prompt)].tolist() == prompt and prompt[0] == stories.bos_token_id
        assert (example.labels[: len(prompt)] == NO_LOSS).all() and (example.labels[len(prompt) :] != NO_LOSS).all()
        stops = example.input_ids[-1] == stories.eos_token_id
        assert stops == (whole["output"] in text)


def test_dolly_one_client_per_file(real_path: Find, stories: Any) -> None:
    folder = real_path("data/dolly")
    data = Data(str(folder), str(folder / "global_test.json"), max_length=1024)
    federation = prepare(data, Split("files", None), stories, 0)
    assert sorted(federation.clients) == [f"local_training_{i}" for i in range(10)]
    report = federation.report
    assert report.rows_read == 15_011 and report.duplicates == 15
    # 80 test rows, ten of each category, dealt at random; a few lose their whole answer at this length.
    assert len(federation.pooled("test")) + 15 >= 80
    train_rows = federation.clients["local_training_1"].train.rows
    assert {federation.rows[row]["category"] for row in train_rows} == {"classification", "open_qa"}
    adds_up(federation)


def test_dolly_by_category(real_path: Find, stories: Any) -> None:
    pattern = str(real_path("data/dolly") / "local_training_[0268].json")  # together they have all categories
    federation = prepare(Data(pattern, max_length=1024), Split("by_category", 8), stories, 0)
    assert sorted(federation.clients) == CATEGORIES and federation.report.rows_read == 5973
    for name, client in federation.clients.items():
        for part in PARTS:
            rows = getattr(client, part).rows
            assert len(rows) and {federation.rows[row]["category"] for row in rows} == {name}
    adds_up(federation)


def test_dolly_dirichlet_loses_nobody(real_path: Find, stories: Any) -> None:
    data = Data(str(real_path("data/dolly")), limit=2000, max_length=1024)
    federation = prepare(data, Split("dirichlet", 20, 0.3), stories, 0)
    assert len(federation.clients) == 20 and all(len(client.train) for client in federation.clients.values())
    adds_up(federation)


def test_codealpaca(real_path: Find, stories: Any) -> None:
    federation = prepare(
        Data(str(real_path("data/code/new_codealpaca.json")), max_length=512), Split("iid", 4), stories, 0
    )
    assert federation.report.rows_read == 4535 and federation.report.read_as == "alpaca"
    assert sum(row["input"] == "" for row in federation.rows) == 955
    adds_up(federation)


def test_other_real_files_are_recognised(real_path: Find) -> None:
    assert read(str(real_path("data/qa/boolq_train.json"))).said == "read as alpaca: 9,427 rows"
    with pytest.raises(Exception, match="the columns are"):
        read(str(real_path("data/humaneval/HumanEval.jsonl.gz")), limit=5)


def test_padding_on_gsm8k(real_path: Find, stories: Any) -> None:
    """Measured, 8 clients, batch 4, 30 steps, 2 rounds: plain order 43.1 %, buckets in a shared order 9.1 %."""
    data = Data(str(real_path("data/gsm8k/train.jsonl")), limit=4000)
    federation = prepare(data, Split("iid", 8), stories, 0)

    def padding(bucket: bool) -> float:
        real = positions = 0
        for round in range(2):
            cohort = [
                round_batches(
                    client.train,
                    batch_size=4,
                    num_steps=30,
                    pad_id=pad_id_of(stories),
                    seed=0,
                    round=round,
                    client=name,
                    bucket=bucket,
                )
                for name, client in federation.clients.items()
            ]
            real += sum(batches.num_tokens for batches in cohort)
            longest = np.asarray([[longest for _, longest in batches.shapes] for batches in cohort])
            positions += 4 * len(cohort) * int(longest.max(axis=0).sum())
        return 1 - real / positions

    plain, aligned = padding(False), padding(True)
    print(f"padding on GSM8K: plain {plain:.1%}, buckets in a shared order {aligned:.1%}")
    assert aligned < 0.13 < 0.3 < plain


def test_preference_data_whole(real_path: Find, stories: Any) -> None:
    harmless = read(str(real_path("data/preference/hh_harmless_base_test.jsonl.gz")))
    assert harmless.kind == "preference" and harmless.read == 2312
    assert harmless.dropped == {"empty answer": 4, "the dialogues differ before their last answer": 5}
    assert all(row["messages"][0]["role"] == "user" for row in harmless.rows)
    path = str(real_path("data/preference/llamafactory_dpo_en_demo.json"))
    federation = prepare(Data(path, max_length=2048), Split("iid", 3), stories, 0)
    adds_up(federation)
    pairs = Pairs(federation.pooled("train"))
    assert federation.report.rows_read == 300 and len(pairs) > 150
    for chosen, rejected in pairs[:20]:
        row = federation.rows[chosen.row]
        for side, example in (("chosen", chosen), ("rejected", rejected)):
            shown = federation.preview(example, side=side == "rejected")
            learnt = "".join(text for text, shade in shown if shade == "trained").strip()
            assert learnt.startswith(row[side][-1]["content"][:20].strip())


def named(name: str, **data: Any) -> Recipe:
    """The recipe that says no more than the name."""
    settings = {"name": name, "max_length": 1024, **data}
    return Recipe.model_validate({"model": "m", "local_steps": 1, "data": settings})


@pytest.fixture
def home(real_path: Find, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLOOM_DATA", str(real_path("data")))
    return real_path("data")


def test_published_files_are_as_published(home: Path) -> None:
    states = {
        path.name: state_of(home / entry.folder, file)
        for entry in CATALOG.values()
        for form in entry.forms
        for file in (*form.train, *form.test)
        for path in (home / entry.folder).glob(file.name)
        if file.sha256 is not None
    }
    assert len(states) >= 6 and set(states.values()) == {"here, as published"}
    rows = {name: len(sources_of(DataRecipe(name=name), 0)[0].rows) for name in ("fed-gsm8k", "dpo-en-demo")}
    assert rows == {name: CATALOG[name].rows for name in rows}


def test_gsm8k_and_dolly_by_name(home: Path, stories: Any) -> None:
    recipe = named("fed-gsm8k")
    gsm8k = prepare(recipe.data, recipe.split, stories, 0)
    assert len(gsm8k.clients) == 3 and gsm8k.report.rows_read == 7473 + 1319
    tests = [gsm8k.rows[example.row]["instruction"] for example in gsm8k.pooled("test")]
    assert len(tests) > 1300 and any(question.startswith("Janet") for question in tests)
    adds_up(gsm8k)
    recipe = named("fed-dolly")
    dolly = prepare(recipe.data, recipe.split, stories, 0)
    assert sorted(dolly.clients) == CATEGORIES and dolly.report.rows_read == 15_011
    assert len(dolly.pooled("test")) <= 80
    adds_up(dolly)
    source, tests = sources_of(named("fed-dolly", test_set_size=0.01).data, 0)
    assert source.files == tuple(f"local_training_{i}" for i in range(10)) and tests is None
    assert "global_test.json is not read: data.test_set_size says what is tested on" in source.notes


def test_code_alpaca_by_name_with_derived_languages(home: Path, stories: Any) -> None:
    recipe = named("fed-codealpaca", max_length=512)
    federation = prepare(recipe.data, recipe.split, stories, 0)
    report = federation.report
    assert sorted(federation.clients) == ["C", "C#", "C++", "Java", "PHP", "Python"] and report.rows_read == 4535
    assert report.left_out["language undecided"] < 40
    signs = {"<?php": "PHP", "System.out.println": "Java", "using namespace std": "C++", "Console.WriteLine": "C#"}
    wrong = [  # but for translations, whose answers speak of both
        (client.id, sign)
        for client in federation.clients.values()
        for example in client.train
        for sign, language in signs.items()
        if sign in federation.rows[example.row]["output"] and client.id != language
    ]
    assert len(wrong) <= 3, wrong
    adds_up(federation)


def test_speakers_are_natural_clients(home: Path, stories: Any) -> None:
    recipe = named("tinyshakespeare", max_length=512)
    federation = prepare(recipe.data, recipe.split, stories, 0)
    assert len(federation.clients) == 98 and {"ROMEO", "JULIET", "KING RICHARD III"} <= set(federation.clients)
    assert federation.report.rows_read == 7222 and federation.report.left_out["empty text"] == 125
    romeo = [federation.rows[example.row]["text"] for example in federation.clients["ROMEO"].train]
    assert len(romeo) > 100 and not any("ROMEO:" in text for text in romeo)
    adds_up(federation)


def test_a_preference_set_by_a_copy(home: Path, stories: Any) -> None:
    assert find_files(CATALOG["hh-harmless"], None) is None  # its test pairs alone are not the set
    path = str(home / "preference" / "hh_harmless_base_test.jsonl.gz")
    recipe = named("hh-harmless", path=path)
    federation = prepare(recipe.data, recipe.split, stories, 0)
    assert federation.report.read_as == "preference" and federation.report.rows_read == 2312
    adds_up(federation)
