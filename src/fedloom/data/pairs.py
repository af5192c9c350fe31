"""Preference data: a prompt, an answer that was chosen, and one that was rejected.

A row of kind `preference` has one of three forms, by what its data looks like:

    messages, chosen, rejected              a conversation up to the question; answers are lists of messages
    prompt, chosen, rejected                plain text, never put into a layout
    instruction, input, chosen, rejected    as in alpaca rows

It is tokenised as two ordinary rows, its `sides`, whose examples stand one after the other: the chosen one has an even
number, the rejected one the next, and both have the same row. Loss is on the answers, as everywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.data.rows import Row, _DropError, _is_null, _messages, _text
from fedloom.errors import UserError

__all__ = ["pair", "sides"]

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # hh-rlhf writes a dialogue as text
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def sides(row: Row) -> tuple[Row, ...]:
    """(chosen, rejected) as rows of another kind; of any other row, the row itself."""
    if row["kind"] != "preference":
        return (row,)
    return _side(row, row["chosen"]), _side(row, row["rejected"])


def _side(row: Row, answer: Any) -> Row:
    if "messages" in row:
        # Only the answer carries loss, not what the assistant said before.
        before = [{**one, "train": False} if one["role"] == "assistant" else one for one in row["messages"]]
        return {"kind": "chat", "messages": [*before, *answer]}
    if "instruction" in row:
        return {"kind": "alpaca", "instruction": row["instruction"], "input": row["input"], "output": answer}
    return {"kind": "prompt_completion", "prompt": row["prompt"], "completion": answer}


def pair(where: str, raw: Mapping[str, Any], found: Mapping[str, Any], notes: Counter[str]) -> Row:
    """The fields of a preference row. `found` has what stands in the columns of each field.

    Raises:
        _DropError: it cannot be used, with the reason it is counted under.
        UserError: nothing says what the answers answer.
    """
    for name in ("chosen", "rejected"):
        if _is_null(found[name]) or found[name] in ("", [], {}):
            raise _DropError(f"empty {name}")
    row = _fields(where, raw, found, notes)
    if row["chosen"] == row["rejected"]:
        raise _DropError("chosen and rejected are the same")
    return row


def _fields(where: str, raw: Mapping[str, Any], found: Mapping[str, Any], notes: Counter[str]) -> Row:
    chosen, rejected = found["chosen"], found["rejected"]
    prompt = found["prompt"]
    if _is_dialogue(chosen) and _is_dialogue(rejected):  # a prompt or messages beside them say the same again
        return _dialogues(where, raw, chosen, rejected, notes)
    if isinstance(found["messages"], list) and found["messages"]:
        return _conversation(where, raw, found["messages"], chosen, rejected, notes)
    if isinstance(prompt, list) and prompt:
        return _conversation(where, {}, prompt, chosen, rejected, notes)
    instruction = _text(where, "instruction", found["instruction"])
    if instruction.strip():
        given = _text(where, "input", found["input"])
        system = raw.get("system")
        if isinstance(system, str) and system.strip():
            question = {"role": "user", "content": instruction + (f"\n\n{given}" if given.strip() else "")}
            return _conversation(where, raw, [question], chosen, rejected, notes)
        return {"instruction": instruction, "input": given if given.strip() else "", **_texts(where, chosen, rejected)}
    text = _text(where, "prompt", prompt)
    if text.strip():
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            return _conversation(where, raw, [{"role": "user", "content": text}], chosen, rejected, notes)
        return {"prompt": text, **_texts(where, chosen, rejected)}
    if isinstance(chosen, str) and isinstance(rejected, str):
        told = _parsed(chosen), _parsed(rejected)
        if told[0] and told[1]:
            return _dialogues(where, {}, *told, notes)
    if any(name in raw for name in ("prompt", "instruction", "question", "messages", "conversations")):
        raise _DropError("empty prompt")
    raise UserError(
        f"{where}: a chosen and a rejected answer, but nothing says to what",
        hint="data.columns.prompt=COLUMN; or chosen and rejected are whole dialogues: lists of messages, or text with "
        '"\\n\\nHuman: ...\\n\\nAssistant: ..."',
        code="data.columns",
    )


def _texts(where: str, chosen: Any, rejected: Any) -> dict[str, str]:
    texts = {"chosen": _text(where, "chosen", chosen), "rejected": _text(where, "rejected", rejected)}
    for name, text in texts.items():
        if not text.strip():
            raise _DropError(f"empty {name}")
    return texts


def _conversation(
    where: str, raw: Mapping[str, Any], prompt: Sequence[Any], chosen: Any, rejected: Any, notes: Counter[str]
) -> Row:
    """A conversation up to the question, and two answers to it: text, a message, or messages."""

    def answer(name: str, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, str):
            value = {"role": "assistant", "content": _text(where, name, value)}
        return _messages(where, {}, value, notes)

    messages = _messages(where, raw, list(prompt), notes, answers_needed=False)
    if messages[-1]["role"] == "assistant":
        raise _DropError("the prompt ends with an answer")
    return {"messages": messages, "chosen": answer("chosen", chosen), "rejected": answer("rejected", rejected)}


def _is_dialogue(value: Any) -> bool:
    """Messages that begin with somebody else than the assistant: the question is among them."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return False
    return str(value[0].get("role", value[0].get("from"))).lower() not in ("assistant", "gpt", "chatgpt", "model")


def _dialogues(where: str, raw: Mapping[str, Any], chosen: Any, rejected: Any, notes: Counter[str]) -> Row:
    """Two whole dialogues that differ in their last answer."""
    told = [_messages(where, raw, list(one), notes) for one in (chosen, rejected)]
    if told[0][:-1] != told[1][:-1]:
        raise _DropError("the dialogues differ before their last answer")
    if len(told[0]) < 2:
        raise _DropError("empty prompt")
    return {"messages": told[0][:-1], "chosen": told[0][-1:], "rejected": told[1][-1:]}


def _parsed(text: str) -> list[dict[str, str]] | None:
    """A dialogue written as text, as messages; None when it is not one."""
    head, *parts = _TURN.split(text)
    if head.strip() or not parts:
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in turns]
