"""`fedloom explain`: every name of the tables has its texts, and its keys and bytes are found, not typed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fedloom.cli.app import main
from fedloom.errors import UserError
from fedloom.study.explain import NAMES, entry, known, message_sizes

EVERY = [(shelf, name) for shelf, names in known().items() for name in names]


def test_every_name_of_the_tables_has_its_texts() -> None:
    missing = [f"{shelf} {name}" for shelf, name in EVERY if name not in NAMES[shelf]]
    assert not missing, f"add what each side computes, sends and keeps to study/explained.py: {missing}"


@pytest.mark.parametrize(("shelf", "name"), EVERY)
def test_an_entry_says_all_five_things(shelf: str, name: str) -> None:
    found = entry(name)
    assert (found.shelf, found.name) == (shelf, name)
    assert all(len(text) > 5 and not text.endswith(".") for text in found.explained)


def test_keys_are_those_that_a_recipe_of_the_method_has() -> None:
    keys = {key.key: key.default for key in entry("fedavgm").keys}
    assert keys == {
        "server.kind": "optimize",
        "server.server_optim": "momentum",
        "server.server_learning_rate": 1.0,
        "server.server_momentum": 0.9,
    }
    assert {key.key for key in entry("prompt_tuning").keys} >= {"adapter.num_virtual_tokens"}
    assert {key.key: key.default for key in entry("top_k").keys} == {
        "compress.share": 0.1,
        "compress.error_feedback": True,
    }


def test_bytes_of_lora_on_the_shapes_of_llama_7b() -> None:
    """r 8 on q_proj and v_proj: 32 layers x 2 x 8 x (4096 + 4096) numbers of four bytes, and the frame."""
    here, there = message_sizes("adapter", "lora")
    assert there.trained == 32 * 2 * 8 * 8192
    assert 0 < there.up - 4 * there.trained < 20_000
    assert here.trained == 4 * 2 * 8 * (192 + 192)
    (half,) = message_sizes("compress", "float16", llama=False)
    assert 0 < half.up - 2 * half.trained < 4_000 < half.down - 3 * half.trained


def test_the_command_prints_a_list_and_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for _, name in EVERY)
    assert main(["explain", "flora", "--no-bytes", "--format", "json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["write"] == {"method": "flora"} and "Wang et al. 2024" in value["paper"] and value["bytes"] == []
    assert main(["explain", "fedavgg"]) == 2
    assert "did you mean 'fedavg'" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such name"):
        entry("nothing")


def test_texts_alone_import_no_torch() -> None:
    run = "main(['explain', 'lora', '--no-bytes']); print('torch' in sys.modules)"
    code = f"import sys; from fedloom.cli.app import main; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Hu et al. 2022" in done.stdout and done.stdout.splitlines()[-1] == "False"
