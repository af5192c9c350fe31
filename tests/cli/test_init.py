"""`init`: a recipe that fits the data, or translated from another tool's settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.cli import main
from fedloom.errors import UserError
from fedloom.study.foreign import translate
from fedloom.study.load import read_recipe

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - path: other/set
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - q_proj
wandb_project:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
weight_decay: 0.1
special_tokens:
  pad_token: "<|end_of_text|>"
"""
TRL = """\
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
use_peft: true
lora_r: 32
lora_alpha: 16
bf16: true
lr_scheduler_type: constant_with_warmup
optim: adafactor
completion_only_loss: true
max_length: 512
max_grad_norm: 0
"""
LLAMA_FACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
per_device_train_batch_size: 1
learning_rate: 1.0e-4
num_train_epochs: 3.0
warmup_ratio: 0.1
val_size: 0.1
optim: sgd
weight_decay: 0.1
adam_beta1: 0.9
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fedloom(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        return code, *capsys.readouterr()

    return run


def rows(path: Path, number: int, **columns: Callable[[int], Any]) -> None:
    lines = [json.dumps({name: make(place) for name, make in columns.items()}) for place in range(number)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_init_looks_at_the_data(fedloom: Callable[..., tuple[int, str, str]], here: Path) -> None:
    rows(here / "my data.jsonl", 40, question=lambda n: f"what is {n}?", context=lambda n: "", response=str,
         category=lambda n: "ab"[n % 2])  # fmt: skip
    code, out, err = fedloom("init", "my data.jsonl", "--model", "builtin")
    assert (code, out) == (0, "my_data.yaml\n")
    assert "my data.jsonl: read as alpaca: 40 rows" in err
    text = (here / "my_data.yaml").read_text()
    assert text.count("#") > 10 and text.startswith("# yaml-language-server: $schema=")
    recipe = read_recipe("my_data.yaml").recipe
    assert (recipe.model, recipe.data.path, recipe.data.type) == ("builtin", "my data.jsonl", "alpaca")
    assert recipe.data.columns == {"instruction": "question", "input": "context", "output": "response"}
    assert (recipe.split.kind, recipe.split.clients) == ("by_category", 2)
    assert recipe.output_dir == "runs/my_data"


def test_init_takes_keys(fedloom: Callable[..., tuple[int, str, str]], here: Path) -> None:
    rows(here / "odd.jsonl", 40, q=str, a=str, topic=lambda n: "xyz"[n % 3])
    words = ["data.columns.instruction=q", "data.columns.output=a", "--data.columns.category", "topic", "rounds=3",
             "prox_mu=0.1", "method=fedprox", "--save-rounds", "2"]  # fmt: skip
    assert fedloom("init", "odd.jsonl", *words, "-m", "builtin")[0] == 0
    recipe = read_recipe("odd.yaml").recipe
    assert recipe.data.columns == {"instruction": "q", "output": "a", "category": "topic"}
    assert (recipe.split.kind, recipe.split.clients, recipe.rounds) == ("by_category", 3, 3)
    assert (recipe.client.prox_mu, recipe.method, recipe.checkpoint.save_rounds) == (0.1, "fedprox", 2)


def test_init_writes_once(fedloom: Callable[..., tuple[int, str, str]], here: Path) -> None:
    rows(here / "d.jsonl", 20, instruction=str, output=str)
    assert fedloom("init", "d.jsonl", "--model", "builtin")[0] == 0
    before = (here / "d.yaml").read_text()
    code, out, err = fedloom("init", "d.jsonl", "--model", "other")
    assert (code, out) == (2, "") and "d.yaml exists already; nothing was written" in err
    assert (here / "d.yaml").read_text() == before
    (here / "d.jsonl").unlink()  # said before the data is read, which may take long
    assert "d.yaml exists already" in fedloom("init", "d.jsonl", "--model", "other")[2]
    rows(here / "d.jsonl", 20, instruction=str, output=str)
    assert fedloom("init", "d.jsonl", "--model", "other", "-o", "e.yaml")[:2] == (0, "e.yaml\n")
    assert read_recipe("e.yaml").recipe.split.clients == 4


def test_init_of_a_folder_makes_each_file_a_client(fedloom: Callable[..., tuple[int, str, str]], here: Path) -> None:
    (here / "sites").mkdir()
    for name in ("north", "south", "east", "global_test"):
        rows(here / "sites" / f"{name}.jsonl", 12, prompt=lambda n, name=name: f"{name} {n}", completion=str)
    code, _, err = fedloom("init", "sites/", "--model", "builtin")
    assert code == 0 and "36 rows" in err
    recipe = read_recipe("sites.yaml").recipe
    assert (recipe.split.kind, recipe.data.type) == ("files", "prompt_completion")
    assert recipe.data.test_path == "sites/global_test.jsonl" and recipe.data.test_set_size is None


def test_init_keeps_within_the_models_context(fedloom: Callable[..., tuple[int, str, str]], here: Path) -> None:
    rows(here / "long.jsonl", 20, text=lambda n: f"{n} " * 5000)
    (here / "m").mkdir()
    (here / "m" / "config.json").write_text('{"max_position_embeddings": 256}')
    assert fedloom("init", "long.jsonl", "--model", "m")[0] == 0
    assert read_recipe("long.yaml").recipe.data.max_length == 256
    assert fedloom("init", "long.jsonl", "--model", "hub/model", "-o", "l.yaml")[0] == 0
    assert read_recipe("l.yaml").recipe.data.max_length == 8192


def test_init_of_a_built_in_task(fedloom: Callable[..., tuple[int, str, str]], here: Path) -> None:
    code, _, err = fedloom("init", "builtin:arith", "--model", "builtin")
    assert code == 0, err
    recipe = read_recipe("arith.yaml").recipe
    assert (recipe.data.path, recipe.split.kind) == ("builtin:arith", "natural")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "init needs a data file"),
        (["d.jsonl"], "init needs to know the model"),
        (["nowhere.jsonl", "--model", "m"], "nowhere.jsonl: no such file"),
        (["empty.jsonl", "--model", "m"], "empty"),
        (["odd.jsonl", "--model", "m", "-o", "x.yaml"], "the columns are a, b"),
        (["d.jsonl", "--model", "m", "rouns=3"], "rouns: no such key, did you mean rounds?"),
        (["d.jsonl", "--model", "m", "rounds=0"], "rounds 0: must be >= 1"),
        (["d.jsonl", "odd.jsonl", "--model", "m"], "init takes one data file"),
        (["latin.jsonl", "--model", "m"], "not UTF-8"),
        (["d.jsonl", "--model", "m", "-o", "no/x.yaml"], "no: no such folder"),
        (["--from", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--from", "odd.yaml"], "not those of TRL, Axolotl or LLaMA-Factory"),
        (["--from", "ours.yaml"], "this is a fedloom recipe already"),
        (["--from", "list.yaml"], "no settings in it"),
        (["--from", "broken.yaml"], "not YAML"),
    ],
)
def test_init_refuses(fedloom: Callable[..., tuple[int, str, str]], here: Path, words: list[str], part: str) -> None:
    rows(here / "d.jsonl", 20, instruction=str, output=str)
    rows(here / "odd.jsonl", 20, a=str, b=str)
    (here / "empty.jsonl").write_text("")
    (here / "latin.jsonl").write_bytes(b'{"instruction": "caf\xe9", "output": "x"}\n')
    (here / "odd.yaml").write_text("colour: red\n")
    (here / "ours.yaml").write_text("model: m\ndata: {path: d}\nlocal_steps: 1\n")
    (here / "list.yaml").write_text("- a\n")
    (here / "broken.yaml").write_text("a: [b\n")
    before = sorted(here.iterdir())
    code, out, err = fedloom("init", *words)
    assert (code, out) == (2, "") and part in err and "Traceback" not in err
    assert sorted(here.iterdir()) == before


def test_from_axolotl(fedloom: Callable[..., tuple[int, str, str]], here: Path) -> None:
    (here / "lora.yml").write_text(AXOLOTL)
    code, out, err = fedloom("init", "--from", "lora.yml")
    assert (code, out) == (0, "fed_lora.yaml\n")
    recipe = read_recipe("fed_lora.yaml").recipe
    assert (recipe.model, recipe.data.path, recipe.data.type) == (
        "NousResearch/Llama-3.2-1B", "teknium/GPT4-LLM-Cleaned", "alpaca")  # fmt: skip
    assert (recipe.data.max_length, recipe.data.val_set_size, recipe.dtype) == (2048, 0.1, "auto")
    assert (recipe.adapter.lora_r, recipe.adapter.lora_alpha, recipe.adapter.lora_dropout) == (16, 32.0, 0.05)
    assert recipe.adapter.lora_target_modules == ["gate_proj", "q_proj"]
    assert recipe.client.per_device_train_batch_size == 2 and recipe.client.gradient_accumulation_steps == 2
    assert (recipe.client.optim, recipe.client.learning_rate, recipe.client.weight_decay) == ("adamw", 2e-4, 0.1)
    assert recipe.client.lr_scheduler_type == "cosine"
    dropped = err.partition("dropped ")[2]
    assert recipe.quantization == "nf4"
    for key in (
        "datasets[2]",
        "output_dir",
        "sample_packing",
        "num_epochs",
        "special_tokens",
    ):
        assert key in dropped, key
    assert "wandb_project" not in dropped  # it says nothing


def test_from_trl(here: Path) -> None:
    (here / "sft.yaml").write_text(TRL)
    found = translate(Path("sft.yaml"))
    assert found.tool == "TRL"
    (here / "out.yaml").write_text(found.text)
    recipe = read_recipe("out.yaml").recipe
    assert (recipe.model, recipe.data.path, recipe.data.max_length) == ("Qwen/Qwen2.5-0.5B", "trl-lib/Capybara", 512)
    assert (recipe.dtype, recipe.client.lr_scheduler_type, recipe.client.max_grad_norm) == (
        "bfloat16",
        "constant",
        None,
    )
    assert recipe.data.train_on_inputs is False
    assert {key for key, _, _ in found.dropped} == {
        "num_train_epochs", "packing", "use_peft", "optim"}  # fmt: skip
    assert recipe.runtime.gradient_checkpointing is True


def test_from_llama_factory_with_data_and_model_of_ones_own(
    fedloom: Callable[..., tuple[int, str, str]], here: Path
) -> None:
    (here / "lf.yaml").write_text(LLAMA_FACTORY)
    code, _, err = fedloom("init", "mine.jsonl", "--from", "lf.yaml", "--model", "builtin", "--output", "x.yaml")
    assert code == 0 and "read as LLaMA-Factory" in err
    recipe = read_recipe("x.yaml").recipe
    assert (recipe.model, recipe.data.path, recipe.data.limit) == ("builtin", "mine.jsonl", 1000)
    assert (recipe.adapter.lora_target_modules, recipe.adapter.lora_r) == ("all-linear", 8)
    assert (recipe.client.optim, recipe.client.weight_decay, recipe.client.adam_beta1) == ("sgd", 0.1, None)
    for part in ("adam_beta1: 0.9    sgd has no such setting", "warmup_ratio", "template", "num_train_epochs"):
        assert part in err.partition("dropped ")[2]


@pytest.mark.parametrize("text", [AXOLOTL, TRL, LLAMA_FACTORY])
def test_every_key_of_the_file_is_taken_or_listed(here: Path, text: str) -> None:
    from ruamel.yaml import YAML

    (here / "f.yaml").write_text(text)
    found = translate(Path("f.yaml"))
    said = {theirs.partition(":")[0] for theirs, _ in found.taken} | {key for key, _, _ in found.dropped}
    keys = {key for key, value in YAML(typ="safe").load(text).items() if value is not None}
    assert keys <= said
    assert all(reason for _, _, reason in found.dropped)


def test_a_recipe_of_other_words_is_not_guessed(here: Path) -> None:
    (here / "f.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="are not those of"):
        translate(Path("f.yaml"))
