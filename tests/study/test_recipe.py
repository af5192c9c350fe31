"""The recipe's models: what they fill, what they refuse, and that what they write reads back."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tools.write_recipe_docs import document, schema_text

from fedloom.errors import UserError
from fedloom.study.blocks import DataRecipe
from fedloom.study.load import find_key, packaged_recipes, read_recipe, validate_text
from fedloom.study.methods import METHOD_LINES, METHODS
from fedloom.study.recipe import BLOCKS, Recipe, resolved_yaml
from fedloom.study.yaml_text import yaml_value

ROOT = Path(__file__).resolve().parents[2]


def recipe(**values: object) -> Recipe:
    return Recipe.model_validate({"model": "m", "data": {"path": "d.jsonl"}, "local_steps": 3, **values})


def test_the_smallest_recipe_has_what_a_practitioner_expects() -> None:
    small = recipe()
    assert (small.adapter.lora_r, small.adapter.lora_alpha, small.adapter.lora_dropout) == (8, 16.0, 0.0)
    assert (small.client.optim, small.client.learning_rate, small.client.per_device_train_batch_size) == (
        "adamw",
        2e-4,
        4,
    )
    assert (small.client.adam_beta1, small.client.weight_decay, small.client.momentum) == (0.9, 0.0, None)
    assert (small.split.kind, small.split.clients, small.data.val_set_size, small.data.test_set_size) == (
        "iid",
        4,
        0.05,
        0.1,
    )
    assert (small.server.kind, small.server.server_optim, small.arms) == ("replace", None, ["base", "federated"])
    assert (small.evaluate.max_new_tokens, small.evaluate.best_by, small.output_dir) == (256, "loss", "runs/run")


def test_builtin_model_brings_a_task_and_its_clients() -> None:
    small = Recipe.model_validate({"model": "builtin", "local_epochs": 1})
    assert (small.data.path, small.split.kind, small.split.clients) == ("builtin:skills", "natural", None)
    assert small.evaluate.max_new_tokens is None


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("fedavg", "prox_mu", 0.0),
        ("fedprox", "prox_mu", 0.01),
        ("fedavgm", "server_momentum", 0.9),
        ("fedavgm", "server_learning_rate", 1.0),
        ("fedadam", "server_beta2", 0.99),
        ("fedadam", "server_tau", 1e-3),
        ("fedyogi", "server_optim", "yogi"),
        ("fedadagrad", "server_beta1", 0.0),
    ],
)
def test_a_method_fills_its_slots(method: str, key: str, value: object) -> None:
    made = recipe(method=method)
    holder = made.client if key == "prox_mu" else made.server
    assert getattr(holder, key) == value


def test_an_explicit_slot_key_replaces_the_methods() -> None:
    made = recipe(method="fedadam", server={"server_optim": "yogi", "server_tau": 0.1})
    assert (made.server.server_optim, made.server.server_tau, made.server.server_beta2) == ("yogi", 0.1, 0.99)
    plain = recipe(method="fedadam", server={"kind": "replace"})
    assert (plain.server.server_optim, plain.server.server_tau) == (None, None)
    assert recipe(method="fedprox", client={"prox_mu": 0.5}).client.prox_mu == 0.5


def test_every_method_has_a_line_and_composes() -> None:
    assert set(METHODS) == set(METHOD_LINES)
    for method in METHODS:
        recipe(method=method)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"clients_per_round": 16, "split": {"clients": 8}},
            "clients_per_round: 16, but the split has 8 clients: at most 8",
        ),
        ({"local_steps": None}, "local_steps: missing"),
        ({"local_epochs": 1}, "local_epochs: 1, and local_steps 3 as well"),
        ({"split": {"kind": "dirichlet"}}, "split.alpha: missing"),
        (
            {"split": {"alpha": 0.5}},
            "split.alpha: 0.5 would have no effect: kind is iid; dirichlet and quantity_skew have it",
        ),
        ({"split": {"kind": "quantity_skew"}}, "split.alpha: missing: quantity_skew needs it"),
        ({"split": {"kind": "quantity_skew", "alpha": 1, "column": "user"}}, "split.column: user would have no effect"),
        (
            {"split": {"kind": "dirichlet", "alpha": 1, "shards_per_client": 2}},
            "split.shards_per_client: 2 would have no",
        ),
        ({"split": {"kind": "shards", "min_rows": 9}}, "split.min_rows: 9 would have no effect: kind is shards"),
        ({"split": {"kind": "by_column"}}, "split.column: missing"),
        ({"split": {"column": "user"}}, "split.column: user would have no effect"),
        ({"split": {"kind": "natural"}}, "natural is what built-in tasks bring"),
        ({"client": {"prox_mu": 0.1}}, "set method: fedprox"),
        ({"client": {"momentum": 0.9}}, "momentum has it"),
        ({"client": {"optim": "sgd", "adam_beta1": 0.9}}, "adamw, adam, yogi have it"),
        ({"client": {"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}}, "linear and cosine have an end"),
        ({"client": {"warmup_rounds": 5}, "rounds": 5}, "client.warmup_rounds: 5, but there are 5 rounds"),
        ({"server": {"server_momentum": 0.9}}, "server.kind is replace"),
        ({"method": "fedavgm", "server": {"server_beta1": 0.9}}, "server_optim is momentum"),
        ({"server": {"kind": "optimize"}}, "server.server_optim: missing"),
        ({"runtime": {"kind": "sequential", "clients_per_batch": 4}}, "one client at a time"),
        ({"evaluate": {"score": "none", "max_new_tokens": 5}}, "nothing is generated"),
        ({"evaluate": {"score": "none", "best_by": "score"}}, "best_by: loss"),
        ({"evaluate": {"score": "none", "best_by": "score_decile"}}, "best_by: loss"),
        ({"evaluate": {"score": "none", "score_validation": True}}, "nothing is scored"),
        ({"evaluate": {"best_by": "scores"}}, "did you mean score?"),
        ({"evaluate": {"best_by": "gsm8k/accuracy"}}, "names one of them"),
        ({"evaluate": {"best_by": "gsm8k/accuracy", "tasks": ["gsm8k"]}}, "set evaluate.task_rounds"),
        ({"evaluate": {"early_stopping_threshold": 0.1}}, "early_stopping_patience is not set"),
        ({"evaluate": {"early_stopping_patience": 2, "eval_rounds": 0}}, "nothing is measured before the end"),
        ({"evaluate": {"early_stopping_patience": 2}, "data": {"path": "d", "val_set_size": 0}}, "to stop by"),
        ({"checkpoint": {"export": "best"}, "data": {"path": "d", "val_set_size": 0}}, "export: last"),
        ({"evaluate": {"tasks": ["mmlu", "mmlu"]}}, "mmlu is named twice"),
        ({"evaluate": {"tasks": ["gsm8k", "mlmu"]}}, "there is no benchmark 'mlmu'; did you mean 'mmlu'?"),
        ({"evaluate": {"task_limit": 5}}, "evaluate.tasks is empty"),
        ({"evaluate": {"task_paths": {"mmlu": "x"}}}, "evaluate.tasks is empty"),
        ({"evaluate": {"tasks": ["gsm8k"], "task_paths": {"mmlu": "x"}}}, "mmlu is none of evaluate.tasks"),
        ({"evaluate": {"tasks": ["gsm8k"], "task_clients": 2}}, "no client has a model of its own"),
        (
            {"method": "fedsa_lora", "runtime": {"kind": "loopback"}, "evaluate": {"tasks": ["gsm8k"]}},
            "what is not shared never leaves a client",
        ),
        ({"evaluate": {"best_by": "loss"}, "data": {"path": "d", "val_set_size": 0}}, "nothing to choose by"),
        ({"data": {"path": "d", "test_path": "t", "test_set_size": 0.1}}, "data.test_path gives the test rows"),
        ({"data": {"path": "d", "val_set_size": 0.5, "test_set_size": 0.5}}, "nothing would be left to train on"),
        ({"data": {"path": "builtin:code", "test_path": "t"}}, "brings its own rows"),
        ({"data": {"path": "builtin:code", "val_set_size": 0.3}}, "brings its own rows"),
        ({"data": {"path": "builtin:code", "columns": {"text": "t"}}}, "brings its own rows"),
        ({"data": {}}, "data.path: missing"),
        ({"data": {"path": "d", "columns": {"inpt": "a"}}}, "no such column name: inpt"),
        ({"arms": ["base", "base"]}, "base is named twice"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(**values)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"adapter": {"lora_r": 0}}, "lora_r"),
        ({"clients_per_round": 1.5}, "clients_per_round"),
        ({"clients_per_round": 0}, "clients_per_round"),
        ({"rounds": 0}, "rounds"),
        ({"client": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"client": {"learning_rate": float("inf")}}, "learning_rate"),
        ({"arms": []}, "arms"),
        ({"adapter": {"lora_target_modules": []}}, "lora_target_modules"),
        ({"data": {"path": "d", "val_set_size": 1.0}}, "val_set_size"),
        ({"runtime": {"client_dropout": 1.0}}, "client_dropout"),
        ({"seed": -1}, "seed"),
        ({"bogus": 1}, "bogus"),
        ({"client": {"bogus": 1}}, "bogus"),
    ],
)
def test_ranges(values: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(**values)
    assert field in str(caught.value.errors()[0]["loc"])


def test_early_stopping_brings_the_best_state_and_its_threshold() -> None:
    plain, stopping = recipe(), recipe(evaluate={"early_stopping_patience": 3})
    assert (plain.checkpoint.export, plain.evaluate.early_stopping_threshold) == ("last", None)
    assert (stopping.checkpoint.export, stopping.evaluate.early_stopping_threshold) == ("best", 0.0)
    assert recipe(evaluate={"early_stopping_patience": 3}, checkpoint={"export": "last"}).checkpoint.export == "last"


def test_a_task_metric_may_be_what_the_best_is_chosen_by_without_validation_rows() -> None:
    made = recipe(
        data={"path": "d", "val_set_size": 0},
        evaluate={"best_by": "gsm8k/accuracy", "tasks": ["gsm8k"], "task_rounds": 2, "early_stopping_patience": 1},
    )
    assert made.evaluate.best_by == "gsm8k/accuracy"
    text = resolved_yaml(made)
    assert validate_text(text, name="x")[0] == made


def test_a_share_of_one_is_everyone_and_a_one_is_one_client() -> None:
    assert recipe(clients_per_round=1.0).clients_per_round is None
    assert recipe(clients_per_round=1).clients_per_round == 1
    assert recipe(clients_per_round=0.5).clients_per_round == 0.5


def test_recipes_are_values() -> None:
    assert recipe() == recipe()
    with pytest.raises(ValidationError):
        recipe().rounds = 3  # type: ignore[misc]


def test_blocks_may_be_given_as_models() -> None:
    made = Recipe(model="m", data=DataRecipe(path="d.csv"), local_steps=1)
    assert (made.data.path, made.data.test_set_size) == ("d.csv", 0.1)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("path", ["d.jsonl", "builtin:arith"])
def test_a_resolved_recipe_reads_back_as_itself(method: str, path: str) -> None:
    made = recipe(method=method, data={"path": path}, name="x", client={"learning_rate": 1e-5, "max_grad_norm": None})
    text = resolved_yaml(made)
    assert text.startswith("# yaml-language-server: $schema=")
    assert ("val_set_size" in text) is (path == "d.jsonl"), "a setting without effect is not written"
    again, notes = validate_text(text, name="another name")
    assert (again, notes) == (made, ())
    assert resolved_yaml(again) == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    )
)  # fmt: skip
def test_yaml_values_mean_the_same_to_yaml_1_1_and_1_2(value: object) -> None:
    import yaml
    from ruamel.yaml import YAML

    text = yaml_value(value)
    assert yaml.safe_load(text) == value
    assert YAML(typ="safe", pure=True).load(text) == value


def test_flat_names_are_unique_but_for_those_that_say_which() -> None:
    leaves = [leaf for model in BLOCKS.values() for leaf in model.model_fields] + [
        name for name in Recipe.model_fields if name not in BLOCKS
    ]
    assert {leaf for leaf in leaves if leaves.count(leaf) > 1} == {"kind", "limit", "name"}
    assert find_key("name") == "name"
    assert find_key("learning_rate") == "client.learning_rate"


def test_docs_and_schema_are_current_and_complete() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == document(), "run tools/write_recipe_docs.py"
    assert (ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8") == schema_text()
    text = document()
    for block, model in [("", Recipe), *BLOCKS.items()]:
        for key, field in model.model_fields.items():
            assert field.description, f"{block}.{key} has no description"
            assert key in BLOCKS or f"| `{key}` |" in text


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_packaged_recipes_are_sound_and_name_the_schema(name: str) -> None:
    path = packaged_recipes()[name]
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    up = "../" * name.count("/")
    assert first == f"# yaml-language-server: $schema={up}recipe.schema.json"
    assert second.startswith("# ") and len(second) > 20
    assert read_recipe(name).recipe.output_dir == f"runs/{name.rpartition('/')[2]}"


# alpha, dropout, learning rate, tokens, validation and test share, clients: FederatedScope-LLM's configurations
ORIGINAL = {
    "dolly": (64, 0.1, 5e-3, 650, 0, 0.01, 8),
    "gsm8k": (16, 0.05, 5e-3, 1000, 0.001, 0.001, 3),
    "codealpaca": (32, 0.0, 3e-3, 650, 0.1, 0.01, 9),
    "codesearchnet": (16, 0.05, 1e-3, 650, 0.001, 0.001, 6),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_papers_recipes_have_the_original_values(name: str) -> None:
    r = read_recipe(f"paper/{name}").recipe
    assert (
        r.adapter.lora_alpha,
        r.adapter.lora_dropout,
        r.client.learning_rate,
        r.data.max_length,
        r.data.val_set_size,
        r.data.test_set_size,
        r.split.clients,
    ) == ORIGINAL[name]
    assert (r.adapter.lora_r, r.adapter.lora_target_modules) == (8, ["q_proj", "v_proj"])
    assert (r.rounds, r.local_steps, r.client.per_device_train_batch_size) == (500, 30, 1)
    assert (r.client.optim, r.client.lr_scheduler_type, r.client.max_grad_norm) == ("sgd", "constant", None)
    assert r.data.name == f"fed-{name}" and r.split.kind == ("iid" if name == "gsm8k" else "by_category")


# data, clients, how many of them in a round: what `flwr new` writes for the challenges
FLOWERTUNE = {
    "general": ("alpaca-gpt4", 20, 0.1),
    "finance": ("fingpt", 50, 0.1),
    "medical": ("medalpaca", 20, 0.1),
    "code": ("code-alpaca-20k", 10, 0.2),
}


@pytest.mark.parametrize("name", FLOWERTUNE)
def test_the_leaderboards_recipes_have_its_values(name: str) -> None:
    r = read_recipe(f"flowertune/{name}").recipe
    assert (r.data.name, r.split.clients, r.clients_per_round) == FLOWERTUNE[name] and r.split.kind == "iid"
    assert (r.rounds, r.local_steps, r.client.per_device_train_batch_size, r.data.max_length) == (200, 10, 16, 512)
    assert (r.adapter.lora_r, r.adapter.lora_alpha, r.adapter.lora_dropout) == (32, 64, 0.075)
    assert r.client.min_lr_ratio is not None
    assert (r.client.learning_rate, r.client.learning_rate * r.client.min_lr_ratio) == pytest.approx((5e-5, 1e-6))


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fedloom.study.load import read_recipe, packaged_recipes;"
        "[read_recipe(name) for name in packaged_recipes()];"
        "print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_another_kind_on_the_command_line_leaves_the_recipes_own_keys_of_the_old_one():
    text = "model: builtin\nlocal_steps: 1\nadapter: {lora_r: 4, lora_dropout: 0.1, rank_pattern: {v_proj: 2}}\n"
    recipe, notes = validate_text(text, ["adapter.kind=ia3"])
    assert (recipe.adapter.kind, recipe.adapter.lora_r) == ("ia3", None)
    assert notes == (
        "adapter.kind=ia3: without the recipe's adapter.lora_r, adapter.lora_dropout, adapter.rank_pattern, "
        "which are another kind's",
    )
    recipe, notes = validate_text(text, ["adapter.kind=dora"])
    assert (recipe.adapter.kind, recipe.adapter.lora_r, notes) == ("dora", 4, ())
    recipe, _ = validate_text(text, ["adapter.kind=lora"])
    assert recipe.adapter.rank_pattern == {"v_proj": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["adapter.kind=p_tuning", "adapter.lora_r=4"],
            "adapter.lora_r 4: would have no effect, kind is p_tuning",
        ),
        (["adapter.num_virtual_tokens=4"], "adapter.num_virtual_tokens 4: would have no effect, kind is lora"),
        (["adapter.kind=prompt_tuning", "method=flora"], "it works on LoRA's factors"),
        (["adapter.kind=prefix_tuning", "method=ffa_lora"], "it works on LoRA's factors"),
        (["adapter.kind=dora", "method=flora"], "the sum of products that it makes exact is not the mean of these"),
        (["adapter.kind=dora", "method=rolora"], "then dora's magnitudes would never be trained"),
        (["adapter.kind=ia3", "method=fedsa_lora"], "it works on LoRA's factors and adapter.kind is ia3"),
        (["adapter.bias=all", "method=ffa_lora"], "which leaves biases as they are: adapter.bias: none"),
        (["adapter.kind=ia3", "adapter.use_rslora=true"], "would have no effect, kind is ia3; lora, dora have it"),
        (["adapter.rank_pattern={v_proj: 0}"], "must be >= 1"),
        (["method=fedsa_lora", "client.trainable=lora_B"], "what is sent must be trained in every round"),
        (["method=flora", "client.trainable=lora_B"], "flora is for clients that train both factors"),
        (["aggregate.norm_weighted=true"], "would have no effect, kind is mean; het_lora has it"),
        (["method=flora", "server.kind=optimize", "server.server_optim=adam"], None),
    ],
)
def test_kinds_of_adapters_and_lora_methods_refuse_what_has_no_effect(words, said):
    from fedloom.study.build import algorithm_of

    text = "model: builtin\nlocal_steps: 1\n"
    if said is None:
        recipe, _ = validate_text(text, words)
        with pytest.raises(UserError, match="flora proposes new factors"):
            algorithm_of(recipe)
        return
    with pytest.raises(UserError) as caught:
        validate_text(text, words)
    assert said in str(caught.value)


def test_each_kind_of_adapter_has_its_own_settings_and_no_others():
    from fedloom.study.recipe import resolved_json
    from fedloom.study.settings import ADAPTER_DEFAULTS

    for kind, settings in ADAPTER_DEFAULTS.items():
        method = "fedkseed" if kind == "seed_space" else "fedavg"  # the others have no gradient of its numbers
        recipe, _ = validate_text(f"model: builtin\nlocal_steps: 1\nmethod: {method}\n", [f"adapter.kind={kind}"])
        said = resolved_json(recipe)["adapter"]
        if kind == "seed_space":
            assert said.pop("direction_seed") == 42
        assert said == {"kind": kind, **{key: value for key, value in settings.items() if value is not None}}
