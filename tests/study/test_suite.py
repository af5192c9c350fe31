"""Reading a suite: its cells, and every objection at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.write_recipe_docs import suite_schema_text

from fedloom.errors import UserError
from fedloom.study.load import RecipeError, packaged_recipes, packaged_suites, read_recipe
from fedloom.study.suite import Suite, names_suite, read_suite_file, validate_suite_text

ROOT = Path(__file__).resolve().parents[2]
BASE = """\
model: m
data: {path: d.jsonl}
local_steps: 3
adapter: {kind: lora, lora_r: 16, lora_dropout: 0.1}
"""
SUITE = """\
suite: small
base: one.yaml
set: {rounds: 7, client: {optim: sgd}}
grid:
  learning_rate: [1e-3, 4e-3]
  method:
    plain: {method: fedavg}
    pulled:
      method: fedprox
      client: {prox_mu: 0.5}
seeds: [0, 1, 2]
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Suite]:
    """Return a function that reads a suite's text in a folder with the recipes one.yaml and two.yaml."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(BASE)

    def read(text: str, *overrides: str) -> Suite:
        return validate_suite_text(text, overrides, source="s.yaml")

    return read


def problems(read: Callable[..., Suite], text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as wrong:
        read(text, *overrides)
    return str(wrong.value)


# ---- cells


def test_cells_are_recipes_times_grid_times_seeds(suite: Callable[..., Suite]) -> None:
    found = suite(SUITE.replace("base: one.yaml", "base: [one.yaml, two.yaml]"))
    assert len(found.cells) == 2 * 2 * 2 * 3
    assert found.settings == {"recipe": ("one", "two"), "learning_rate": (1e-3, 4e-3), "method": ("plain", "pulled")}
    last = found.cells[-1]
    assert (last.settings, last.seed) == ({"recipe": "two", "learning_rate": 4e-3, "method": "pulled"}, 2)
    recipe = last.recipe
    assert (recipe.rounds, recipe.client.optim, recipe.client.learning_rate, recipe.seed) == (7, "sgd", 4e-3, 2)
    assert (recipe.method, recipe.client.prox_mu, recipe.adapter.lora_r) == ("fedprox", 0.5, 16)
    assert found.cells[0].recipe.method == "fedavg" and found.cells[0].recipe.client.prox_mu == 0.0
    assert last.label == "two, learning_rate 0.004, pulled, seed 2"


def test_what_is_left_out_is_what_the_rules_name(suite: Callable[..., Suite]) -> None:
    found = suite(SUITE + "exclude:\n- {method: pulled, learning_rate: 0.001}\n- {seed: [1, 2], method: plain}\n")
    left = {(cell.settings["learning_rate"], cell.settings["method"], cell.seed) for cell in found.cells}
    assert left == {(1e-3, "plain", 0), (4e-3, "plain", 0), *((4e-3, "pulled", seed) for seed in (0, 1, 2))}


def test_recipes_may_be_named_and_lie_beside_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.yaml").write_text(BASE)
    (tmp_path / "there" / "s.yaml").write_text("suite: s\nbase: {a: mine.yaml, b: builtin_code}\nseeds: 3\n")
    monkeypatch.chdir(tmp_path)
    found = read_suite_file("there/s.yaml")
    assert [(cell.settings["recipe"], cell.recipe.model, cell.seed) for cell in found.cells] == [
        ("a", "m", 3),
        ("b", "builtin", 3),
    ]
    assert names_suite("there/s.yaml") and not names_suite("there/mine.yaml")


def test_another_kind_of_adapter_keeps_what_it_has_too_and_leaves_the_rest(suite: Callable[..., Suite]) -> None:
    cells = suite("suite: s\nbase: one.yaml\ngrid: {adapter.kind: [dora, ia3]}\nseeds: 0\n").cells
    found = [(one.kind, one.lora_r, one.lora_dropout) for one in (cell.recipe.adapter for cell in cells)]
    assert found == [("dora", 16, 0.1), ("ia3", None, None)]
    text = "suite: s\nbase: one.yaml\ngrid:\n  adapter: {mine: {adapter: {lora_r: 4, kind: dora}}}\nseeds: 0\n"
    mine = suite(text).cells[0].recipe.adapter
    assert (mine.kind, mine.lora_r, mine.lora_dropout) == ("dora", 4, 0.1)


def test_null_takes_back_what_the_recipe_says(suite: Callable[..., Suite]) -> None:
    found = suite("suite: s\nbase: one.yaml\nset: {lora_r: null, local_steps: null, local_epochs: 2}\nseeds: 0\n")
    recipe = found.cells[0].recipe
    assert (recipe.adapter.lora_r, recipe.local_steps, recipe.local_epochs) == (8, None, 2)


def test_which_settings_may_be_compared(suite: Callable[..., Suite]) -> None:
    found = suite(
        "suite: s\nbase: one.yaml\nseeds: 0\ngrid:\n  lora_r: [4, 8]\n  data.path: [a.jsonl, b.jsonl]\n"
        "  split: {even: {split.kind: iid}, skewed: {split: {kind: dirichlet, alpha: 0.1}}}\n"
    )
    assert found.same_tests == ("lora_r", "split")  # other data has other tests


# ---- overrides


def test_overrides_reach_the_suite_or_every_cell(suite: Callable[..., Suite]) -> None:
    found = suite(SUITE, "seeds=4,5", "limits.jobs=2", "minutes=3", "rounds=2", "--output-dir=x", "grid.method=fedavg")
    assert {cell.seed for cell in found.cells} == {4, 5} and len(found.cells) == 4
    assert (found.limits.jobs, found.limits.minutes, str(found.output_dir)) == (2, 3.0, "x")
    assert {cell.recipe.rounds for cell in found.cells} == {2}
    assert {cell.recipe.output_dir for cell in found.cells} == {"runs/one"}
    assert str(suite(SUITE).run_store) == "runs/small/runs" and str(suite(SUITE, "run_store=r").run_store) == "r"


def test_a_key_of_the_grid_is_not_overridden_silently(suite: Callable[..., Suite]) -> None:
    text = problems(suite, SUITE, "client.learning_rate=1", "seed=3", "lora_rr=3")
    assert "override client.learning_rate=1  client.learning_rate 1: the grid varies it: grid.learning_rate=..." in text
    assert "override seed=3  seed 3: has no place in a cell: seeds: [...] has them" in text
    assert "did you mean adapter.lora_r?" in text and "3 problems" in text


def test_what_is_written_down_reads_back_as_the_same_suite(suite: Callable[..., Suite], tmp_path: Path) -> None:
    text = SUITE + "exclude:\n- {method: pulled, learning_rate: 1e-3}\nmetrics: [loss]\nlimits: {jobs: 2}\n"
    found = suite(text, "rounds=3", 'data.path="a, b: [c].jsonl"', "seeds=[7]")
    (tmp_path / "again" / "base").mkdir(parents=True)
    for name, recipe in found.bases.items():
        (tmp_path / "again" / "base" / f"{name}.yaml").write_text(recipe)
    (tmp_path / "again" / "suite.yaml").write_text(found.resolved)
    again = read_suite_file("again")
    assert [(cell.settings, cell.seed, cell.recipe) for cell in again.cells] == [
        (cell.settings, cell.seed, cell.recipe) for cell in found.cells
    ]
    assert (again.metrics, again.limits, again.resolved) == (found.metrics, found.limits, found.resolved)
    assert again.cells[0].recipe.data.path == "a, b: [c].jsonl" and again.cells[0].recipe.rounds == 3


# ---- objections


def test_every_objection_at_once_with_its_line(suite: Callable[..., Suite]) -> None:
    text = problems(
        suite,
        "suite: s\n"
        "base: [one.yaml, on.yaml]\n"
        "set:\n"
        "  rounds: 0\n"
        "  client: {learning_rte: 3}\n"
        "grid:\n"
        "  optim: [adamw, sdg]\n"
        "exclude:\n"
        "- {optim: adamm}\n"
        "seeds: [0, 1, 1]\n"
        "metrics: [score, los]\n"
        "limits: {jobs: 0, minuts: 3}\n"
        "lora_r: 3\n",
    )
    assert text.startswith("s.yaml: 10 problems\n")
    for part in (
        "line 2  base: on.yaml: no such recipe, did you mean one.yaml?",
        "line 4  set.rounds 0: must be >= 1\n",
        "line 5  set.client.learning_rte 3: no such key, did you mean learning_rate?\n",
        "line 7  grid.optim sdg: expected one of adamw, adam, sgd, momentum, yogi, adagrad; did you mean sgd?\n",
        "line 9  exclude: optim has no adamm, did you mean adamw?",
        "line 10  seeds: 1 is given twice",
        "line 11  metrics: los is no metric, did you mean loss?",
        "line 12  limits.jobs 0: must be >= 1",
        "line 12  limits.minuts: no such key, did you mean minutes?",
        "line 13  lora_r: no such key in a suite: a recipe's keys stand under set",
    ):
        assert part in text


def test_a_wrong_recipe_is_told_once_with_its_own_line(suite: Callable[..., Suite]) -> None:
    Path("one.yaml").write_text(BASE + "lora_rr: 3\n")
    text = problems(suite, SUITE)
    assert "line 2  base one.yaml: line 5  lora_rr 3: no such key, did you mean adapter.lora_r?" in text
    assert "1 problem\n" in text


def test_cells_with_a_problem_are_told_by_what_they_share(suite: Callable[..., Suite]) -> None:
    Path("two.yaml").write_text(BASE + "client: {momentum: 0.5}\n")
    text = problems(
        suite, "suite: s\nbase: [one.yaml, two.yaml]\ngrid:\n  optim: [momentum, sgd]\n  rounds: [1, 2]\nseeds: 0\n"
    )
    told = "base two.yaml: line 5  client.momentum 0.5: would have no effect, optim is sgd; momentum has it"
    assert f"{told} [in cells with two, sgd]" in text and "1 problem\n" in text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: one.yaml\ngrid: {}\n", "suite: missing: the suite's name"),
        ("suite: s\n", "base: missing: a recipe, or a list of them"),
        ("suite: s\nbase: [one.yaml, one.yaml]\n", "one is there twice: name them"),
        ("suite: s\nbase: one.yaml\nseeds: [-1]\n", "-1 is no seed"),
        ("suite: s\nbase: one.yaml\nseeds: []\n", "must not be empty"),
        ("suite: s\nbase: one.yaml\nseeds: [a]\n", "line 3  seeds [a]: expected a whole number"),
        ("suite: s\nbase: one.yaml\ngrid: {lora_r: []}\n", "grid.lora_r: has no values"),
        ("suite: s\nbase: one.yaml\ngrid: {lora_r: [4, 4]}\n", "grid.lora_r: 4 is there twice"),
        ("suite: s\nbase: one.yaml\ngrid: {lora_rr: [4]}\n", "did you mean adapter.lora_r?"),
        ("suite: s\nbase: one.yaml\ngrid: {split: [a]}\n", "expected one of"),
        ("suite: s\nbase: one.yaml\ngrid: {evaluate: [a]}\n", "is a block: vary one of its keys"),
        ("suite: s\nbase: one.yaml\ngrid: {seed: [1]}\n", "seeds of the suite has these"),
        ("suite: s\nbase: one.yaml\ngrid: {recipe: [a]}\n", "base of the suite has these"),
        ("suite: s\nbase: one.yaml\ngrid: {a: {x: {output_dir: y}}}\n", "has no place in a cell"),
        (
            "suite: s\nbase: one.yaml\nset: {lora_r: 4}\ngrid: {lora_rank: [4]}\n",
            "adapter.lora_r is said by set.lora_r",
        ),
        ("suite: s\nbase: one.yaml\ngrid: {a: {x: {lora_r: 4}}, lora_r: [8]}\n", "is said by grid.a as well"),
        ("suite: s\nbase: one.yaml\nexclude: [{seed: 7}]\n", "seed has no 7, there are 0, 1, 2"),
        ("suite: s\nbase: one.yaml\nexclude: [{}]\n", "names nothing, so it would leave out everything"),
        ("suite: s\nbase: one.yaml\nexclude: [{recipe: one}]\n", "nothing is left to run"),
        ("suite: s\nbase: one.yaml\nset: [1]\n", "set [1]: expected recipe keys with values"),
        ("suite: s\nbase: one.yaml\nset: {}\nset: {}\n", "given twice, on line 3 as well"),
        ("suite: s\nbase: one.yaml\nreport: perhaps\n", "expected true or false"),
        ("suite: s\nbase: one.yaml\ngird: {}\n", "line 3  gird: no such key, did you mean grid?"),
        ("suite: s\nbase: s.yaml\n", "s.yaml is a suite, and a suite is made of recipes"),
        ("suite: [\n", "not YAML"),
        ("- suite\n", "expected keys and values at the top"),
    ],
)
def test_what_is_wrong_is_told_and_how_to_mend_it(suite: Callable[..., Suite], text: str, part: str) -> None:
    Path("s.yaml").write_text(SUITE)
    assert part in problems(suite, text)


def test_a_rule_that_leaves_out_nothing_is_a_mistake(suite: Callable[..., Suite]) -> None:
    text = SUITE + "exclude:\n- {method: pulled}\n- {method: pulled, learning_rate: 1e-3}\n"
    assert len(suite(text).cells) == 6  # both name cells, the second none that the first has not
    only = problems(
        suite, SUITE.replace("seeds: [0, 1, 2]", "seeds: [0]") + "exclude: [{seed: 0, method: [plain, pulled]}]\n"
    )
    assert "nothing is left to run" in only


# ---- the files


def test_a_recipe_command_says_that_a_suite_is_none(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SUITE)
    with pytest.raises(UserError, match="is a suite of several runs, and this takes a recipe of one"):
        read_recipe(tmp_path / "s.yaml")


def test_schema_is_current_and_completes_recipe_keys() -> None:
    assert (ROOT / "recipes" / "suite.schema.json").read_text(encoding="utf-8") == suite_schema_text(), (
        "run tools/write_recipe_docs.py"
    )
    schema = json.loads(suite_schema_text())
    recipe = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    for key, one in schema["properties"]["set"]["properties"].items():
        place = one["$ref"].removeprefix("recipe.schema.json#/")
        found = recipe
        for part in place.split("/"):
            found = found[part]  # there is such a key
        assert key == "model" or found
    assert "client.learning_rate" in schema["properties"]["grid"]["properties"]
    assert "seed" not in schema["properties"]["set"]["properties"]
    assert all(one.get("description") for one in schema["properties"].values())


@pytest.mark.parametrize("name", sorted(packaged_suites()))
def test_packaged_suites_are_sound_and_name_the_schema(name: str) -> None:
    path = packaged_suites()[name]
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=../suite.schema.json"
    assert second.startswith("# ") and len(second) > 20
    assert read_suite_file(name).cells


def test_reading_a_suite_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("suite: s\nbase: builtin_code\nset: {rounds: 1}\n")
    code = (
        "import sys; from fedloom.study.suite import read_suite_file; read_suite_file('s.yaml');"
        "import fedloom.study.suite_run, fedloom.study.compare;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_packaged_names_have_their_folder() -> None:
    assert all(name.startswith("suites/") for name in packaged_suites())
    assert not any(name.startswith("suites/") for name in packaged_recipes())
    assert "builtin_code" in packaged_recipes()
