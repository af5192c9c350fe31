"""The built-in tasks, their interpreter, and the base model in the package. Nothing is trained here."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.pretrain_base.corpus import DOCUMENTS, RowFilter, documents, prompt_of

from fedloom.data.builtin import TASKS, Row
from fedloom.data.builtin.arith import chain_pool
from fedloom.data.builtin.interpreter import (
    LANGUAGES,
    MAX_CHARS,
    MAX_DEPTH,
    ProgramError,
    execute,
    run,
    translate,
)
from fedloom.data.builtin.pools import pool_of, random_of
from fedloom.data.builtin.programs import ARGUMENTS, Step, draw_chain, hidden_tests, program_of, value_of
from fedloom.data.builtin.scoring import final_number, score
from fedloom.data.builtin.skills import CLASS_WORDS, list_pool, number_pool, story_pool, word_key, word_pool
from fedloom.data.builtin.words import CITIES, CLASSES, ENGLISH, JOBS, NAMES

BASE = Path(__file__).parents[2] / "src" / "fedloom" / "models" / "builtin_base"
SPLITS = ("train", "validation", "test")
SEEDS = (0, 1, 2)


def rows_of(name: str, seed: int = 0) -> Iterator[tuple[str, str, Row]]:
    """(client, split, row) of every row of a task."""
    for client, splits in TASKS[name].rows(seed).items():
        for split, rows in splits.items():
            for row in rows:
                yield client, split, row


def content_of(name: str, row: Row) -> str:
    """What a row is about, whatever the phrasing, the client or the surface."""
    if name == "skills":
        match row["category"]:
            case "reverse" | "upper" | "sort":
                return word_key(row["input"])  # all orders of the same letters are one
            case "compare" | "classify":
                return " ".join(sorted(row["input"].split(" and ")))
            case "extract":
                words = row["input"].replace(",", "").replace(".", "").split()
                return " ".join(sorted(w for w in words if w in JOBS or (w[0].isupper() and w not in ("The", "In"))))
            case _:
                return str(row["input"])
    if name == "arith":
        return str(row["instruction"])
    return json.dumps(row["tests"])  # two programs that compute the same are one


# ------------------------------------------------------------------------------------------------------------- rows


def test_importing_the_tasks_loads_no_heavy_package() -> None:
    code = (
        "import sys, fedloom.data.builtin.scoring; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", TASKS)
def test_rows_have_the_stated_shape_and_sizes(name: str) -> None:
    task = TASKS[name]
    rows = task.rows(0)
    assert task.name == name
    assert tuple(rows) == task.clients
    sizes = {tuple(len(splits[split]) for split in SPLITS) for splits in rows.values()}
    assert sizes == {{"skills": (128, 32, 50), "arith": (100, 40, 70), "code": (128, 32, 50)}[name]}
    keys = {"instruction", "input", "output", "category"} | ({"tests", "language"} if name == "code" else set())
    for client, _, row in rows_of(name):
        assert set(row) == keys
        assert row["instruction"] and row["output"] and isinstance(row["input"], str)
        assert name == "arith" or row["category"] == client
        assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_a_function_of_the_seed_in_every_process(name: str) -> None:
    rows = TASKS[name].rows(3)
    assert rows == TASKS[name].rows(3)
    code = f"import json; from fedloom.data.builtin import TASKS; print(json.dumps(TASKS[{name!r}].rows(3)))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert json.loads(other.stdout) == rows


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_changes_training_and_validation_and_never_the_test(name: str) -> None:
    first, second = TASKS[name].rows(0), TASKS[name].rows(1)
    for client in TASKS[name].clients:
        assert first[client]["test"] == second[client]["test"]
        assert first[client]["train"] != second[client]["train"]
        assert first[client]["validation"] != second[client]["validation"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_content_within_and_across_clients(name: str, seed: int) -> None:
    contents: dict[str, set[str]] = {split: set() for split in SPLITS}
    for _, split, row in rows_of(name, seed):
        contents[split].add(content_of(name, row))
    for one, other in itertools.combinations(SPLITS, 2):
        assert not contents[one] & contents[other]


@pytest.mark.parametrize("name", TASKS)
def test_test_contents_stay_out_of_the_training_of_every_seed(name: str) -> None:
    test = {content_of(name, row) for _, split, row in rows_of(name) if split == "test"}
    for seed in range(8):
        assert not test & {content_of(name, row) for _, split, row in rows_of(name, seed) if split != "test"}


@pytest.mark.parametrize("name", TASKS)
def test_no_row_occurs_twice(name: str) -> None:
    texts = [(row["category"] * (name == "skills"), row["instruction"], row["input"]) for _, _, row in rows_of(name)]
    assert len(set(texts)) == len(texts)


def pool_of_row(name: str, row: Row) -> str:
    """The pool that a row's content belongs to, from the row's text alone."""
    if name == "arith":
        first, *others = row["output"].partition(" The answer")[0].split(". ")
        return chain_pool(first.partition(" =")[0].replace(" ", "") + "".join("".join(o.split()[1:3]) for o in others))
    if name == "code":
        return pool_of("function", " ".join(str(value) for _, value in row["tests"]))
    match row["category"]:
        case "reverse" | "upper" | "sort":
            return word_pool(row["input"])
        case "count" | "last":
            return list_pool(row["input"].split(", "))
        case "compare":
            a, b = row["input"].split(" and ")
            return number_pool(int(a), int(b))
        case "extract":
            words = row["input"].replace(",", " ").replace(".", " ").split()
            found = [next(w for w in words if w in known) for known in (NAMES, CITIES, JOBS)]
            return story_pool(*found)
        case _:
            word = row["input"].split()[0]
            return next(pool for pool, classes in CLASS_WORDS.items() if any(word in w for w in classes.values()))


@pytest.mark.parametrize("name", TASKS)
def test_every_row_comes_from_the_pool_of_its_split(name: str) -> None:
    for _, split, row in rows_of(name, seed=4):
        assert pool_of_row(name, row) == split, row


def test_two_step_problems_of_different_splits_never_share_their_numbers() -> None:
    chains: dict[str, set[str]] = {split: set() for split in SPLITS}
    for _, split, row in rows_of("arith"):
        chains[split].add(row["output"])
    for one, other in itertools.combinations(SPLITS, 2):
        assert not chains[one] & chains[other]


def test_classes_are_large_and_divided_by_word() -> None:
    assert all(len(set(words)) >= 40 for words in CLASSES.values())
    words: dict[str, set[str]] = {split: set() for split in SPLITS}
    for client, split, row in rows_of("skills"):
        if client == "classify":
            words[split].update(row["input"].split(" and "))
    for one, other in itertools.combinations(SPLITS, 2):
        assert not words[one] & words[other]


def test_made_up_words_are_no_english_words() -> None:
    inputs = [row["input"] for client, _, row in rows_of("skills") if client in ("reverse", "upper", "sort")]
    assert not ENGLISH & set(inputs)


def test_pools_are_fixed_and_of_the_stated_sizes() -> None:
    # Literal values: a change of the hash would silently move test content into the pretraining text.
    assert [pool_of("word", word) for word in ("difo", "javar", "atiku", "loce")] == POOLS_OF_FOUR_WORDS
    drawn = [pool_of("any", str(i)) for i in range(4_000)]
    shares = {pool: drawn.count(pool) / len(drawn) for pool in set(drawn)}
    assert shares == pytest.approx({"pretrain": 0.5, "train": 0.25, "validation": 0.1, "test": 0.15}, abs=0.03)


POOLS_OF_FOUR_WORDS = ["pretrain", "train", "test", "pretrain"]


# ------------------------------------------------------------------------------------------------- pretraining text


@pytest.fixture(scope="module")
def pretraining_text() -> str:
    return "\n".join(itertools.islice(documents(0), 12_000))


def test_pretraining_text_holds_no_row_of_a_test_set(pretraining_text: str) -> None:
    text = " " + pretraining_text.lower().replace("\n", " ") + " "
    for name in TASKS:
        for client, split, row in rows_of(name):
            if split != "test":
                continue
            assert row["input"] or row["instruction"].lower() not in text
            needle = row["input"] or row["output"].removesuffix(f" The answer is {final_number(row['output'])}.")
            if name == "arith" and needle.count("=") == 1:
                continue  # "6 - 2 = 4." is arithmetic; the problem itself was looked for above
            ends = " .,:;" if client not in ("compare",) else " :"
            assert not any(f" {needle.lower()}{end}" in text for end in ends), (name, row)


def test_pretraining_text_holds_no_content_of_training_or_validation_either() -> None:
    # By construction: whatever words a document is about come from the pool that no row may use.
    words = {
        word_key(row["input"])
        for seed in SEEDS
        for client, _, row in rows_of("skills", seed)
        if client in ("reverse", "upper", "sort")
    }
    functions = {row["output"] for seed in SEEDS for _, _, row in rows_of("code", seed)}
    for text in itertools.islice(documents(1), 6_000):
        for word in text.replace(".", " ").replace(":", " ").split():
            assert word.lower() in ENGLISH or word_key(word) not in words, text
        for part in text.split(" in "):
            assert part.partition(" ")[2].removesuffix(".") not in functions


def test_the_filter_finds_a_planted_test_row() -> None:
    test_filter = RowFilter()
    for name in TASKS:
        for _, split, row in rows_of(name):
            planted = row["input"] or row["instruction"]
            assert test_filter.holds_test_row(f"Before, {planted.upper()}  and after.") == (split == "test"), row


def test_pretraining_documents_are_seeded_and_of_every_kind() -> None:
    first = list(itertools.islice(documents(4), 300))
    assert first == list(itertools.islice(documents(4), 300))
    assert first != list(itertools.islice(documents(5), 300))
    assert len(set(first)) > 280
    rng = random.Random(0)
    for make, weight in DOCUMENTS:
        assert weight > 0
        assert make(rng).endswith(".")


# ---------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("name", TASKS)
def test_gold_answers_score_one_and_others_zero(name: str) -> None:
    rows = [row for _, split, row in rows_of(name) if split == "test"]
    assert all(score(name, row, row["output"]) == 1.0 for row in rows)
    assert all(score(name, row, f" {row['output']}\n") == 1.0 for row in rows)
    assert not any(score(name, row, "") for row in rows)
    # Another row's answer is wrong, unless it happens to be the same answer or the same function.
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        same = (
            final_number(row["output"]) == final_number(other["output"])
            if name == "arith"
            else row["output"] == other["output"]
        )
        assert score(name, row, other["output"]) == float(same)


def test_final_number_is_the_last_one_named() -> None:
    assert final_number("2 + 7 = 9. The answer is 9. The answer is -12.") == -12
    assert final_number("The answer is 9") == 9
    assert final_number("9") is None
    assert score("arith", {"output": "The answer is 9."}, "The answer is 90.") == 0.0


def test_a_program_of_another_language_fails() -> None:
    for _, split, row in rows_of("code"):
        if split == "validation":
            for language in set(LANGUAGES) - {row["language"]}:
                assert score("code", {**row, "language": language}, row["output"]) == 0.0


def test_another_program_for_the_same_function_passes() -> None:
    row = {"language": "birch", "tests": hidden_tests((Step("add", 3), Step("mul", 2))), "output": ""}
    assert score("code", row, "(fn n (add (mul 2 n) 6))") == 1.0
    assert score("code", row, "(fn n (add (mul 2 n) 5))") == 0.0


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="no built-in task 'chess', there are arith, skills, code"):
        score("chess", {}, "")


# ------------------------------------------------------------------------------------------------------ interpreter


def test_programs_mean_what_their_steps_mean() -> None:
    rng = random_of("test", "programs")
    for _ in range(400):
        chain = draw_chain(rng, rng.randint(1, 4))
        for language in LANGUAGES:
            program = translate(language, program_of(language, chain))
            for x in ARGUMENTS:
                assert execute(program, [x]) == value_of(chain, x), (language, chain)


@pytest.mark.parametrize(
    ("language", "text", "arguments", "value"),
    [
        ("alder", "f(x) = x + 3 * 2", [4], 10),
        ("alder", "f(x) = (x+3)*2", [4], 14),
        ("alder", "f(x) = 10 - x - 1", [4], 5),
        ("alder", "f(x) = -x ^ 2", [4], -16),
        ("alder", "f(x) = --x * -2", [4], -8),
        ("alder", "f(a, b) = max(a, b) - min(a, b)", [3, 8], 5),
        ("birch", "(fn x (sub (sq x) (neg 1)))", [4], 17),
        ("birch", "(fn (a b) (max a b))", [3, 8], 8),
        ("cedar", "x : x 3 - neg ;", [4], -1),
        ("cedar", "a b : a b * ;", [3, 8], 24),
        ("maple", "x", [4], 4),
        ("maple", "a b | minus b | square", [3, 8], 25),
        ("maple", "x | floor 3 | cap 9 | flip", [20], -9),
    ],
)
def test_the_languages(language: str, text: str, arguments: list[int], value: int) -> None:
    assert run(language, text, arguments) == value


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("alder", "", "expected 'f', found the end"),
        ("alder", "f(x) = ", "expected a number or a parameter, found the end"),
        ("alder", "f(x) = y", "expected a number or a parameter, found 'y'"),
        ("alder", "f(x) = x x", "expected the end of the program, found 'x'"),
        ("alder", "f(x, x) = x", "two parameters are called 'x'"),
        ("alder", "f(x) = x ^ 9", "exponent 9 is not between 0 and 8"),
        ("alder", "f(x) = x ^ x", "expected a whole exponent, found 'x'"),
        ("alder", "f(x) = x / 2", "unreadable character '/'"),
        ("alder", "f(x) = __import__('os')", "unreadable character '_'"),
        ("alder", "f(x) = ٣", "unreadable character '٣'"),
        ("birch", "(fn x (pow x 2))", "expected an operation, found 'pow'"),
        ("birch", "(fn (x", "expected the name of a parameter, found the end"),
        ("cedar", "x : + ;", "add needs two values"),
        ("cedar", "x : neg ;", "neg needs a value"),
        ("cedar", "x : x x ;", "2 values are left, not one"),
        ("cedar", "x : ;", "0 values are left, not one"),
        ("maple", "x | plus", "expected a number or a parameter, found the end"),
        ("maple", "x | jump 3", "expected a verb, found 'jump'"),
        ("maple", "a b | plus b", "2 parameters, but 1 arguments"),
        ("elm", "x", "no language 'elm', there are alder, birch, cedar, maple"),
        ("maple", "x | plus 1234567890", "number of 10 digits, at most 9 are read"),
        ("maple", "x" + " " * MAX_CHARS + "| flip", f"at most {MAX_CHARS} are read"),
        ("maple", "x" + " | flip" * 250, "program of more than 400 tokens"),
        ("cedar", "x : 9" + " sq" * 30 + " ;", "a value beyond"),
    ],
)
def test_what_is_wrong_is_said(language: str, text: str, message: str) -> None:
    with pytest.raises(ProgramError) as caught:
        run(language, text, [4])
    assert message in str(caught.value)


def test_hostile_programs_neither_hang_nor_recurse_deep_nor_raise_anything_else() -> None:
    started = time.perf_counter()
    big = 200_000
    hostile = [
        "(" * big,
        "f(x) = " + "(" * big,
        "f(x) = " + "(" * 300 + "x" + ")" * 300,
        "f(x) = " + "-" * 380 + "x",
        "f(x) = " + "max(" * 90 + "x",
        "f(x) = " + "9 ^ 8 ^ 8 ^ 8",
        "f(x) = " + " * ".join(["999999999"] * 60),
        "(fn x " + "(neg " * 150 + "x" + ")" * 150 + ")",
        "(fn (" + " a" * 390,
        "x : " + "9 " * 390,
        "x : x" + " sq" * 380 + " ;",
        "x :" * 130,
        "x" + " | square" * 190,
        " " * big,
        "\n" * 1_000 + "x",
        "\x00\ud800\U0001f600",
        "f(x) = x\u00b2",
        "x" * 1_900,
        "0" * 1_900,
    ]
    for text in hostile:
        for language in LANGUAGES:
            with contextlib.suppress(ProgramError):
                assert isinstance(run(language, text, [5]), int)
    assert time.perf_counter() - started < 2.0


def test_nesting_is_limited_by_us_and_not_by_python() -> None:
    def nested(depth: int) -> str:
        return "f(x) = " + "(" * depth + "x" + ")" * depth

    assert run("alder", nested(MAX_DEPTH - 1), [5]) == 5
    with pytest.raises(ProgramError, match="nested deeper than"):
        run("alder", nested(MAX_DEPTH), [5])


def test_garbage_never_raises_anything_but_its_own_error() -> None:
    rng = random.Random(5)
    pieces = [
        "f",
        "(",
        ")",
        "x",
        "y",
        "=",
        "+",
        "-",
        "*",
        "^",
        ",",
        "|",
        ":",
        ";",
        "3",
        "12",
        "max",
        "min",
        "fn",
        "add",
    ]
    pieces += [
        "sq",
        "neg",
        "plus",
        "cap",
        "flip",
        "\n",
        "é",
        "_",
        "'",
        "\\",
        "%",
        "00",
        "-1",
        "f(x) =",
        "(fn x",
        "x :",
        "x |",
    ]
    starts = {"alder": "f(x) = ", "birch": "(fn x ", "cedar": "x : ", "maple": "x | "}
    read = 0
    for _ in range(6_000):
        language = rng.choice(LANGUAGES)
        text = rng.choice(("", starts[language])) + " ".join(rng.choices(pieces, k=rng.randint(0, 12)))
        try:
            run(language, text, [rng.randint(-50, 50)])
            read += 1
        except ProgramError:
            pass
    assert read > 20  # the garbage is good enough that some of it is a program


# -------------------------------------------------------------------------------------------------------------- base


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_the_base_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in BASE.iterdir() if path.is_file()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted | {"MODEL_CARD.md", "pretrain.json"} == set(files)
    assert sum(files.values()) <= 8 * 1024**2


def test_the_record_names_these_very_weights() -> None:
    import hashlib

    record = json.loads((BASE / "pretrain.json").read_text())
    for key, file in (("weights_sha256", "model.safetensors"), ("tokenizer_sha256", "tokenizer.json")):
        assert record[key] == hashlib.sha256((BASE / file).read_bytes()).hexdigest()
    assert record["weights_sha256"] in (BASE / "MODEL_CARD.md").read_text()


def test_the_base_is_a_stock_llama_with_finite_logits(tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.vocab_size == len(tokenizer)
    text = prompt_of("Reverse the word.", "Zürich 東京 \t<pad> 🙂")
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_special_tokens_are_distinct_and_bos_is_added_once(tokenizer: Any) -> None:
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer("dog").input_ids == [tokenizer.bos_token_id, *tokenizer("dog", add_special_tokens=False).input_ids]
    assert len(tokenizer(prompt_of("Reverse the word.", "difo"), add_special_tokens=False).input_ids) == 13


@pytest.mark.parametrize("name", TASKS)
def test_rows_survive_the_tokenizer(name: str, tokenizer: Any) -> None:
    for _, split, row in rows_of(name):
        if split != "validation":
            continue
        prompt, answer = prompt_of(row["instruction"], row["input"]), row["output"]
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        assert tokenizer(prompt + answer).input_ids == prompt_ids + answer_ids
        assert tokenizer.decode(prompt_ids + answer_ids, skip_special_tokens=True) == prompt + answer
        assert tokenizer.decode(answer_ids) == answer
        assert len(answer_ids) < TASKS[name].max_new_tokens
        assert tokenizer.unk_token_id not in prompt_ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dog",
        "  two  spaces ",
        "Zürich, 東京 🙂",
        "a\n\nb\tc",
        "### Instruction:\n",
        "don't (x^2)=4; [é]",
        "x" * 300,
    ],
)
def test_any_text_survives_the_tokenizer(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_words_of_instructions_are_one_token_and_made_up_words_are_letters(tokenizer: Any) -> None:
    vocabulary = set(tokenizer.get_vocab())
    for name in TASKS:
        for _, _, row in rows_of(name):
            for word in row["instruction"].replace(",", " ").replace(".", " ").replace("?", " ").split():
                assert word.isdigit() or word == "z" or f"Ġ{word}" in vocabulary, word
    for client, _, row in rows_of("skills"):
        if client in ("reverse", "upper", "sort"):
            assert len(tokenizer(row["input"], add_special_tokens=False).input_ids) == 1 + len(row["input"])
