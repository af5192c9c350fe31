"""Reading recipes: lines, coercion, spellings row by row, overrides, and all objections at once."""

from pathlib import Path
from typing import Any, get_args

import pytest

from fedloom.errors import UserError
from fedloom.study.aliases import REFUSED, SAID, SAME, SAME_VALUES
from fedloom.study.load import RecipeError, find_key, read_recipe, split_words, validate_text
from fedloom.study.methods import METHODS
from fedloom.study.recipe import BLOCKS, Recipe

TOP = [name for name in Recipe.model_fields if name not in BLOCKS]
CLIENT_KINDS = get_args(BLOCKS["client"].model_fields["kind"].annotation)
ARMS = ("base", "local", "federated", "global")
BASE = "model: m\ndata: {path: d.jsonl}\nlocal_steps: 4\n"


def get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def said(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        validate_text(text, overrides, source="x.yaml")
    assert caught.value.exit_code == 2
    assert caught.value.message.splitlines()[0] == f"x.yaml: {len(caught.value.problems)} problem" + (
        "s" if len(caught.value.problems) > 1 else ""
    )
    return [str(problem) for problem in caught.value.problems]


def test_all_objections_at_once_each_with_line_key_value_and_what_is_allowed() -> None:
    text = """\
model: m
data:
  path: d.jsonl
  max_length: tall
adapter:
  lora_rnk: 4
  lora_r: 0
  rounds: 3
split: {kind: iid, clients: 8}
clients_per_round: 16
method: fedpox
client:
  learning_rate: -1
local_steps: 4
bogus: 1
"""
    assert said(text) == [
        "line 4  data.max_length tall: expected a whole number",
        "line 6  adapter.lora_rnk 4: no such key, did you mean lora_r?",
        "line 7  adapter.lora_r 0: must be >= 1",
        "line 8  adapter.rounds 3: no such key in adapter: rounds belongs to the top of the recipe",
        "line 10  clients_per_round 16, but the split has 8 clients: at most 8, or split.clients >= 16",
        f"line 11  method fedpox: expected one of {', '.join(METHODS)}; did you mean fedprox?",
        "line 13  client.learning_rate -1: must be > 0",
        "line 15  bogus 1: no such key; there are " + ", ".join([*TOP, *BLOCKS]),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("model: b", "model b: given twice, on line 1 as well: leave one of them out"),
        ("client: {optim: sgd}\nclient: {prox_mu: 0}", "client: given twice, on line 4 as well"),
        ("rounds: 3\nnum_rounds: 4", "rounds 4: given twice, on line 4 as well: leave one of them out"),
        ("client: {lora_r: 3}", "client.lora_r 3: no such key in client: lora_r belongs to adapter (adapter.lora_r)"),
        ("data.lora_r: 3", "data.lora_r 3: no such key in data: lora_r belongs to adapter (adapter.lora_r)"),
        ("client: {r: 3}", "client.r 3: no such key in client: write adapter.lora_r"),
        ("limit: 3", "limit 3: which one: data.limit, evaluate.limit?"),
        ("lora_rr: 3", "lora_rr 3: no such key, did you mean adapter.lora_r?"),
        ("client: 5", f"client.kind 5: expected one of {', '.join(CLIENT_KINDS)}"),
        ("checkpoint: 5", "checkpoint 5: expected a block of keys: save_rounds, save_total_limit, export"),
        ("arms: [federatd]", f"arms [federatd]: expected one of {', '.join(ARMS)}; did you mean federated?"),
        ("trust_remote_code: maybe", "trust_remote_code maybe: expected true or false"),
        ("seed: 1.5", "seed 1.5: expected a whole number"),
        ("seed:", "seed '': expected a whole number"),
        ("clients_per_round: 1.5", "clients_per_round 1.5: a whole number >= 1, or a share above 0 and below 1"),
        ("clients_per_round: 0", "clients_per_round 0: a whole number >= 1, or a share above 0 and below 1"),
        ("val_set_size: 1.0", "data.val_set_size 1.0: a share from 0 to below 1, or a whole number of rows"),
        ("learning_rate: .inf", "client.learning_rate .inf: expected a number"),
        ("learning_rate: nan", "client.learning_rate nan: must be a finite number"),
    ],
)
def test_single_objections(line: str, problem: str) -> None:
    last = 4 + line.count("\n")
    assert said(f"{BASE}{line}\n") == [f"line {last}  {problem}"]


def test_what_is_missing_has_no_line() -> None:
    missing = "model: missing: a hub id, a folder with a model, or builtin"
    assert said("data: {path: d}\nlocal_steps: 1\n") == [missing]
    missing = "data.path: missing: a file, a folder, a hub id, builtin:skills, or a name that fedloom ls data shows"
    assert said("model: m\nlocal_steps: 1\n") == [missing]
    assert said("model: {a: 1}\ndata: {path: d}\nlocal_steps: 1\n") == ["line 1  model {a: 1}: expected text"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- a\n- b\n", "line 1  expected keys and values at the top"),
        ("model: [a\nb: c\n", "not YAML"),
        ("model: a\n\tb: c\n", "line 2  not YAML"),
    ],
)
def test_files_that_are_no_recipe(text: str, part: str) -> None:
    assert part in said(text)[0]


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 2e-4", "client.learning_rate", 2e-4),
        ("learning_rate: '1e-3'", "client.learning_rate", 1e-3),
        ("rounds: 1e2", "rounds", 100),
        ("trust_remote_code: yes", "trust_remote_code", True),
        ("train_on_inputs: no", "data.train_on_inputs", False),
        ("name: no", "name", "no"),
        ("name: 007", "name", "007"),
        ("output_dir: 12", "output_dir", "12"),
        ("clients_per_round: 0.5", "clients_per_round", 0.5),
        ("clients_per_round: 2", "clients_per_round", 2),
        ("clients_per_round: 1.0", "clients_per_round", None),
        ("clients_per_round:", "clients_per_round", None),
        ("max_grad_norm: null", "client.max_grad_norm", None),
        ("max_grad_norm: off", "client.max_grad_norm", None),
        ("max_grad_norm: 0", "client.max_grad_norm", None),
        ("lora_target_modules: q_proj,v_proj", "adapter.lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules: [q_proj]", "adapter.lora_target_modules", ["q_proj"]),
        ("lora_target_modules: all-linear", "adapter.lora_target_modules", "all-linear"),
        ("arms: base", "arms", ["base"]),
        ("val_set_size: 20", "data.val_set_size", 20),
        ("val_set_size: 0.2", "data.val_set_size", 0.2),
        ("score: none", "evaluate.score", "none"),
        ("adapter: lora", "adapter.kind", "lora"),
        ("server:", "server.kind", "replace"),
        ("data.max_length: 64", "data.max_length", 64),
        ("columns: {input: context}", "data.columns", {"input": "context"}),
        ("evaluate: {tasks: [mmlu], task_paths: {mmlu: x}}", "evaluate.task_paths", {"mmlu": "x"}),
        ("tasks: mmlu,gsm8k", "evaluate.tasks", ["mmlu", "gsm8k"]),
    ],
)
def test_values_are_read_by_the_type_of_their_field(line: str, key: str, value: object) -> None:
    recipe, _ = validate_text(BASE + line + "\n")
    found = get(recipe, key)
    assert found == value and type(found) is type(value)


SAMPLES = {
    "model": "x",
    "dtype": "bfloat16",
    "data.path": "some/path",
    "data.test_path": "some/path",
    "data.max_length": "33",
    "data.val_set_size": "0.2",
    "split.alpha": "0.3",
    "split.column": "user",
    "adapter.kind": "lora",
    "adapter.lora_target_modules": "[k_proj]",
    "method": "fedyogi",
    "client.optim": "sgd",
    "client.lr_scheduler_type": "linear",
    "client.prox_mu": "0.3",
    "evaluate.best_by": "loss_decile",
    "evaluate.tasks": "[gsm8k]",
    "server.server_optim": "yogi",
    "server.server_beta1": "0.3",
    "server.server_beta2": "0.3",
    "output_dir": "some/path",
    "name": "other",
}
NEEDS = {
    "client.prox_mu": "method: fedprox\n",
    "split.alpha": "split.kind: dirichlet\n",
    "split.column": "split.kind: by_column\n",
    "evaluate.num_fewshot": "tasks: [gsm8k]\n",
}


@pytest.mark.parametrize(("theirs", "ours"), SAME.items())
def test_same_meaning(theirs: str, ours: str) -> None:
    sample = SAMPLES.get(ours, "3")
    lines = {"model": "model: m\n", "data.path": "data: {path: d.jsonl}\n", "local_steps": "local_steps: 4\n"}
    text = "".join(line for key, line in lines.items() if key != ours) + NEEDS.get(ours, "")
    text += "method: fedadam\n" if ours.startswith("server.") else ""
    recipe, notes = validate_text(f"{text}{theirs}: {sample}\n")
    plain, _ = validate_text(f"{text}{ours}: {sample}\n")
    assert recipe == plain and notes == ()
    assert get(recipe, ours) != get(validate_text(BASE)[0], ours) or sample == "lora"
    block = ours.rpartition(".")[0]
    if block:
        assert validate_text(f"{text}{block}.{theirs}: {sample}\n")[0] == plain


@pytest.mark.parametrize(
    ("key", "theirs", "ours"), [(k, t, o) for k, row in SAME_VALUES.items() for t, o in row.items()]
)
def test_same_values(key: str, theirs: str, ours: str) -> None:
    needs = "split.alpha: 1\n" if ours == "dirichlet" else ""
    a, _ = validate_text(f"{BASE}{needs}{key}: {theirs}\n")
    b, _ = validate_text(f"{BASE}{needs}{key}: {ours}\n")
    assert a == b


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("bf16: true", "dtype", "bfloat16"),
        ("bf16: false", "dtype", "float32"),
        ("bf16: auto", "dtype", "auto"),
        ("fp16: false", "dtype", "auto"),
        ("fp16: true", "dtype", "float16"),
        ("load_in_4bit: true", "quantization", "nf4"),
        ("load_in_8bit: true", "quantization", "int8"),
        ("quantization_bit: 4", "quantization", "nf4"),
        ("fraction_fit: 0.5", "clients_per_round", 0.5),
        ("fraction_train: 1.0", "clients_per_round", None),
        ("sample_client_rate: 0.25", "clients_per_round", 0.25),
        ("warmup_ratio: 0.2", "client.warmup_rounds", 2),
        ("completion_only_loss: false", "data.train_on_inputs", True),
        ("assistant_only_loss: true", "data.train_on_inputs", False),
        ("lora_target_linear: true", "adapter.lora_target_modules", "all-linear"),
        ("uniform_weight: true", "aggregate.weighting", "uniform"),
        ("load_in_4bit: false", "dtype", "auto"),
        ("load_in_8bit: false", "dtype", "auto"),
        ("load_best_model_at_end: true", "checkpoint.export", "best"),
    ],
)
def test_another_unit_is_taken_and_said(line: str, key: str, value: object) -> None:
    recipe, notes = validate_text(f"{BASE}{line}\n")
    assert get(recipe, key) == value
    assert len(notes) == 1 and notes[0].startswith(line.split(":")[0])


def test_every_row_of_said_is_tested() -> None:
    marks = test_another_unit_is_taken_and_said.pytestmark  # type: ignore[attr-defined]
    assert {line.split(":")[0] for line, _, _ in marks[0].args[1]} == set(SAID)


@pytest.mark.parametrize("line", ["fp16: 3", "quantization_bit: 2", "bf16: 3", "fraction_fit: 2", "warmup_ratio: 1"])
def test_another_unit_out_of_range_is_refused(line: str) -> None:
    assert said(f"{BASE}{line}\n")[0].startswith(f"line 4  {line.replace(':', '')}: ")


@pytest.mark.parametrize(
    ("line", "arithmetic"),
    [
        ("max_steps: 200", "max_steps 200 = 50 rounds x local_steps: 4"),
        ("num_train_epochs: 3", "rounds: 3 x local_epochs: 1"),
        ("num_epochs: 3", "rounds: 3 x local_epochs: 1"),
        ("epochs: 3", "rounds: 3 x local_epochs: 1"),
        ("eval_steps: 20", "20 / local_steps 4 = eval_rounds: 5"),
        ("save_steps: 40", "40 / local_steps 4 = save_rounds: 10"),
        ("warmup_steps: 8", "8 / local_steps 4 = warmup_rounds: 2"),
        ("logging_steps: 1", "a row is written for every round"),
        ("batch_size: 32", "4 x gradient_accumulation_steps 1 = 4 examples per step of a client, x 4 clients = 16"),
        ("train_batch_size: 32", "= 16 per step of a round"),
    ],
)
def test_another_meaning_is_refused_with_the_arithmetic(line: str, arithmetic: str) -> None:
    problems = said(f"{BASE}{line}\n")
    assert len(problems) == 1 and problems[0].startswith("line 4  ") and arithmetic in problems[0]


def test_every_row_of_refused_is_tested() -> None:
    marks = test_another_meaning_is_refused_with_the_arithmetic.pytestmark  # type: ignore[attr-defined]
    assert {line.split(":")[0] for line, _ in marks[0].args[1]} == set(REFUSED)


def test_the_tables_lead_to_keys_that_exist_and_hide_none() -> None:
    leaves = {leaf for model in BLOCKS.values() for leaf in model.model_fields} | set(Recipe.model_fields)
    for ours in [*SAME.values(), *SAME_VALUES, *(key for row in SAID.values() for key in row.keys)]:
        assert find_key(ours) == ours
    assert not leaves & (set(SAME) | set(SAID) | set(REFUSED))
    assert not set(SAME) & (set(SAID) | set(REFUSED)) and not set(SAID) & set(REFUSED)


@pytest.mark.parametrize(
    "words",
    [
        ["client.learning_rate=1e-3"],
        ["learning_rate=1e-3"],
        ["lr=1e-3"],
        ["--client.learning_rate", "1e-3"],
        ["--client.learning-rate", "1e-3"],
        ["--learning-rate", "1e-3"],
        ["--learning_rate=1e-3"],
        ["--learning-rate=1e-3"],
        ["client={learning_rate: 1e-3}"],
        ["learning_rate=5", "learning_rate=1e-3"],
    ],
)
def test_overrides_in_every_form(words: list[str]) -> None:
    recipe, _ = validate_text(BASE + "client:\n  learning_rate: 7\n  optim: sgd\n", words)
    assert recipe.client.learning_rate == 1e-3
    assert recipe.client.optim == "sgd"


def test_overrides_name_themselves() -> None:
    assert said(BASE, "--lora-rnk", "4", "seed=x", "plain", "warmup_rounds=99") == [
        "override  plain: expected key=value or --key value",
        "override --lora-rnk 4  lora_rnk 4: no such key, did you mean adapter.lora_r?",
        "override seed=x  seed x: expected a whole number",
        "override warmup_rounds=99  client.warmup_rounds 99, but there are 10 rounds: at most 9",
    ]


def test_text_is_taken_as_it_stands_in_overrides() -> None:
    words = ["data.path=C:\\data\\a: b.jsonl", "model=[x]", "data.columns.input=context", "data.columns.output=no"]
    recipe, _ = validate_text(BASE, words)
    assert (recipe.data.path, recipe.model) == ("C:\\data\\a: b.jsonl", "[x]")
    assert recipe.data.columns == {"input": "context", "output": "no"}
    assert validate_text(BASE + "data.test_path: t\n", ["data.test_path="])[0].data.test_path is None


def test_words_are_told_apart() -> None:
    overrides, rest = split_words(["--trust-remote-code", "a.yaml", "--lora-r", "4", "x=1", "--seed", "-1", "--model"])
    assert [(o.key, o.value) for o in overrides] == [
        ("trust_remote_code", "true"), ("lora_r", "4"), ("x", "1"), ("seed", "-1")]  # fmt: skip
    assert rest == ["a.yaml", "--model"]


def test_the_name_comes_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dolly.yaml"
    path.write_text(BASE)
    assert read_recipe(path).recipe.output_dir == "runs/dolly"
    assert read_recipe(path, ["name=x"]).recipe.output_dir == "runs/x"
    (tmp_path / "recipe.yaml").write_text(BASE)
    assert read_recipe(tmp_path).recipe.name == tmp_path.name


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "dolly.yaml").write_bytes(BASE.encode() + b"# caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 at byte"):
        read_recipe(tmp_path / "dolly.yaml")
    with pytest.raises(UserError, match=r"did you mean dolly\.yaml"):
        read_recipe(tmp_path / "doly.yaml")
    with pytest.raises(UserError, match=r"folder without recipe\.yaml"):
        read_recipe(tmp_path)
    (tmp_path / "bom.yaml").write_text(BASE, encoding="utf-8-sig")
    assert read_recipe(tmp_path / "bom.yaml").recipe.model == "m"


def test_anchors_work_and_bad_keys_do_not_cascade() -> None:
    recipe, _ = validate_text("model: &m some\nname: *m\ndata: {path: d}\nlocal_steps: 1\n")
    assert recipe.name == "some"
    # a value that is wrong raises no second objection about what depends on it
    assert len(said(BASE.replace("local_steps: 4", "local_steps: four"))) == 1
    assert len(said(BASE + "method: fedpox\nserver_momentum: 0.9\n")) == 1
    assert len(said(BASE + "split: {kind: dirichlt, alpha: 1}\n")) == 1
