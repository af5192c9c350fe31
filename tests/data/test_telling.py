"""Long work says how far it is, seldom enough for a log file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tests.data.toys import Data, Split, alpaca_rows, tokenizer, write

from fedloom.data import prepare, telling
from fedloom.data.telling import LOGGER, Telling


def test_it_is_said_after_a_while_and_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [100.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, logger=LOGGER):
        one = Telling("tokenised", 40_000)
        for second in range(1, 401):
            clock[0] = 100.0 + second
            one.tell(100 * second)
    times = [round(float(record.message.split()[1].replace(",", "")) / 100) for record in caplog.records]
    assert times == [5, 10, 20, 40, 80, 140, 200, 260, 320, 380]
    assert caplog.records[0].message == "tokenised 500 of 40,000 rows (100 rows/s, about 7 min left)"


def test_reading_and_tokenising_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telling, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(telling, "MOST_SECONDS", 0.0)
    path = write(tmp_path / "d.jsonl", alpaca_rows(50, first=700))
    with caplog.at_level(logging.INFO, logger=LOGGER):
        prepare(Data(path), Split(), tokenizer(), 0)
    said = [record.message for record in caplog.records if record.name == LOGGER]
    assert any(text.startswith("read 50 rows (") for text in said)
    assert any(text.startswith("tokenised 50 of 50 rows (") for text in said)
