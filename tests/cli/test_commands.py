"""The commands that need neither a model nor a run: words, streams, exit codes, messages."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedloom.cli import app as application
from fedloom.cli import main
from fedloom.errors import RefusedByPolicy, RunError, TimeoutOrTooFewClients
from fedloom.study.load import packaged_recipes, packaged_suites, read_recipe
from fedloom.study.methods import METHODS

GOOD = "model: m\ndata: {path: d.jsonl}\nlocal_steps: 4\n"
HELP = "from fedloom.cli import main; main(['--help'])"
HEAVY = ("torch", "transformers", "datasets", "matplotlib")


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def fedloom(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Return a function that runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)

    def run(*words: str) -> Said:
        capsys.readouterr()
        code = main(words)
        return Said(code, *capsys.readouterr())

    return run


def write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


# ---- the program


@pytest.mark.parametrize("words", [["--help"], ["validate", "good.yaml"], ["ls"], ["schema"], ["cat", "good.yaml"]])
def test_light_commands_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    write(str(tmp_path / "good.yaml"), GOOD)
    code = (
        "import sys; from fedloom.cli import main; code = main(sys.argv[1:]);"
        f"sys.stderr.write(repr([m for m in {HEAVY} if m in sys.modules])); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stderr.endswith("[]")
    assert done.stdout


def test_help_imports_little_besides_the_parser_of_command_lines() -> None:
    """What is imported decides how long `--help` takes, on every machine; benchmarks/start measures it."""
    code = f"import sys, typer; before = set(sys.modules); {HELP}; print('|', *sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.rpartition("|")[2].split()
    assert len(found) < 40, found
    slow = {"importlib.metadata", "importlib.resources", "asyncio", "rich", "numpy", "pydantic", "yaml", "sqlite3"}
    assert not slow & set(found)


def test_a_run_imports_what_its_model_does_and_pydantic() -> None:
    """Up to the first step, all that is large is what transformers itself brings for a model and a tokenizer."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM;"
        "AutoModelForCausalLM, AutoTokenizer; before = set(sys.modules); import fedloom.study.run;"
        "from fedloom.models.load import load_base; load_base('builtin'); print('|', *set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [name for name in done.stdout.rpartition("|")[2].split() if name.partition(".")[0] != "fedloom"]
    small = {*sys.stdlib_module_names, "pydantic", "pydantic_core", "annotated_types", "typing_inspection"}
    assert sorted(name for name in found if name.partition(".")[0] not in small) == []
    assert len(found) < 90, sorted(found)


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    commands = ("run", "demo", "validate", "plan", "preview", "ls", "cp", "cat", "init", "eval", "chat", "generate",
                "export", "report", "watch", "env", "schema", "compare", "cache", "explain")  # fmt: skip
    listed = done.stdout.partition("Commands:")[2].split("\n")
    assert sorted(line.split()[0] for line in listed if line.strip()) == sorted(commands)
    assert not any("..." in line for line in listed), "a command's line is too long for a terminal of 80 columns"


def test_unknown_commands_and_options_name_the_nearest(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom("valdate", "good.yaml")
    assert (code, out) == (2, "")
    assert err == "fedloom: no such command: valdate; did you mean 'validate'?\n  fedloom --help\n  [cli.command]\n"
    code, out, err = fedloom()
    assert (code, out) == (2, "") and "fedloom demo" in err and len(err.splitlines()) == 3
    code, out, err = fedloom("ls", "--formt", "json")
    assert (code, out) == (2, "") and "--format" in err and "Usage" not in err
    code, out, err = fedloom("cp")
    assert (code, out) == (2, "") and "missing argument" in err and "Usage" not in err
    code, out, err = fedloom("ls", "--format", "xml")
    assert (code, out) == (2, "") and "json" in err


def test_version(fedloom: Callable[..., Said]) -> None:
    assert fedloom("--version").out.startswith("fedloom ")


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (RunError("no finite loss", "lower it", "run.loss"), 1, "fedloom: no finite loss\n  lower it\n  [run.loss]\n"),
        (RunError("stopped", "go on with X", "run.stopped", exit_code=130), 130, "go on with X"),
        (TimeoutOrTooFewClients("two of four clients"), 3, "[clients.too_few]"),
        (RefusedByPolicy("no"), 4, "[policy.refused]"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(28, "No space left on device", "runs/x"), 1, "runs/x: no space left to write"),
        (FileNotFoundError(2, "No such file or directory", "x.bin"), 2, "x.bin: No such file"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("odd"), 1, "unexpected ValueError: odd"),
    ],
)  # fmt: skip
def test_errors_become_messages_and_exit_codes(
    fedloom: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, part: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("fedloom.cli.recipes.read_words", fail)
    done = fedloom("validate", "good.yaml")
    assert done.code == code and part in done.err and done.out == ""
    assert "Traceback" not in done.err
    if isinstance(error, KeyboardInterrupt):
        return
    for words in (["--debug", "validate", "good.yaml"], ["validate", "good.yaml", "--debug"]):
        shown = fedloom(*words)
        assert "Traceback" in shown.err and shown.code == code


def test_debug_may_stand_anywhere(fedloom: Callable[..., Said]) -> None:
    for words in (["--debug", "ls", "x"], ["ls", "--debug", "x"], ["ls", "x", "--debug"]):
        code, _, err = fedloom(*words)
        assert code == 2 and "no such list" in err and "Traceback" in err


def test_the_environment_asks_for_tracebacks(fedloom: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_DEBUG", "1")
    assert "Traceback" in fedloom("validate", "nowhere.yaml").err


def test_a_closed_pipe_is_no_message() -> None:
    code = "import sys; from fedloom.cli import main; sys.exit(main(['schema']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    err = child.stderr.read().decode()
    child.stderr.close()
    assert (child.wait(), err) == (1, "")


# ---- validate


def test_validate_says_all_and_writes_nothing(fedloom: Callable[..., Said], tmp_path: Path) -> None:
    write("bad.yaml", "model: m\nrounds: ten\nadapter: {lora_rnk: 4}\n")
    before = sorted(tmp_path.iterdir())
    code, out, err = fedloom("validate", "bad.yaml", "seed=x")
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "fedloom: bad.yaml: 5 problems"
    for part in (
        "line 2  rounds ten: expected a whole number",
        "line 3  adapter.lora_rnk 4: no such key, did you mean lora_r?",
        "override seed=x  seed x",
        "data.path: missing",
        "local_steps: missing",
        "[recipe.invalid]",
    ):
        assert part in err
    assert sorted(tmp_path.iterdir()) == before


def test_validate_json_is_data_alone(fedloom: Callable[..., Said]) -> None:
    write("bad.yaml", GOOD + "lora_rnk: 4\n")
    code, out, _ = fedloom("validate", "bad.yaml", "--format", "json")
    (problem,) = json.loads(out)["problems"]
    assert code == 2
    assert problem == {"line": 4, "override": None, "key": "lora_rnk", "value": "4", "code": "recipe.unknown_key",
                       "message": "no such key, did you mean adapter.lora_r?"}  # fmt: skip
    code, out, err = fedloom("validate", "good.yaml", "--format", "json", "fraction_fit=1.0")
    assert code == 0 and json.loads(out)["ok"] is True
    assert "note: fraction_fit 1.0: taken as clients_per_round: null" in err


@pytest.mark.parametrize(
    "words",
    [
        ["good.yaml", "client.learning_rate=1e-3"],
        ["good.yaml", "--learning-rate", "1e-3"],
        ["--learning-rate", "1e-3", "good.yaml"],
        ["--client.learning_rate=1e-3", "good.yaml"],
        ["lr=1e-3", "good.yaml"],
        ["--trust-remote-code", "good.yaml", "lr=1e-3"],
    ],
)
def test_words_may_stand_in_any_order(fedloom: Callable[..., Said], words: list[str]) -> None:
    code, out, _ = fedloom("cat", *words, "--format", "json")
    resolved = json.loads(out)
    assert code == 0 and resolved["client"]["learning_rate"] == 1e-3
    assert resolved["trust_remote_code"] is ("--trust-remote-code" in words)


@pytest.mark.parametrize("command", ["validate", "cat", "plan", "preview", "run"])
def test_commands_on_a_recipe_need_exactly_one(fedloom: Callable[..., Said], command: str) -> None:
    assert f"{command} needs a recipe" in fedloom(command).err
    code, _, err = fedloom(command, "good.yaml", "other.yaml")
    assert code == 2 and "takes one recipe, and there are 2: good.yaml, other.yaml" in err
    code, _, err = fedloom(command, "good.yaml", "--lora-r")
    assert code == 2 and "--lora-r needs a value" in err
    code, _, err = fedloom(command, "goood.yaml")
    assert code == 2 and "did you mean good.yaml?" in err


@pytest.mark.parametrize("command", ["run", "plan", "preview"])
def test_a_bad_recipe_stops_a_command_before_anything_is_written(
    fedloom: Callable[..., Said], tmp_path: Path, command: str
) -> None:
    code, out, err = fedloom(command, "good.yaml", "rounds=0")
    assert (code, out) == (2, "") and "override rounds=0  rounds 0: must be >= 1" in err
    assert [path.name for path in tmp_path.iterdir()] == ["good.yaml"]


# ---- ls, cp, cat, schema, env


def test_ls_lists_what_there_is(fedloom: Callable[..., Said]) -> None:
    code, out, _ = fedloom("ls", "recipes", "--format", "json")
    recipes = json.loads(out)
    names = [entry["name"] for entry in recipes]
    assert code == 0 and names == [*sorted(packaged_recipes()), *sorted(packaged_suites())]
    assert all(entry["about"] and entry["time"] for entry in recipes)
    assert [entry["name"] for entry in json.loads(fedloom("ls", "methods", "--format", "json").out)] == list(METHODS)
    shelves = json.loads(fedloom("ls", "--format", "json").out)
    assert list(shelves) == ["recipes", "methods", "data", "tasks", "scores", "runs"]
    assert fedloom("ls", "runs").err == "no runs here; fedloom demo makes one\n"
    code, _, err = fedloom("ls", "method")
    assert code == 2 and "did you mean 'methods'?" in err


def test_ls_runs_shows_state_and_scores(fedloom: Callable[..., Said], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(GOOD)
    assert "not finished  go on: fedloom run --resume runs/a" in fedloom("ls", "runs").out
    result = {"status": "done", "arms": {"base": {"score": 0.125, "loss": 2.0}, "local": {"score": None, "loss": 1.5}}}
    (run / "result.json").write_text(json.dumps(result))
    assert "runs/a  done  base 12.5 %, local loss 1.500" in fedloom("ls", "runs").out
    (run / "result.json").write_text("{")
    assert "runs/a  damaged" in fedloom("ls", "runs").out


def test_cp_copies_once_and_names_the_schema_from_there(fedloom: Callable[..., Said], tmp_path: Path) -> None:
    code, out, _ = fedloom("cp", "own_data")
    assert (code, out) == (0, "own_data.yaml\n")
    first = (tmp_path / "own_data.yaml").read_text().splitlines()[0]
    schema = tmp_path / first.partition("$schema=")[2]
    assert json.loads(schema.read_text())["title"] == "fedloom recipe"
    assert read_recipe(tmp_path / "own_data.yaml").recipe.name == "own_data"
    code, _, err = fedloom("cp", "own_data.yaml")
    assert code == 2 and "own_data.yaml exists already; nothing was written" in err
    (tmp_path / "folder").mkdir()
    assert fedloom("cp", "own_data", "folder").out == "folder/own_data.yaml\n"
    assert "no such folder" in fedloom("cp", "own_data", "nowhere/x.yaml").err
    assert "did you mean 'own_data'?" in fedloom("cp", "own_dat").err


def test_cat_reads_back_as_the_same_recipe(fedloom: Callable[..., Said]) -> None:
    code, out, _ = fedloom("cat", "good.yaml", "method=fedyogi")
    assert code == 0 and "server_optim: yogi" in out and "server_tau: 0.001" in out
    write("again.yaml", out)
    assert fedloom("cat", "again.yaml").out == out


def test_schema_of_one_key(fedloom: Callable[..., Said]) -> None:
    assert json.loads(fedloom("schema").out)["title"] == "fedloom recipe"
    assert json.loads(fedloom("schema", "--field", "lora_rank").out)["key"] == "adapter.lora_r"
    assert "lora_r" in json.loads(fedloom("schema", "--field", "adapter").out)["properties"]
    assert json.loads(fedloom("schema", "--field", "rounds").out)["minimum"] == 1
    code, _, err = fedloom("schema", "--field", "lora_rr")
    assert code == 2 and "did you mean adapter.lora_r?" in err
    assert "which one: data.limit, evaluate.limit?" in fedloom("schema", "--field", "limit").err


def test_env_tells_versions_and_machine(fedloom: Callable[..., Said]) -> None:
    code, out, err = fedloom("env", "--format", "json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert {"torch", "transformers"} <= set(facts["packages"])
    assert facts["threads"] >= 1 and facts["cores"] >= 1 and facts["cpu_bf16"] in ("yes", "no")
    assert set(facts["extras"]) == {"data", "test", "dev"}
    assert "packages" in fedloom("env").out


# ---- run --resume, watch, report on what is not there


def test_resume_takes_no_other_words(fedloom: Callable[..., Said], tmp_path: Path) -> None:
    code, _, err = fedloom("run", "--resume", "runs/x")
    assert code == 2 and "no run folder runs/x" in err
    code, _, err = fedloom("run", "--resume", "runs/x", "seed=1")
    assert code == 2 and "goes on with its own recipe, so seed=1 has no place here" in err
    code, _, err = fedloom("run", "--resume", "runs/x", "--smoke")
    assert code == 2 and "--smoke has no place" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["watch", "report"])
def test_commands_on_a_run_say_which_there_are(fedloom: Callable[..., Said], tmp_path: Path, command: str) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(GOOD)
    code, out, err = fedloom(command, "runs/b")
    assert (code, out) == (2, "") and "runs/a" in err and "[run.missing]" in err


def test_application_lists_no_command_twice() -> None:
    names = [command.name or command.callback.__name__ for command in application.app.registered_commands]  # type: ignore[union-attr]
    assert len(names) == len(set(names))
