"""Preparing in a stream, on disk, gives what reading everything into lists gives."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data import plain
from tests.data.toys import CHATML, Data, Split, tokenizer, write

from fedloom.data import federation as federating
from fedloom.data import prepare, store, tokens
from fedloom.data.federation import PARTS
from fedloom.data.rows import _DropError, _Layout, _normalise, _recognise, read
from fedloom.errors import UserError

MADE = {
    "plain": tokenizer(),
    "begins": tokenizer(bos="<s>", space=True),
    "chat": tokenizer(special=["<|im_start|>", "<|im_end|>"], template=CHATML),
}
WORDS = st.sampled_from(["yes", "no", "perhaps é", "", " ", "</s>", "a\nb", "𝄞 and so on and on and on", None])
ALPACA = st.fixed_dictionaries(
    {"instruction": WORDS, "output": WORDS},
    optional={"input": WORDS, "category": st.sampled_from(["a", "b", None, " "]), "n": st.integers(0, 2)},
)
CHAT = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": WORDS}), max_size=4
        )
    }
)
COMPLETION = st.fixed_dictionaries({"text": WORDS}, optional={"category": st.sampled_from(["a", "b"])})
# Rows that can be used whatever else there is.
FIRST: dict[str, Callable[[int], dict[str, Any]]] = {
    "alpaca": lambda i: {"instruction": f"i{i}", "input": "", "output": "o", "category": "a"},
    "chat": lambda i: {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": "a"}]},
    "completion": lambda i: {"text": f"t{i}", "category": "a"},
}


def read_plainly(raw: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(rows, left out) of a file, all at once."""
    layout: _Layout = _recognise("x", raw[:100], "auto", None)
    rows, dropped, notes = [], Counter[str](), Counter[str]()
    for value in raw:
        try:
            rows.append(_normalise("x", value, layout, notes))
        except _DropError as reason:
            dropped[str(reason)] += 1
    return rows, dropped


@st.composite
def data_files(draw: Any) -> list[dict[str, Any]]:
    kind = draw(st.sampled_from(["alpaca", "chat", "completion"]))
    rows = draw(st.lists({"alpaca": ALPACA, "chat": CHAT, "completion": COMPLETION}[kind], min_size=5, max_size=30))
    return [*map(FIRST[kind], range(10)), *rows]


@settings(max_examples=40)
@given(
    raw=data_files(),
    made=st.sampled_from(sorted(MADE)),
    max_length=st.sampled_from([None, 60, 250, 300]),
    everything=st.booleans(),
    chunk=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 3),
)
def test_a_stream_gives_what_lists_give(
    tmp_path_factory: pytest.TempPathFactory,
    raw: list[dict[str, Any]],
    made: str,
    max_length: int | None,
    everything: bool,
    chunk: int,
    seed: int,
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "stream.jsonl", raw)
    data = Data(path, max_length=max_length, train_on_inputs=everything, val_set_size=1, test_set_size=2)
    rows, dropped = read_plainly(raw)
    wanted = plain.examples(rows, MADE[made], max_length, everything)
    federation, code = None, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "CHUNK", chunk)  # not in the key: what was made in other chunks is found as well
        patch.setattr(tokens, "BLOCK_BYTES", 200 * chunk)
        patch.setattr(store, "_FLUSH_ROWS", 4)
        try:
            federation = prepare(data, Split("iid", 2), MADE[made], seed)
        except UserError as error:
            code = error.code
    if federation is None:  # too little is left of it for a split
        assert code.startswith("split.no_") or code in ("data.all_cut", "data.test_set_size")
        return
    assert list(federation.rows) == rows == [federation.rows[i] for i in range(len(rows))]
    left_out = federation.report.left_out
    assert {reason: left_out.get(reason, 0) for reason in dropped} == dict(dropped)
    content = [json.dumps({name: row[name] for name in row if name not in ("category", "columns")}) for row in rows]
    held = federation.clients
    everyone = [row for client in held.values() for part in PARTS for row in getattr(client, part).rows.tolist()]
    assert len(set(everyone)) == len(everyone)
    for client in held.values():
        for part in PARTS:
            for example in getattr(client, part):
                ids, labels = wanted[example.row]
                assert example.input_ids.tolist() == ids and example.labels.tolist() == labels
    assert federation.report.duplicates == len(rows) - len(set(content))
    crossing = left_out.get("exact duplicate of a validation or test row", 0)
    lost = left_out.get("answer wholly cut by max_length", 0)
    assert len(everyone) + crossing + lost == len(rows)


def test_digests_tell_examples_apart() -> None:
    made = MADE["plain"]
    row = {"kind": "prompt_completion", "prompt": "ab", "completion": "cd", "columns": {}}
    moved = {**row, "prompt": "abc", "completion": "d"}
    found = tokens.tokenise([row, moved, row, {**row, "completion": "ce"}], made).tokens
    assert np.array_equal(found.ids[:5], found.ids[5:10]), "the same tokens, with loss elsewhere"
    whole = [bytes(one) for one in found.digests]
    assert whole[0] == whole[2] and len(set(whole)) == 3


def test_what_a_client_holds_is_in_the_digest(tmp_path: Path) -> None:
    raw = [{"text": f"row {i}"} for i in range(12)]
    path = write(tmp_path / "d.jsonl", raw)

    def digest(split: Split = Split("iid", 2), made: str = "plain", seed: int = 0, **settings: Any) -> str:  # noqa: B008
        return prepare(Data(path, val_set_size=0, test_set_size=2, **settings), split, MADE[made], seed).digest()

    assert digest() == digest() == digest(cache=False)
    assert len({digest(), digest(Split("iid", 3)), digest(seed=1), digest(made="begins"), digest(max_length=4)}) == 5
    federation = prepare(Data(path, val_set_size=0, test_set_size=2), Split("iid", 2), MADE["plain"], 0)
    assert federation.small(1, 2).digest() != federation.digest()


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_the_digest_of_many_clients_is_that_of_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paired: bool, few: bool
) -> None:
    monkeypatch.setattr(federating, "DIGESTED", 3)
    answer = {"rejected": "no"} if paired else {}
    names = ("prompt", "chosen") if paired else ("prompt", "completion")
    raw = [{names[0]: f"p{i}", names[1]: f"yes {i}", "who": str(i % 7), **answer} for i in range(30)]
    data = Data(write(tmp_path / "d.jsonl", raw), val_set_size=3, test_set_size=5)
    federation = prepare(data, Split("by_column", column="who"), MADE["plain"], 0)
    if few:
        federation = federation.small(5, 2)
    digest = hashlib.sha256()
    for client in federation.clients.values():
        digest.update(f"{len(client.id)} {client.id}".encode())
        for part in PARTS:
            for side in range(1 + paired):
                numbers = getattr(client, part).numbers + side
                digest.update(f"|{len(numbers)}|".encode() + client.train.tokens.digests[numbers].tobytes())
    assert federation.paired is paired and federation.digest() == digest.hexdigest()


def test_a_parquet_file_is_read_a_piece_at_a_time(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i} " + "x" * 4000 for i in range(5_000)]
    parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "d.parquet", compression="none", use_dictionary=False
    )
    before = pyarrow.total_allocated_bytes()
    most = 0
    from fedloom.data.rows import _parquet_rows

    for _ in _parquet_rows(tmp_path / "d.parquet"):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert (tmp_path / "d.parquet").stat().st_size > 20_000_000 and most < 8_000_000
    assert len(read(str(tmp_path / "d.parquet")).rows) == 5_000
