"""From a row to the text a model sees: the Alpaca layout, or the tokenizer's own chat template.

The prompt of training and the prompt of generation come from the same functions here, so they cannot drift apart.

The Alpaca layout ends in "### Response:" and a line break, as alpaca-lora and most trainers since write it, and the
answer is tokenised on its own. No space is put between them: tokenizers that begin every text with a space
(SentencePiece) give "▁The", byte-level ones "The". At generation the answer begins the same way; `strip()` it before
comparing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fedloom.data.rows import Row
from fedloom.errors import UserError

Layout = Literal["alpaca", "tokenizer"]
Tokenizer = Any  # any Hugging Face fast tokenizer; transformers is not imported here

PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Piece(NamedTuple):
    """A stretch of text that is tokenised on its own. A trained piece is an answer and ends with the stop token."""

    text: str
    trained: bool
    ends: bool  # the stop token follows


class Rendered(NamedTuple):
    """A conversation as the chat template writes it. Characters `spans` are answers, with the end of their turns."""

    text: str
    spans: tuple[tuple[int, int], ...]
    trained: tuple[bool, ...]  # one per span


def layout_for(tokenizer: Tokenizer, chat_template: str | None) -> Layout:
    """What `data.chat_template` means with this tokenizer: "auto" is its own template if it has one, else Alpaca.

    Raises:
        UserError: "tokenizer" is asked for and there is no template; or an unknown word.
    """
    if chat_template in (None, "auto"):
        return "tokenizer" if _has_template(tokenizer) else "alpaca"
    if chat_template == "alpaca":
        return "alpaca"
    if chat_template == "tokenizer":
        if _has_template(tokenizer):
            return "tokenizer"
        raise UserError(
            "data.chat_template is 'tokenizer', but this model's tokenizer has no chat template",
            hint="data.chat_template=alpaca, or a model with a chat template (often its -Instruct version)",
            code="data.chat_template",
        )
    raise UserError(
        f"data.chat_template {chat_template!r}: must be auto, alpaca or tokenizer", code="data.chat_template"
    )


def _has_template(tokenizer: Tokenizer) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def marks_generation(tokenizer: Tokenizer) -> bool:
    """Whether the template itself says what the assistant generates ({% generation %} blocks)."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default", "")
    return isinstance(template, str) and _GENERATION.search(template) is not None


def alpaca_prompt(instruction: str, input: str = "", preamble: str | None = None) -> str:
    """The Alpaca prompt; the Input block is there only when the input is not empty."""
    block = f"### Input:\n{input}\n\n" if input else ""
    head = preamble if preamble is not None else (PREAMBLE_INPUT if input else PREAMBLE)
    return f"{head}\n\n### Instruction:\n{instruction}\n\n{block}### Response:\n"


def uses_template(row: Row, layout: Layout) -> bool:
    """Plain text (prompt_completion, completion) is never put into a template: it is what it is."""
    return layout == "tokenizer" and row["kind"] in ("alpaca", "chat")


def pieces_of(row: Row) -> list[Piece]:
    """The row in the Alpaca layout, or as plain text."""
    kind = row["kind"]
    if kind == "alpaca":
        return [Piece(alpaca_prompt(row["instruction"], row["input"]), False, False), Piece(row["output"], True, True)]
    if kind == "prompt_completion":
        return [Piece(row["prompt"], False, False), Piece(row["completion"], True, True)]
    if kind == "completion":
        return [Piece(row["text"], True, True)]
    return _turns(row["messages"])


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """A conversation in the Alpaca layout: a system message takes the preamble's place, each turn has its headings."""
    pieces: list[Piece] = []
    preamble: str | None = None
    asked: list[str] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            preamble = content if preamble is None else f"{preamble}\n\n{content}"
        elif role == "assistant":
            if "tool_calls" in message:
                raise _no_tools()
            question = "\n\n".join(asked)
            if not pieces:
                prompt = alpaca_prompt(question, preamble=preamble)
            else:
                prompt = f"\n\n### Instruction:\n{question}\n\n### Response:\n"
            pieces += [Piece(prompt, False, False), Piece(content, message.get("train", True), True)]
            asked = []
        elif role == "user":
            asked.append(content)
        else:
            raise _no_tools()
    if asked:  # the last question is still open: this is a prompt
        question = "\n\n".join(asked)
        opened = (
            f"\n\n### Instruction:\n{question}\n\n### Response:\n" if pieces else alpaca_prompt(question, "", preamble)
        )
        pieces.append(Piece(opened, False, False))
    return pieces


def _no_tools() -> UserError:
    return UserError(
        "the data has tool messages, for which the Alpaca layout has no place",
        hint="use a model whose tokenizer has a chat template with tools: data.chat_template=tokenizer",
        code="data.chat_template",
    )


def messages_of(row: Row) -> list[dict[str, Any]]:
    """The row as a conversation whose last message is the answer, without our own `train` marks."""
    if row["kind"] == "chat":
        return [{name: part for name, part in message.items() if name != "train"} for message in row["messages"]]
    question = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


class TemplateRefusedError(Exception):
    """The template itself raised on this conversation (roles that do not alternate, say)."""


def _render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, prompt: bool) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except jinja2.TemplateError as error:
        raise TemplateRefusedError(str(error)) from error


def rendered(row: Row, tokenizer: Tokenizer) -> Rendered:
    """The conversation as the template writes it, and where its answers are.

    Each answer begins where the prompt for it ends, which holds only if that prompt is how the whole text begins: a
    template that writes earlier turns differently once more follow would train one thing and generate from another.

    Raises:
        UserError: the template does that.
        TemplateRefusedError: the template takes no such conversation.
    """
    messages = messages_of(row)
    whole = _render(tokenizer, messages, prompt=False)
    trains = [one.get("train", True) for one in row["messages"]] if row["kind"] == "chat" else [True, True]
    spans: list[tuple[int, int]] = []
    trained: list[bool] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = _render(tokenizer, messages[:place], prompt=True) if place else ""
        last = place == len(messages) - 1
        end = whole.rstrip() if last else _render(tokenizer, messages[: place + 1], prompt=False).rstrip()
        for part, what in ((begin, "the prompt of an answer"), (end, "a conversation up to an answer")):
            if not whole.startswith(part):
                at = next(
                    i for i, (one, other) in enumerate(zip(part + "\0", whole + "\1", strict=False)) if one != other
                )
                raise UserError(
                    f"the tokenizer's chat template is not incremental: {what} is not how the whole conversation begins"
                    f". After {whole[max(0, at - 30) : at]!r} it writes {part[at : at + 30]!r} there and "
                    f"{whole[at : at + 30]!r} in the whole (message {place + 1} of {len(messages)})",
                    hint="data.chat_template=alpaca, rows with one answer, or a template with {% generation %} marks",
                    code="data.template_prefix",
                )
        spans.append((len(begin), len(end)))
        trained.append(trains[place])
    return Rendered(whole, tuple(spans), tuple(trained))


def prompt_pieces(row: Row) -> list[Piece]:
    """What stands before the row's last answer, in the Alpaca layout or as plain text. An open conversation (its last
    message is a question) is all of it a prompt."""
    pieces = pieces_of(row)
    return pieces[:-1] if pieces[-1].ends else pieces


def template_prompt(row: Row, tokenizer: Tokenizer) -> str:
    """What stands before the row's last answer, as the chat template writes it."""
    messages = messages_of(row)
    return _render(tokenizer, messages[:-1] if messages[-1]["role"] == "assistant" else messages, prompt=True)


def prompt_of(row: Row, tokenizer: Tokenizer, settings: Any) -> str:
    """What generation is given for this row's last answer: the text that training has before it.

    `settings` has `chat_template` (a data recipe). To have tokens, use `prompt_ids`: it puts the special tokens of
    training before them, too. A completion row has no prompt: "".
    """
    if uses_template(row, layout_for(tokenizer, getattr(settings, "chat_template", None))):
        return template_prompt(row, tokenizer)
    stop = str(tokenizer.eos_token)
    return "".join(piece.text + (stop if piece.ends else "") for piece in prompt_pieces(row))


def answer_of(row: Row) -> str:
    """The row's (last) answer, as the data has it; of a pair the chosen one."""
    kind = row["kind"]
    if kind == "preference":
        chosen = row["chosen"]
        return chosen if isinstance(chosen, str) else str(chosen[-1]["content"])
    if kind == "chat":
        return str(row["messages"][-1]["content"])
    return str(row[{"alpaca": "output", "prompt_completion": "completion", "completion": "text"}[kind]])
