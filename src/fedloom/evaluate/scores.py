"""How a written answer is judged, and the evaluation that writes and judges.

Every score is between 0 and 1, and a row's own answer scores 1 under its own rule.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.data.rows import Row, row_key
from fedloom.data.templates import answer_of
from fedloom.errors import UserError, suggest

if TYPE_CHECKING:
    from fedloom.types import Adapter, Client, Evaluation, Metrics, Tree

__all__ = [
    "SCORES",
    "Scored",
    "auto_score",
    "exact",
    "final_number",
    "mean_score",
    "pass_at_1",
    "same_final_number",
    "score_evaluation",
]

Judge = Callable[[Row, str], float]  # the row, what the model wrote -> between 0 and 1

# A number: an optional sign that is not a minus between two numbers, an optional currency sign, digits with or without
# thousands separators, an optional fraction.
_NUMBER = re.compile(
    r"""
    (?<!\w)(?<!\d\.)                 # not in the middle of a word or of another number
    (?P<sign>(?<![\d)])[-−+]\s?)?     # "10-5" is 10 and 5, "-5" is minus five
    [$€£¥]?\s?
    (?P<sign2>[-−])?
    (?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)
    (?P<fraction>\.\d+)?
    | (?<![\w.])(?P<sign3>[-−])?[$€£¥]?(?P<bare>\.\d+)
    """,
    re.VERBOSE,
)
_MARKER = re.compile(r"the\s+answer\s+is|####", re.IGNORECASE)


class Scored(NamedTuple):
    """One judged answer, for whoever wants to read them."""

    client: str
    row: Row
    completion: str
    score: float


def exact(row: Row, completion: str) -> float:
    """1 when the answer is the row's own, spaces around it aside."""
    return float(completion.strip() == answer_of(row).strip())


def same_final_number(row: Row, completion: str) -> float:
    """1 when the final number is that of the row's own answer, compared as a number."""
    wanted = final_number(answer_of(row))
    return float(wanted is not None and final_number(completion) == wanted)


def pass_at_1(row: Row, completion: str) -> float:
    """1 when the written program passes all of the row's tests."""
    from fedloom.data.builtin.scoring import passes

    missing = [key for key in ("language", "tests") if key not in row]
    if missing:
        raise UserError(
            f"score pass_at_1 needs rows with tests; this one has no {' and no '.join(missing)}",
            hint="it is for builtin:code; use evaluate.score: exact or none",
            code="score.no_tests",
        )
    return float(passes(row["language"], completion, row["tests"]))


SCORES: Mapping[str, Judge] = {"exact": exact, "final_number": same_final_number, "pass_at_1": pass_at_1}


def final_number(text: str) -> Decimal | None:
    """The number after the last "the answer is" (or GSM8K's "####"); without one, the last number; else None.

    Numbers are compared as numbers: 18, 18.0, $18.00 and 18% are equal, and so are 1,800 and 1800. Nothing is computed:
    "1,800 / 100" is 1800 after the marker.
    """
    markers = list(_MARKER.finditer(text))
    if markers:
        behind = _numbers(text[markers[-1].end() :])
        if behind:
            return behind[0]
    everywhere = _numbers(text)
    return everywhere[-1] if everywhere else None


def _numbers(text: str) -> list[Decimal]:
    values = []
    for found in _NUMBER.finditer(text):
        digits = (found["digits"] or "0").replace(",", "") + (found["fraction"] or found["bare"] or "")
        signs = (found["sign"], found["sign2"], found["sign3"])
        negative = any(sign is not None and sign.strip() != "+" for sign in signs)
        values.append(-Decimal(digits) if negative else Decimal(digits))
    return values


def auto_score(task: Any, rows: Sequence[Row]) -> str:
    """The score that fits: a built-in task's own; `final_number` where answers say "The answer is N"; else `none`."""
    if task is not None:
        return str(task.metric)
    sample = [answer_of(row) for row in rows[:100] if row["kind"] != "completion"]
    marked = [text for text in sample if _MARKER.search(text) and final_number(text) is not None]
    return "final_number" if sample and len(marked) == len(sample) else "none"


def score_evaluation(
    name: str,
    open: Callable[[str], Sequence[Row]],
    score: str | Judge,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    batch_size: int,
    chat_template: str | None = "auto",
    limit: int | None = None,
    on_scored: Callable[[Scored], None] | None = None,
) -> Evaluation:
    """Greedy answers to the rows that `open(client id)` gives, judged by `score` (a name in `SCORES`, or a function).

    Metrics: `score_sum` and `scored` (rows). They add; `mean_score` reads them. `limit` takes the first rows of each
    client. `batch_size` is rows in one pass, all clients together.

    Raises:
        UserError: there is no such score.
    """
    from fedloom.data.tokens import prompt_ids
    from fedloom.evaluate.generate import decode, generate
    from fedloom.types import Evaluation

    judge = _judge(score)
    known: dict[bytes, array[int]] = {}  # prompts are made once a row, however often it is scored

    def prompts_of(rows: Sequence[Row]) -> list[list[int]]:
        keys = [row_key(row) for row in rows]  # a row is another object each time it is read
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        made = prompt_ids(list(new.values()), tokenizer, chat_template)
        known.update({key: array("i", ids) for key, ids in zip(new, made, strict=True)})
        return [known[key].tolist() for key in keys]

    def run(adapter: Adapter, tree_C: Tree, clients: Sequence[Client]) -> list[Metrics]:
        rows = [list(open(client.id)[:limit]) for client in clients]
        answers = generate(
            adapter,
            tree_C,
            [prompts_of(own) for own in rows],
            tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        found: list[Metrics] = []
        for client, own, written in zip(clients, rows, answers, strict=True):
            total = 0.0
            for row, completion in zip(own, decode(tokenizer, written), strict=True):
                value = judge(row, completion)
                total += value
                if on_scored is not None:
                    on_scored(Scored(client.id, row, completion, value))
            found.append({"score_sum": total, "scored": float(len(own))})
        return found

    return Evaluation(name, run)


def mean_score(metrics: Metrics) -> float | None:
    """Between 0 and 1; None when nothing was scored."""
    scored = metrics.get("scored", 0.0)
    return metrics.get("score_sum", 0.0) / scored if scored else None


def _judge(score: str | Judge) -> Judge:
    if not isinstance(score, str):
        return score
    if score not in SCORES:
        raise UserError(f"no such score: {score!r}{suggest(score, SCORES)}", code="score.unknown")
    return SCORES[score]
