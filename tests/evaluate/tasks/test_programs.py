"""HumanEval, HumanEval-X and MBPP on made-up files: what is asked, how answers are read, run and counted."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tasks.told import Knows, Told, write_jsonl

from fedloom.errors import RunError, UserError
from fedloom.evaluate import sandbox
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.tasks.base import Answer, Item, TaskSettings, Write
from fedloom.evaluate.tasks.programs import judge, pass_at_k, readings, reference_of
from fedloom.evaluate.tasks.run import find_task, rescore, run_task

needs_sandbox = pytest.mark.skipif(bool(sandbox._layers_of_this_machine()[1]), reason="no sandbox here")

PROMPT = '''from typing import List


def doubled(x: int) -> int:
    return 2 * x


def total(numbers: List[int]) -> int:
    """ The sum of the numbers, each doubled with doubled().
    >>> total([1, 2])
    6
    """
'''
BODY = "    return sum(doubled(x) for x in numbers)\n"
TEST = "\n\ndef check(candidate):\n    assert candidate([1, 2]) == 6\n    assert candidate([]) == doubled(0)\n\n"
WHOLE = "def total(numbers):\n    return 2 * sum(numbers)\n"


def problem(number: int, name: str = "HumanEval") -> dict[str, Any]:
    prompt = PROMPT.replace("The sum", f"Sum {number}: the sum")
    row = {"task_id": f"{name}/{number}", "prompt": prompt, "canonical_solution": BODY, "test": TEST}
    if name == "HumanEval":
        return {**row, "entry_point": "total"}
    declaration = PROMPT.partition('    """')[0]
    test = TEST.replace("candidate", "total") + "check(total)"
    return {**row, "declaration": declaration, "test": test, "example_test": "", "text": ""}


@pytest.fixture
def humaneval(tmp_path: Path) -> Path:
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(problem(n)) for n in range(3)).encode()))
    return path


@pytest.fixture
def humaneval_x(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "humaneval_python.jsonl", [problem(n, "Python") for n in range(3)])


def mbpp_row(number: int) -> dict[str, Any]:
    return {
        "task_id": number,
        "text": f"Write a function to add {number} to a number.",
        "code": f"def add(x):\r\n  return x + {number}",
        "test_setup_code": "",
        "test_list": [f"assert add({n}) == {n + number}" for n in range(3)],
        "challenge_test_list": [],
    }


@pytest.fixture
def mbpp(tmp_path: Path) -> Path:
    rows = [mbpp_row(n) for n in (2, 3, 4, 5, 10, 11, 12, 510, 511, 974)]
    setup = "box = Box(1)\r\nbox.size = 4"
    box = "class Box:\r\n  def __init__(self, size): self.size = size\r\ndef add(box): return box.size + 12"
    rows[6] |= {"code": box, "test_setup_code": setup, "test_list": ["assert (add(box)) == 16"]}
    return write_jsonl(tmp_path / "mbpp.jsonl", rows)


def score(name: str, file: Path, answer: Callable[[Item], str], settings: TaskSettings | None = None) -> float:
    task, settings = find_task(name), settings or TaskSettings()
    items = task.load(file, settings)
    return run_task(task, Knows(items, answer), source=file, settings=settings, out=None).score


# ---------------------------------------------------------------------------------------------------------- pass@k


def test_pass_at_k_is_the_share_of_draws_with_a_passing_answer() -> None:
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c > n:
                with pytest.raises(ValueError):
                    pass_at_k(n, c, k)
                continue
            draws = list(itertools.combinations(range(n), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws), abs=1e-12)
    assert pass_at_k(200, 13, 100) == pytest.approx(1 - 8.6e-05, abs=1e-5)
    with pytest.raises(ValueError):
        pass_at_k(5, 1, 6)


@needs_sandbox
def test_samples_are_counted_one_by_one_and_equal_ones_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    there = sandbox.Sandbox.run

    def counted(box: Any, programs: Any, *rest: Any, **more: Any) -> Any:
        ran.append(len(programs))
        return there(box, programs, *rest, **more)

    sandbox.open_sandbox()
    monkeypatch.setattr(sandbox.Sandbox, "run", counted)
    write = Write(PROMPT, 9, samples=5)
    items = [Item(str(n), write, reference_of(PROMPT, "total", [TEST + "check(total)"])) for n in range(2)]
    answers = [Answer((BODY, BODY, "    pass\n", "    return [\n", BODY)), Answer(("",) * 5)]
    first, second = judge(items, answers)
    assert ran == [4]
    assert first.scores == {"pass@1": pytest.approx(0.6), "pass@5": 1.0, "timeout": 0.0}
    assert second.scores == {"pass@1": 0.0, "pass@5": 0.0, "timeout": 0.0}
    assert first.outcomes == (
        "passed",
        "passed",
        "failed: AssertionError (tests, line 4)",
        "failed: SyntaxError: '[' was never closed (program, line 13)",
        "passed",
    )


# ----------------------------------------------------------------------------------------------- what is asked for


def test_humaneval_is_asked_with_its_raw_prompt(humaneval: Path) -> None:
    items = find_task("humaneval").load(humaneval, TaskSettings())
    assert [item.id for item in items] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert items[0].request == Write(
        PROMPT.replace("The sum", "Sum 0: the sum"),
        512,
        ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        Sampling(temperature=0.1, top_p=0.75, top_k=40),
        5,
    )
    settings = TaskSettings(max_new_tokens=9, samples=20, extra={"temperature": "0.8", "top_k": 0})
    request = find_task("humaneval").load(humaneval, settings)[0].request
    assert request[1:] == (9, items[0].request.stop, Sampling(temperature=0.8, top_p=0.75, top_k=0), 20, (), "")
    greedy = find_task("humaneval").load(humaneval, TaskSettings(extra={"temperature": 0}))[0].request
    assert (greedy.sampling, greedy.samples) == (None, 1)
    assert find_task("humaneval").load(humaneval.parent, TaskSettings()) == items


@needs_sandbox
def test_in_words_the_whole_function_comes_back(humaneval: Path) -> None:
    settings = TaskSettings(extra={"instruct": "true"})
    request = find_task("humaneval").load(humaneval, settings)[0].request
    assert isinstance(request, Write) and isinstance(request.prompt, dict)
    assert "Sum 0: the sum" in request.prompt["instruction"] and request.stop == ()
    assert score("humaneval", humaneval, lambda item: f"Of course!\n```python\n{WHOLE}```", settings) == 1.0


def test_mbpp_shows_the_papers_three_and_asks_the_test_split(mbpp: Path) -> None:
    items = find_task("mbpp").load(mbpp, TaskSettings())
    assert [item.id for item in items] == ["11", "12", "510"]
    request = items[0].request
    assert isinstance(request, Write)
    assert request.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to add 11 to a number. "
        "Your code should pass these tests:\n\nassert add(0) == 11\nassert add(1) == 12\nassert add(2) == 13\n[BEGIN]\n"
    )
    assert [shot.count("\n[DONE]\n\n") for shot in request.shots] == [1, 1, 1]
    assert [f"add {n} to" in shot for n, shot in zip((2, 3, 4), request.shots, strict=True)] == [True] * 3
    assert request.shots[0].endswith("[BEGIN]\ndef add(x):\n  return x + 2\n[DONE]\n\n")
    assert request[1:5] == (512, ("[DONE]",), None, 1)
    several = find_task("mbpp").load(mbpp, TaskSettings(samples=4, num_fewshot=0))[0].request
    assert (several.sampling, several.samples, several.shots) == (Sampling(temperature=0.5), 4, ())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("humaneval", TaskSettings(num_fewshot=3), "no use for num_fewshot"),
        ("humaneval", TaskSettings(extra={"temprature": 1}), "no setting 'temprature'; did you mean 'temperature'"),
        ("humaneval", TaskSettings(extra={"temperature": "hot"}), "temperature is 'hot', not a number"),
        ("humaneval", TaskSettings(extra={"instruct": "yes"}), "instruct is 'yes', not true or false"),
        ("humaneval", TaskSettings(extra={"top_k": True}), "top_k is True, not a whole number"),
        ("humaneval", TaskSettings(extra={"top_k": "2.5"}), "top_k is '2.5', not a whole number"),
        ("humaneval", TaskSettings(extra={"top_p": "2.0"}), "top_p is 2.0"),
        ("humaneval", TaskSettings(samples=3, extra={"temperature": 0}), "3 samples of the most likely answer"),
        ("mbpp", TaskSettings(num_fewshot=11), "there are 10 problems for prompts, not 11"),
        ("mbpp", TaskSettings(num_fewshot=4), "has no problem 1, one of those that are shown solved"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    name: str, settings: TaskSettings, message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UserError, match=message):
        find_task(name).load(request.getfixturevalue(name), settings)


def test_files_that_are_not_theirs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mbpp: Path) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError) as caught:
        find_task("humaneval").load(None, TaskSettings())
    assert str(tmp_path / "nowhere" / "humaneval" / "HumanEval.jsonl.gz") in caught.value.hint
    assert "openai/human-eval" in caught.value.hint
    bad = tmp_path / "bad"
    bad.mkdir()
    with pytest.raises(UserError, match=r"has no HumanEval\.jsonl\.gz and no HumanEval\.jsonl"):
        find_task("humaneval").load(bad, TaskSettings())
    cases = {
        "line 1 has no entry_point, no test": '{"task_id": "HumanEval/0", "prompt": "def f(): pass"}',
        "line 2 is no JSON object": json.dumps(problem(0)) + "\n{",
        "line 1 has task_id is no str": json.dumps({**problem(0), "task_id": 0}),
        "cannot be read": None,
    }
    for message, text in cases.items():
        file = bad / "HumanEval.jsonl"
        file.write_bytes(gzip.compress(b"{}")[:-4] if text is None else text.encode())
        with pytest.raises(UserError, match=message):
            find_task("humaneval").load(bad, TaskSettings())
    cpp = write_jsonl(tmp_path / "cpp.jsonl", [{**problem(0, "Python"), "task_id": "CPP/0"}])
    with pytest.raises(UserError, match="programs in other languages than Python are not run here"):
        find_task("humaneval_x").load(cpp, TaskSettings())
    train = write_jsonl(tmp_path / "train.jsonl", [mbpp_row(n) for n in (2, 3, 4, 700)])
    with pytest.raises(UserError, match="the test split"):
        find_task("mbpp").load(train, TaskSettings())


def test_without_a_sandbox_it_is_refused_before_a_model_writes_anything(
    humaneval: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(sandbox.UNSANDBOXED, raising=False)
    monkeypatch.setattr(sandbox, "_layers_of_this_machine", lambda: ((), "seccomp: no such call"))
    with pytest.raises(UserError, match="seccomp: no such call") as caught:
        find_task("humaneval").load(humaneval, TaskSettings())
    assert caught.value.code == "sandbox.missing"


# --------------------------------------------------------------------------------------------------------- answers


@needs_sandbox
@pytest.mark.parametrize("name", ["humaneval", "humaneval_x"])
def test_solutions_score_one_and_what_is_none_scores_zero(name: str, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(name)
    assert score(name, file, lambda item: BODY) == 1.0
    assert score(name, file, lambda item: BODY if item.id.endswith("/1") else "") == pytest.approx(1 / 3)
    for text in (
        "",
        "    return None\n",
        "    import sys\n    sys.exit(0)\n",
        "    return 6\n",
        "import os; os._exit(0)\n",
    ):
        assert score(name, file, lambda item, text=text: text) == 0.0


@needs_sandbox
def test_mbpp_runs_the_set_up_behind_the_answer(mbpp: Path) -> None:
    rows = {str(row["task_id"]): row for row in map(json.loads, mbpp.read_text().splitlines())}
    assert score("mbpp", mbpp, lambda item: rows[item.id]["code"]) == 1.0
    assert score("mbpp", mbpp, lambda item: "") == 0.0
    assert score("mbpp", mbpp, lambda item: "def add(x): return x + 11") == pytest.approx(1 / 3)
    assert score("mbpp", mbpp, lambda item: f"Sure!\n```python\n{rows[item.id]['code']}\n```\n") == 1.0


FENCED = {
    "whole in a fence": f"```python\n{WHOLE}```",
    "whole, told about": f"Here is the function:\n\n```py\n{WHOLE}```\nIt doubles the sum.",
    "never closed": f"Here is the function:\n```python\n{WHOLE}",
    "an example first": f"It is used so:\n```\ntotal([1])\n```\nand written so:\n```python\n{WHOLE}```",
    "its helper is ours": "```python\ndef total(n: List[int]) -> int:\n    return sum(map(doubled, n))\n```",
    "body, then the end of a fence": f"{BODY}```\n\nThis returns the sum.\n```python\ntotal([1])\n```",
    "body in a fence": f"```python\n{BODY}```",
    "body in a fence, not indented": "```\nif not numbers:\n    return 0\nreturn 2 * sum(numbers)\n```",
    "in a list": "1. The code:\n   ```python\n   def total(numbers):\n       return 2 * sum(numbers)\n   ```",
}


@needs_sandbox
@pytest.mark.parametrize("name", ["humaneval", "humaneval_x"])
def test_programs_are_found_in_what_a_chat_model_says(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task, file = find_task(name), request.getfixturevalue(name)
    [first, *_] = task.load(file, TaskSettings(samples=1))
    items = [first._replace(id=kind) for kind in FENCED]
    judged = task.judge(items, [Answer((text,)) for text in FENCED.values()])
    assert {
        kind: one.outcomes[0].partition(" [")[0] for kind, one in zip(FENCED, judged, strict=True)
    } == dict.fromkeys(FENCED, "passed")
    assert all("[reading " in one.outcomes[0] for one in judged) or name == "humaneval_x"


def test_an_answer_that_is_python_is_never_read_otherwise() -> None:
    quoted = '    return """\n```python\ndef total(): pass\n```\n"""\n'
    assert readings(PROMPT, quoted, "total")[0] == PROMPT + quoted
    assert readings(PROMPT, BODY, "total") == [PROMPT + BODY]
    assert readings(PROMPT, "", "total") == [PROMPT]
    assert readings(PROMPT, "```", "total")[0] == PROMPT + "```"
    trailing = BODY + "\nprint(total([1, 2, 3]))\n"
    assert readings(PROMPT, trailing, "total", cut=True) == [PROMPT + BODY, PROMPT + trailing]


@needs_sandbox
def test_the_file_of_items_says_what_became_of_each_program_and_is_judged_again(
    humaneval: Path, tmp_path: Path
) -> None:
    texts = {
        "HumanEval/0": BODY,
        "HumanEval/1": "    return numbers[7]\n",
        "HumanEval/2": "    return bytes(1 << 40)\n",
    }
    task, out = find_task("humaneval"), tmp_path / "items.jsonl"
    items = task.load(humaneval, TaskSettings(samples=2))
    answers = Knows(items, lambda item: texts[item.id])
    result = run_task(task, answers, source=humaneval, settings=TaskSettings(samples=2), out=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert [line["outcomes"][0] for line in lines] == [
        "passed",
        "failed: IndexError: list index out of range (program, line 13)",
        "memory: MemoryError (program, line 13)",
    ]
    assert lines[0]["scores"] == {"pass@1": 1.0, "pass@2": 1.0, "timeout": 0.0}
    assert result.summary["pass@1"] == result.summary["pass@2"] == pytest.approx(1 / 3)
    assert rescore(out).summary == result.summary


@needs_sandbox
def test_answers_that_could_not_be_judged_are_kept(
    humaneval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RunError("no more processes", code="sandbox.broken")

    out, settings = tmp_path / "humaneval.jsonl", TaskSettings(samples=1)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.Sandbox, "run", broken)
        with pytest.raises(RunError, match="no more processes"):
            run_task(find_task("humaneval"), Told(lambda _: BODY), source=humaneval, settings=settings, out=out)
    assert not out.exists()
    kept = tmp_path / "humaneval.unjudged.jsonl"
    assert f"fedloom eval --rescore {kept}" in caplog.text
    assert rescore(kept).summary["pass@1"] == 1.0


@needs_sandbox
def test_the_runs_draws_differ_by_item_and_are_the_same_again(humaneval: Path) -> None:
    def seeds() -> list[int]:
        told = Told(lambda request: BODY)
        run_task(find_task("humaneval"), told, source=humaneval, settings=TaskSettings(seed=3), out=None)
        return [request.sampling.seed for request in told.seen]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3
