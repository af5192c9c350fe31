"""Errors carry what the command line and scripts need, and suggestions name something that exists."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import FedloomError, RefusedByPolicy, RunError, TimeoutOrTooFewClients, UserError, suggest


@pytest.mark.parametrize(
    ("kind", "exit_code"), [(RunError, 1), (UserError, 2), (TimeoutOrTooFewClients, 3), (RefusedByPolicy, 4)]
)
def test_exit_codes_are_the_documented_ones(kind: type[FedloomError], exit_code: int) -> None:
    error = kind("no rows", hint="fedloom preview F", code="data.empty")
    assert (error.message, error.hint, error.code, error.exit_code) == (
        "no rows",
        "fedloom preview F",
        "data.empty",
        exit_code,
    )
    assert str(error) == "no rows\nfedloom preview F"
    assert str(kind("no rows")) == "no rows"


def test_an_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(UserError("m", hint="h", code="a.b", exit_code=7)))
    assert (type(error), error.message, error.hint, error.code, error.exit_code) == (UserError, "m", "h", "a.b", 7)


def test_a_near_name_is_suggested_and_a_far_one_lists_what_there_is() -> None:
    assert suggest("lora_rnk", ["lora_r", "lora_alpha", "lora_rank"]) == "; did you mean 'lora_rank'?"
    assert suggest("FedAvg", ["fedavg"]) == "; did you mean 'fedavg'?"
    assert suggest("zzz", ["b", "a"]) == "; there are 'a', 'b'"
    assert suggest("zzz", ["a"]) == "; there is 'a'"
    assert suggest("zzz", []) == "; there are none"
    assert suggest("zzz", [f"{i:02}" for i in range(15)]).endswith("'11' and 3 more")


@given(st.text(max_size=8), st.lists(st.text(min_size=1, max_size=8)))
def test_whatever_is_asked_only_known_names_are_offered(name: str, names: list[str]) -> None:
    tail = suggest(name, names)
    if "did you mean" in tail:
        assert tail.removeprefix("; did you mean '").removesuffix("'?") in names
    elif names:
        assert f"'{min(names)}'" in tail
