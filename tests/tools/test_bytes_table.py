"""Bytes of each kind of adapter on the shape of LLaMA-7B, by formula and by the page."""

from __future__ import annotations

import pytest
from tools.write_bytes_table import PAGE, document, rows

D, LAYERS, INSIDE = 4096, 32, 11008
PAIR = LAYERS * 2 * (8 * D + D * 8)  # LoRA r 8 on q and v
WANTED = {
    "lora": PAIR,
    "dora": PAIR + LAYERS * 2 * D,
    "ia3": LAYERS * (D + D + INSIDE),  # keys, values, and what goes into the last feed-forward layer
    "prompt_tuning": 20 * D,
    "p_tuning": 20 * D + 3 * (D * D + D),
    "prefix_tuning": 20 * 2 * LAYERS * D,
    "full": 6_738_415_616,
}


@pytest.fixture(scope="module")
def found():
    return rows()


def test_the_numbers_are_those_of_the_formulas(found):
    plain = {one.settings["kind"]: one for one in found if len(one.settings) == 1}
    assert {kind: plain[kind].numbers for kind in WANTED} == WANTED
    assert plain["lora"].tensor_bytes == 8 * 2**20  # 8.0 MiB in float16
    # what FederatedScope-LLM sends: float32, pickled, in base64 (21.40 and 256.48 MiB with the pickle's frame)
    assert plain["lora"].numbers * 4 * 4 / 3 / 2**20 == pytest.approx(21.33, abs=0.01)
    assert plain["p_tuning"].numbers * 4 * 4 / 3 / 2**20 == pytest.approx(256.48, abs=0.01)
    for one in found:
        names = one.up - one.tensor_bytes
        assert 0 < names < 1500 + 200 * 2000 and abs(one.up - one.down) < 2000, one.settings


def test_the_page_has_them(found):
    text = PAGE.read_text(encoding="utf-8")
    assert text == document(text, found), "run tools/write_bytes_table.py"
