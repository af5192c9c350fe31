"""Tokens and labels: what is trained, what is masked, what is cut; with every sort of tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.toys import CHATML, CHATML_MARKED, LLAMA2, Data, tokenizer

from fedloom.data.rows import Row
from fedloom.data.templates import PREAMBLE, PREAMBLE_INPUT, alpaca_prompt, answer_of, layout_for, prompt_of
from fedloom.data.tokens import NO_LOSS, Example, Examples, fits, pad_id_of, prompt_ids, render_tokens, tokenise
from fedloom.errors import UserError

PLAIN = tokenizer()
WITH_BOS = tokenizer(bos="<s>")
SPACED = tokenizer(bos="<s>", space=True)
IM = ("<|im_start|>", "<|im_end|>")
CHAT = tokenizer(eos="<|im_end|>", special=IM[:1], template=CHATML)
MARKED = tokenizer(eos="<|im_end|>", special=IM[:1], template=CHATML_MARKED)
ALL = {"plain": PLAIN, "bos": WITH_BOS, "spaced": SPACED, "chat": CHAT, "marked": MARKED}


def alpaca(output: str = "an answer", input: str = "", instruction: str = "do it") -> Row:
    return {"kind": "alpaca", "instruction": instruction, "input": input, "output": output, "columns": {}}


def chat(*turns: str, system: str | None = None) -> Row:
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"kind": "chat", "messages": messages, "columns": {}}


def only(row: Row, made: Any, **settings: Any) -> Example:
    return tokenise([row], made, **settings).tokens.example(0)


def parts(example: Example, made: Any) -> list[tuple[str, str]]:
    return [(text, shade) for text, shade in render_tokens(example, made)]


# ---------------------------------------------------------------- layouts


def test_the_alpaca_layout_to_the_letter() -> None:
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca_prompt("Go.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGo.\n\n### Response:\n"
    )


def test_auto_takes_the_tokenizers_template_if_it_has_one() -> None:
    assert layout_for(PLAIN, "auto") == "alpaca" and layout_for(CHAT, "auto") == "tokenizer"
    assert layout_for(CHAT, "alpaca") == "alpaca"
    with pytest.raises(UserError, match="has no chat template"):
        layout_for(PLAIN, "tokenizer")
    with pytest.raises(UserError, match="must be auto, alpaca or tokenizer"):
        layout_for(CHAT, "vicuna")


def test_loss_on_answer_and_stop_token_only() -> None:
    assert parts(only(alpaca("an answer", "x"), PLAIN), PLAIN) == [
        (alpaca_prompt("do it", "x"), "masked"),
        ("an answer</s>", "trained"),
    ]


def test_train_on_inputs_trains_everything_but_the_first_token() -> None:
    example = only(alpaca(), PLAIN, train_on_inputs=True)
    assert (example.labels[1:] == example.input_ids[1:]).all() and example.labels[0] == NO_LOSS


def test_plain_text_is_never_put_into_a_template() -> None:
    row = {"kind": "prompt_completion", "prompt": "Q: 1\nA:", "completion": " one", "columns": {}}
    assert parts(only(row, CHAT), CHAT) == [("Q: 1\nA:", "masked"), (" one<|im_end|>", "trained")]
    text = {"kind": "completion", "text": "once", "columns": {}}
    assert parts(only(text, WITH_BOS), WITH_BOS) == [("<s>", "masked"), ("once</s>", "trained")]
    # Without a beginning-of-sequence token nothing stands before the first token, so it carries no loss.
    assert parts(only(text, PLAIN), PLAIN) == [("o", "masked"), ("nce</s>", "trained")]


def test_chat_in_the_alpaca_layout() -> None:
    row = chat("u1", "a1", "u2", "a2", system="Be brief.")
    assert parts(only(row, PLAIN), PLAIN) == [
        ("Be brief.\n\n### Instruction:\nu1\n\n### Response:\n", "masked"),
        ("a1</s>", "trained"),
        ("\n\n### Instruction:\nu2\n\n### Response:\n", "masked"),
        ("a2</s>", "trained"),
    ]
    assert parts(only(chat("u", "a"), PLAIN), PLAIN)[0][0].startswith(PREAMBLE)


def test_loss_on_all_answers_of_a_chat() -> None:
    row = chat("u1", "a1", "u2", "a2", system="s")
    for made in (CHAT, MARKED):
        assert parts(only(row, made), made) == [
            ("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n", "masked"),
            ("a1<|im_end|>", "trained"),
            ("\n<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n", "masked"),
            ("a2<|im_end|>", "trained"),
        ]


def test_generation_marks_and_prefixes_give_the_same() -> None:
    for row in (chat("u", "a"), chat("u1", "é", "u2", "日本 a\n"), alpaca("x" * 30, "in")):
        one, other = only(row, CHAT), only(row, MARKED)
        assert (one.input_ids == other.input_ids).all() and (one.labels == other.labels).all()


def test_answers_marked_as_not_trained_are_masked() -> None:
    row = chat("u1", "a1", "u2", "a2")
    row["messages"][1]["train"] = False
    for made in (CHAT, MARKED, PLAIN):
        assert [text for text, shade in parts(only(row, made), made) if shade == "trained"] == ["a2" + made.eos_token]


def test_alpaca_rows_in_a_chat_template() -> None:
    assert parts(only(alpaca("out", "in"), CHAT), CHAT) == [
        ("<|im_start|>user\ndo it\n\nin<|im_end|>\n<|im_start|>assistant\n", "masked"),
        ("out<|im_end|>", "trained"),
    ]


def test_a_template_that_writes_the_stop_token_itself_gets_no_second() -> None:
    made = tokenizer(bos="<s>", template=LLAMA2)
    example = only(chat("u1", "a1", "u2", "a2"), made)
    assert parts(example, made) == [
        ("<s>[INST] u1 [/INST]", "masked"),
        (" a1</s>", "trained"),
        ("<s>[INST] u2 [/INST]", "masked"),
        (" a2</s>", "trained"),
    ]


def test_a_template_that_ends_an_answer_with_its_own_token_or_none() -> None:
    turns = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}END{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    own = tokenizer(template=turns.replace("END", "<end_of_turn>"), special=["<end_of_turn>"])
    assert parts(only(chat("u", "a"), own), own)[-1] == ("a<end_of_turn>", "trained")
    assert tokenise([chat("u", "a")], own).stop == "<end_of_turn>"
    none = tokenizer(template=turns.replace("END", "\n"))
    for answer in ("a", "a 日", "🙂"):  # a character may be several tokens
        assert parts(only(chat("u", answer), none), none)[-1] == (f"{answer}</s>", "trained")
        two = parts(only(chat("u", answer, "v", "b"), none), none)
        assert [text for text, shade in two if shade == "trained"] == [answer, "b</s>"]


def test_a_line_break_behind_the_stop_token_is_not_trained() -> None:
    inside = CHATML_MARKED.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")
    assert inside != CHATML_MARKED
    made = tokenizer(eos="<|im_end|>", special=IM[:1], template=inside)
    example = only(chat("u", "a"), made)
    assert parts(example, made)[-1] == ("a<|im_end|>", "trained")


def test_marks_without_a_stop_token_are_noted() -> None:
    made = tokenizer(special=IM, template=CHATML_MARKED.replace("<|im_end|>{% endg", "{% endg"))
    done = tokenise([chat("u", "a")] * 3, made)
    assert any("3 rows" in note and "without a stop token" in note for note in done.notes)
    broken = CHATML_MARKED.replace("{{ m['content'] }}<|im_end|>{% endg", "{% endg")
    with pytest.raises(UserError, match="mark no token"):
        tokenise([chat("u", "a")], tokenizer(special=IM, template=broken))


def test_a_template_that_is_not_incremental_is_refused_with_the_place() -> None:
    drops = (
        "{% for m in messages %}[{{ m['role'] }}]"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}{% endfor %}"
    )
    made = tokenizer(template=drops + "{% if add_generation_prompt %}[assistant]{% endif %}")
    assert len(only(chat("u", "a"), made).input_ids)
    with pytest.raises(UserError, match="not incremental") as caught:
        tokenise([chat("u1", "a1", "u2", "a2")], made)
    assert caught.value.code == "data.template_prefix" and "'a1'" in caught.value.message


def test_a_template_that_refuses_a_row_loses_that_row_alone() -> None:
    made = tokenizer(bos="<s>", template=LLAMA2)
    done = tokenise([chat("u", "a"), chat("u", "a", system="s"), chat("u", "b")], made)
    assert done.refused.tolist() == [False, True, False] and done.tokens.rows.tolist() == [0, 2]
    assert "only user and assistant" in done.notes[0]
    with pytest.raises(UserError, match="takes none of the 1 rows"):
        tokenise([chat("u", "a", system="s")], made)


def test_a_token_may_reach_from_prompt_into_answer() -> None:
    """The prompt ends with a space, and the tokenizer would join it with the answer's first word."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    made = tokenizer(template=template, corpus=["assistant: hello\n", "user: hello\n"] * 50, merges=40)
    row = chat("hi", "hello")
    whole = made(made.apply_chat_template(row["messages"], tokenize=False))["input_ids"]
    prompt = prompt_ids([row], made)[0]
    assert whole[: len(prompt)] != prompt, "the example is no example: nothing is joined"
    done = tokenise([row], made)
    assert done.tokens.ids[: len(prompt)].tolist() == prompt
    assert parts(done.tokens.example(0), made)[-1] == ("hello</s>", "trained")
    assert any("1 rows" in note and "tokenised in parts" in note for note in done.notes)


# ---------------------------------------------------------------- training and generation agree


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=30).filter(str.strip)


@pytest.mark.parametrize("name", sorted(ALL))
@given(instruction=TEXTS, input=TEXTS | st.just(""), output=TEXTS)
def test_generation_starts_from_the_very_tokens_of_training(
    name: str, instruction: str, input: str, output: str
) -> None:
    made = ALL[name]
    row = alpaca(output, input, instruction)
    example = only(row, made)
    first = int(np.flatnonzero(example.labels != NO_LOSS)[0])
    assert example.input_ids[:first].tolist() == prompt_ids([row], made)[0]
    trained = example.labels != NO_LOSS
    assert trained[first:].all() and example.input_ids[-1] == made.eos_token_id
    answer = made.decode(example.input_ids[first:-1].tolist(), skip_special_tokens=False)
    assert answer == (" " if name == "spaced" else "") + output


@pytest.mark.parametrize("name", sorted(ALL))
def test_prompts_of_many_rows_and_kinds_at_once(name: str) -> None:
    made = ALL[name]
    rows = [
        alpaca("a"),
        chat("u1", "a1", "u2", "a2"),
        {"kind": "completion", "text": "t t", "columns": {}},
        {"kind": "prompt_completion", "prompt": "p:", "completion": "c", "columns": {}},
        alpaca("b", "in"),
    ]
    tokens = tokenise(rows, made).tokens
    for number, ids in enumerate(prompt_ids(rows, made)):
        example = tokens.example(number)
        assert example.input_ids[: len(ids)].tolist() == ids
        assert (example.labels[max(1, len(ids)) :] != NO_LOSS).all()
        text = prompt_of(rows[number], made, Data("x"))
        assert made.decode(ids, skip_special_tokens=False).removeprefix("<s>").replace(" ", "") == text.replace(" ", "")


def test_an_open_question_is_a_prompt() -> None:
    row = chat("u1", "a1", "u2")
    assert PLAIN.decode(prompt_ids([row], PLAIN)[0]).endswith("a1</s>\n\n### Instruction:\nu2\n\n### Response:\n")
    assert CHAT.decode(prompt_ids([row], CHAT)[0]).endswith("u2<|im_end|>\n<|im_start|>assistant\n")
    assert PLAIN.decode(prompt_ids([chat("u")], PLAIN)[0]) == alpaca_prompt("u")


def test_answers_as_the_data_has_them() -> None:
    assert answer_of(alpaca("x")) == "x" and answer_of(chat("u", "a", "u", "b")) == "b"


# ---------------------------------------------------------------- tokenizers


def test_a_stop_token_in_the_text_is_only_characters() -> None:
    """</s> ends strike-through in HTML; taken for the stop token, a model would learn to stop there."""
    example = only(alpaca("<s>old</s> new"), WITH_BOS)
    ids = example.input_ids.tolist()
    assert ids.count(WITH_BOS.eos_token_id) == 1 and ids.count(WITH_BOS.bos_token_id) == 1
    assert parts(example, WITH_BOS)[-1] == ("<s>old</s> new</s>", "trained")
    # A ready-made prompt is its maker's own: special tokens in it are meant.
    row = {"kind": "prompt_completion", "prompt": "<|im_start|>user\n", "completion": "c", "columns": {}}
    assert CHAT.convert_tokens_to_ids("<|im_start|>") in only(row, CHAT).input_ids


def test_a_stop_token_that_the_tokenizer_adds_does_not_end_the_prompt() -> None:
    made = tokenizer(bos="<s>", add_eos=True)
    assert made("x")["input_ids"][-1] == made.eos_token_id
    example = only(alpaca("a"), made)
    assert example.input_ids.tolist().count(made.eos_token_id) == 1
    assert prompt_ids([alpaca("a")], made)[0][-1] != made.eos_token_id


def test_padding_with_the_stop_token_does_not_mask_it() -> None:
    padded = tokenizer(pad="<pad>")
    assert pad_id_of(PLAIN) == PLAIN.eos_token_id and pad_id_of(padded) == padded.pad_token_id != padded.eos_token_id
    for made in (PLAIN, tokenizer(pad="</s>"), tokenizer(eos="<e>", bos="<e>", pad="<e>")):
        example = only(alpaca("a"), made)
        assert example.labels[-1] == made.eos_token_id == example.input_ids[-1]


def test_no_stop_token_is_an_error() -> None:
    for call in (lambda: tokenise([alpaca()], tokenizer(eos=None)), lambda: pad_id_of(tokenizer(eos=None))):
        with pytest.raises(UserError, match="no end-of-sequence token"):
            call()


def test_a_slow_tokenizer_is_an_error() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="slow"):
        tokenise([alpaca()], Slow())


# ---------------------------------------------------------------- cutting


def test_the_end_of_the_answer_is_cut_and_the_stop_token_with_it() -> None:
    row = alpaca("abcdef")
    prompt = len(alpaca_prompt("do it"))
    whole = only(row, PLAIN, max_length=prompt + 7)
    assert parts(whole, PLAIN)[-1] == ("abcdef</s>", "trained")
    for room, left in ((6, "abcdef"), (3, "abc"), (1, "a")):
        done = tokenise([row], PLAIN, max_length=prompt + room)
        assert parts(done.tokens.example(0), PLAIN) == [(alpaca_prompt("do it"), "masked"), (left, "trained")]
        assert done.cut == 1 and done.full_lengths.tolist() == [prompt + 7]


def test_rows_that_lose_their_whole_answer_are_left_out_and_counted() -> None:
    short, long = alpaca("a"), alpaca("a", instruction="x" * 300)
    prompt = len(alpaca_prompt("do it"))
    for settings in ({}, {"train_on_inputs": True}):
        done = tokenise([long, short, long], PLAIN, max_length=prompt + 2, **settings)
        assert done.wholly_cut.tolist() == [True, False, True] and done.tokens.rows.tolist() == [1] and done.cut == 0
        exact = tokenise([short, alpaca("a", instruction="do it!")], PLAIN, max_length=prompt + 1, **settings)
        assert exact.wholly_cut.tolist() == [False, True]


def test_all_answers_cut_says_what_would_fit() -> None:
    rows = [alpaca("a" * n) for n in range(1, 101)]
    prompt = len(alpaca_prompt("do it"))
    with pytest.raises(UserError, match="all 100 rows lose their whole answer") as caught:
        tokenise(rows, PLAIN, max_length=20)
    assert (
        f"fit wholly in {prompt + 97}" in caught.value.message and caught.value.hint == f"data.max_length={prompt + 97}"
    )
    assert f"a part of their answer at {prompt + 1}" in caught.value.message
    assert caught.value.code == "data.all_cut"
    with pytest.raises(UserError, match="at least 2"):
        tokenise(rows, PLAIN, max_length=1)


def test_a_chat_keeps_the_answers_that_fit() -> None:
    row = chat("u1", "a1", "u2" * 50, "a2")
    done = tokenise([row], CHAT, max_length=60)
    assert [text for text, shade in parts(done.tokens.example(0), CHAT) if shade == "trained"] == ["a1<|im_end|>"]
    assert done.cut == 1 and not done.wholly_cut.any()


def test_fits_is_the_smallest_length_that_covers_the_share() -> None:
    assert fits(np.arange(1, 101, dtype=np.int32)) == 96 and fits(np.asarray([5], dtype=np.int32)) == 5


def test_rows_longer_than_the_tokenizer_states_are_noted() -> None:
    made = tokenizer(model_max_length=150)
    done = tokenise([alpaca("a"), alpaca("a" * 100)], made)
    assert any("1 rows are longer than the 150 tokens" in note for note in done.notes)


# ---------------------------------------------------------------- storage


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 5))
def test_chunks_do_not_matter_and_examples_are_what_went_in(sizes: list[int], chunk: int) -> None:
    rows = [alpaca("z" * size, instruction=f"{i}") for i, size in enumerate(sizes)]
    one, other = tokenise(rows, PLAIN).tokens, tokenise(rows, PLAIN, chunk=chunk).tokens
    for name in ("ids", "trained", "offsets", "rows", "targets"):
        assert (getattr(one, name) == getattr(other, name)).all()
    assert one.targets.tolist() == [size + 1 for size in sizes]
    for number, size in enumerate(sizes):
        example = other.example(number)
        assert example.row == number and (example.labels != NO_LOSS).sum() == size + 1
        assert example.input_ids.dtype == example.labels.dtype == np.int32


def test_five_bytes_a_token_and_views_that_copy_nothing() -> None:
    rows = [alpaca("x" * 500) for _ in range(200)]
    tokens = tokenise(rows, PLAIN).tokens
    held = sum(getattr(tokens, name).nbytes for name in ("ids", "trained", "offsets", "rows", "targets"))
    assert held < 5.2 * len(tokens.ids)
    examples = Examples(tokens, np.arange(10, 200, 2))
    assert len(examples) == 95 and examples[1].row == 12 and examples[2:4][1].row == 16 and examples[-1].row == 198
    assert [example.row for example in examples[:3]] == [10, 12, 14] and examples.rows[0] == 10
    assert np.shares_memory(examples[0].input_ids, tokens.ids)
    assert examples.num_tokens == examples.lengths.sum() and examples.num_target_tokens == 95 * 501
    assert Examples(tokens, np.zeros(0, dtype=np.int64)).num_tokens == 0


def test_special_characters_are_not_torn_when_rendered() -> None:
    row = alpaca("naïve 日本 🙂")
    shown = render_tokens(only(row, SPACED), SPACED)
    assert "".join(text for text, _ in shown) == SPACED.decode(only(row, SPACED).input_ids.tolist())
    assert shown[-1][0].strip() == "naïve 日本 🙂</s>"


def test_preambles_differ_by_input() -> None:
    assert parts(only(alpaca(input="x"), PLAIN), PLAIN)[0][0].startswith(PREAMBLE_INPUT)
