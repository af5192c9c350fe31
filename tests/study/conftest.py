"""What tests of whole runs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.study.tiny_runs import rows

from fedloom.models.load import random_base


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny model and data."""
    place = tmp_path_factory.mktemp("run")
    data = rows(60)
    base = random_base(hidden_size=32, num_layers=2, vocab_size=300, text=[str(row) for row in data], max_positions=256)
    base.model.save_pretrained(place / "model")
    base.tokenizer.save_pretrained(place / "model")
    (place / "data.json").write_text(json.dumps(data))
    return place
