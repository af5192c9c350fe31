"""Answerers without a model, for tests: they say what they are told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedloom.evaluate.tasks.base import Choose, Item, Request, Write


def question(request: Request) -> str:
    """The question as text: of a row its instruction, or prompt."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt
    return str(
        prompt["messages"][-1]["content"]
        if prompt["kind"] == "chat"
        else prompt.get("instruction", prompt.get("prompt"))
    )


class Told:
    """Writes `write(request)`, and finds the choice at `choose(request)` the likeliest."""

    def __init__(self, write: Callable[[Write], str] | None = None, choose: Callable[[Choose], int] | int = 0) -> None:
        self.say, self.pick = write, choose
        self.seen: list[Request] = []

    def write(self, requests: Sequence[Write]) -> list[tuple[str, ...]]:
        self.seen += requests
        assert self.say is not None
        return [(self.say(one),) * one.samples for one in requests]

    def choose(self, requests: Sequence[Choose]) -> list[tuple[float, ...]]:
        self.seen += requests
        best = [self.pick if isinstance(self.pick, int) else self.pick(one) for one in requests]
        return [tuple(-float(n != b) for n in range(len(one.choices))) for one, b in zip(requests, best, strict=True)]


class Knows(Told):
    """Answers each item as `answer(item)` says, a text or the place of a choice."""

    def __init__(self, items: Sequence[Item], answer: Callable[[Item], Any]) -> None:
        table = {self.key(item.request): answer(item) for item in items}
        super().__init__(lambda one: str(table[self.key(one)]), lambda one: int(table[self.key(one)]))

    @staticmethod
    def key(request: Request) -> str:
        return json.dumps([request.prompt, getattr(request, "choices", None)], sort_keys=True)


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
