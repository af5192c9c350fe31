"""Validation, benchmarks, best states, early stopping and equal samples inside whole runs; killed and resumed."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.study.tiny_runs import kill_at, outcome, recipe

from fedloom.cli.app import main
from fedloom.errors import RunError, UserError
from fedloom.evaluate.tasks import TASKS
from fedloom.evaluate.tasks.base import Choose, Item, Task, Write
from fedloom.study import checkpoint
from fedloom.study.run import run_recipe
from fedloom.study.session import _chosen_by
from fedloom.study.tuned import evaluate_run


def load(source: Path | None, settings: Any) -> list[Item]:
    if source is None:
        raise UserError("toy: its file is not on this machine", code="data.missing")
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    made = []
    for n, line in enumerate(lines):
        made.append(Item(f"w{n}", Write(line["q"], 4), line["a"]))
        made.append(Item(f"c{n}", Choose(line["q"], ("apple", "stone", "river")), n % 3))
    return made


def judge(items: Any, answers: Any) -> list[dict[str, float]]:
    """Figures that change with the model, however little it has learned."""
    found = []
    for item, answer in zip(items, answers, strict=True):
        if answer.texts:
            found.append({"letters": sum(map(ord, answer.texts[0])) % 97 / 97})
        else:
            share = torch.tensor(answer.loglikelihoods).softmax(0)[item.reference]
            found.append({"likelihood": float(share)})
    return found


def summarise(items: Any, scores: Any) -> dict[str, float]:
    def mean(metric: str) -> float:
        values = [one[metric] for one in scores if metric in one]
        return math.fsum(values) / len(values)

    return {"letters": mean("letters"), "likelihood": mean("likelihood")}


TOY = Task("toy", "Toy", "likelihood", "nowhere", load, judge, summarise)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", f"{__name__}:TOY")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.jsonl"
    path.write_text("".join(json.dumps({"q": f"Say {n}:", "a": str(n)}) + "\n" for n in range(4)))
    return path


def full(home: Path, items: Path, out: Path, **values: Any) -> Any:
    """Everything at once: the patience is used up in round 2, as nothing is better by so much."""
    evaluate = {
        "eval_rounds": 1,
        "score": "exact",
        "max_new_tokens": 3,
        "limit": 2,
        "score_validation": True,
        "best_by": "loss_decile",
        "early_stopping_patience": 2,
        "early_stopping_threshold": 10.0,
        "tasks": ["toy"],
        "task_paths": {"toy": str(items)},
        "task_limit": 3,
        "task_rounds": 1,
        "task_clients": 2,
        **values.pop("evaluate", {}),
    }
    return recipe(home, out, rounds=4, method="fedavg", evaluate=evaluate, **values)


@pytest.fixture(scope="module")
def whole(home: Path, items: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "toy", f"{__name__}:TOY")
        return run_recipe(full(home, items, tmp_path_factory.mktemp("whole") / "run"))


def read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return json.loads((run / "result.json").read_text()), lines


def test_every_arm_stops_early_and_its_best_state_is_the_outcome(whole: Path) -> None:
    result, lines = read(whole)
    assert list(result["outcomes"]) == ["local", "federated", "global"]
    for arm, ended in result["outcomes"].items():
        own = [line for line in lines if line["arm"] == arm]
        assert [line["round"] for line in own] == [0, 1, 2]
        assert (ended["rounds"], ended["planned_rounds"], ended["stopped_early"]) == (2, 4, True)
        worst = [max(line["val_loss_per_client"].values()) for line in own]  # a tenth of three clients is one
        assert ended["best_value"] == min(worst)
        assert ended["round"] == ended["best_round"] == worst.index(min(worst))
        assert ended["best_by"] == "loss_decile"
        assert result["costs_per_arm"][arm]["rounds"] == 2


def test_validation_is_scored_per_client_and_round_0_is_the_same_for_all(whole: Path) -> None:
    _, lines = read(whole)
    for line in lines:
        assert set(line["score_per_client"]) == {"a", "b", "c"}
        assert line["score"] is not None
    untouched = [line for line in lines if line["round"] == 0]
    assert len(untouched) == 4
    assert len({json.dumps(line["val_loss_per_client"]) for line in untouched}) == 1
    assert len({json.dumps(line["tasks"]) for line in untouched}) == 1


def test_benchmarks_have_figures_each_round_and_files_of_items(whole: Path) -> None:
    result, lines = read(whole)
    for arm, figures in result["tasks"].items():
        own = {line["round"]: line["tasks"] for line in lines if line["arm"] == arm}
        assert figures == own[result["outcomes"][arm]["round"] if arm != "base" else 0]
        assert set(figures["toy"]) == {"letters", "likelihood"}
    assert set(result["tasks"]) == {"base", "local", "federated", "global"}
    assert result["tasks"]["federated"] != result["tasks"]["base"], "the figures do not depend on the model"
    files = sorted(str(path.relative_to(whole / "eval")) for path in (whole / "eval").rglob("*.jsonl"))
    assert [name for name in files if name.startswith("base")] == ["base/round_00000/toy.jsonl"]
    assert [name for name in files if name.startswith("local")] == [
        f"local/round_0000{r}/toy.client_000{c}.jsonl" for r in (1, 2) for c in (0, 1)
    ]
    assert [name for name in files if name.startswith("fed")] == [f"federated/round_0000{r}/toy.jsonl" for r in (1, 2)]
    head, *rest = (whole / "eval" / "federated" / "round_00001" / "toy.jsonl").read_text().splitlines()
    assert json.loads(head)["model"] == {"arm": "federated", "round": 1}
    assert len(rest) == 3, "task_limit"
    each = [
        json.loads((whole / "eval" / f).read_text().splitlines()[0])["summary"]
        for f in files
        if "local/round_00002" in f
    ]
    mean = {metric: sum(one[metric] for one in each) / 2 for metric in each[0]}
    assert {line["round"]: line["tasks"] for line in lines if line["arm"] == "local"}[2]["toy"] == pytest.approx(mean)


def test_arms_are_compared_after_the_samples_that_a_local_model_sees(whole: Path) -> None:
    result, lines = read(whole)
    found = result["equal_samples"]
    assert found["samples"] == 4 * 2 * 2, "rounds x steps x rows of a step"
    base, local, federated, pooled = (found["arms"][arm] for arm in ("base", "local", "federated", "global"))
    assert (base["round"], base["samples"], base["result"]) == (0, 0, result["arms"]["base"])
    seen = {(line["arm"], line["round"]): line["samples_seen"] for line in lines if line["round"]}
    assert seen[("federated", 1)] == 12 and seen[("federated", 2)] == 24 and seen[("local", 2)] == 8
    assert seen[("global", 2)] == 24
    for arm, one in (("federated", federated), ("global", pooled)):
        # stopped after round 2, in which 16 were passed: the best of its states is the outcome, here and there
        assert one["round"] == result["outcomes"][arm]["round"]
        assert one["samples"] == seen[(arm, one["round"])]
        assert one["result"] == result["arms"][arm]
    assert local["samples"] == seen[("local", local["round"])]


def test_costs_of_every_arm(whole: Path) -> None:
    result, lines = read(whole)
    arms = result["costs_per_arm"]
    for arm in ("local", "federated", "global"):
        costs = arms[arm]
        own = [line for line in lines if line["arm"] == arm and line["round"]]
        assert costs["samples"] == sum(line["samples"] for line in own) == 24
        assert costs["samples_per_model"] == (8 if arm == "local" else 24)
        assert 0 < costs["flops"] <= costs["flops_padded"]
        assert costs["padded_tokens"] >= costs["train_tokens"] > 0
        assert costs["evaluate_seconds"] > 0 and costs["checkpoint_seconds"] > 0
        assert costs["communication_seconds"] == 0.0
        assert costs["peak_memory_bytes"] > 10_000_000
        assert costs["trainable_share"] == pytest.approx(
            result["costs"]["trainable_parameters"] / result["costs"]["total_parameters"]
        )
    assert arms["base"]["flops"] == arms["base"]["samples"] == arms["base"]["trainable_share"] == 0
    assert arms["base"]["evaluate_seconds"] > 0
    assert result["costs"]["peak_memory_bytes"] >= max(costs["peak_memory_bytes"] for costs in arms.values())
    assert result["costs"]["prepare_seconds"] > 0
    # the same formula by hand, with the rows' own lengths: F and G of all linear layers, two targets a layer
    assert arms["federated"]["flops"] == pytest.approx(arms["local"]["flops"], rel=0.3)


POINTS = [
    "federated: toy answers 2",  # in the middle of a benchmark
    "after line federated 2",  # stopped early, its checkpoint is not there yet
    "federated: test 3",  # stopped early, and its best state is being tested
    "writing 8",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_it_stops_at_the_same_round_with_the_same_best_state(
    whole: Path,
    home: Path,
    items: Path,
    tmp_path: Path,
    point: str,
) -> None:
    told = full(home, items, tmp_path / "run")
    assert kill_at(told, point) == -signal.SIGKILL
    run_recipe(told, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)

    def files(run: Path) -> list[Path]:
        return sorted(path.relative_to(run) for path in (run / "eval").rglob("*") if path.is_file())

    assert files(tmp_path / "run") == files(whole)


def test_killed_while_testing_after_equal_samples_gives_the_same_comparison(home: Path, tmp_path: Path) -> None:
    told = recipe(home, tmp_path / "run", arms=["local", "federated"])
    plain = run_recipe(told.model_copy(update={"output_dir": str(tmp_path / "plain")}))
    result, _ = read(plain)
    assert result["equal_samples"]["samples"] == 12
    compared = result["equal_samples"]["arms"]["federated"]
    assert (compared["round"], compared["samples"]) == (1, 12)
    assert compared["result"]["loss"] != result["arms"]["federated"]["loss"]
    assert result["equal_samples"]["arms"]["local"]["result"] == result["arms"]["local"]
    assert kill_at(told, "federated: test after 12 samples 3") == -signal.SIGKILL
    run_recipe(told, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(plain)


def test_a_run_that_makes_the_model_worse_gives_back_the_untouched_one(home: Path, tmp_path: Path) -> None:
    worse = {"learning_rate": 3.0, "optim": "adamw", "lr_scheduler_type": "constant"}
    for export in ("best", "last"):
        run = run_recipe(
            recipe(
                home,
                tmp_path / export,
                arms=["base", "federated"],
                rounds=2,
                method="fedavg",
                client=worse,
                checkpoint={"export": export},
            )
        )
        result, lines = read(run)
        assert lines[-1]["val_loss"] > lines[0]["val_loss"] + 0.01, "it was to get worse"
        ended = result["outcomes"]["federated"]
        assert (ended["rounds"], ended["best_round"], ended["stopped_early"]) == (2, 0, False)
        adapter = load_file(run / "adapter" / "adapter_model.safetensors")
        moved = max(float(leaf.abs().max()) for name, leaf in adapter.items() if "lora_B" in name)
        if export == "best":
            assert ended["round"] == 0 and moved == 0.0
            assert result["arms"]["federated"]["loss"] == pytest.approx(result["arms"]["base"]["loss"])
        else:
            assert ended["round"] == 2 and moved > 0
            assert result["arms"]["federated"]["loss"] > result["arms"]["base"]["loss"]
        assert checkpoint.best_round(run / "checkpoints" / "federated") == 0, "the best one is always kept"
        both = {which: evaluate_run(run, checkpoint=which).outcome for which in ("best", "last")}
        assert both["best"]["loss"] == pytest.approx(result["arms"]["base"]["loss"])
        assert both[export]["loss"] == pytest.approx(result["arms"]["federated"]["loss"])
        assert both["last"]["loss"] > both["best"]["loss"]


def test_a_checkpoint_of_a_run_that_was_killed_can_be_exported_and_asked(
    home: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    kill_at(recipe(home, run, arms=["federated"], rounds=3), "after line federated 3")
    assert main(["export", str(run), str(tmp_path / "out"), "--checkpoint", "last"]) == 0
    wanted = load_file(run / "checkpoints" / "federated" / "round_00002" / "state.safetensors")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(found) == 2 * 2 * 2, "layers, targets, factors"
    for name, leaf in found.items():
        assert torch.equal(leaf, wanted[f"params/{name.removeprefix('base_model.model.')}"])
    asked = ["eval", str(run), "--tasks", f"toy={items}", "--limit", "2", "--threads", "1"]
    assert main([*asked, "--checkpoint", "last"]) == 0
    assert [path.name for path in (run / "eval" / "last").glob("*.jsonl")] == ["toy_limit2.jsonl"]
    assert main(["generate", str(run), "Say", "--checkpoint", "best"]) == 0
    assert main([*asked, "--checkpoint", "best", "--base"]) == 2
    assert main(["export", str(home / "model"), str(tmp_path / "no"), "--checkpoint", "best"]) == 2
    assert "has no checkpoints" in capsys.readouterr().err


def test_without_validation_rows_the_last_state_is_the_best_and_it_is_said(home: Path, tmp_path: Path) -> None:
    told = recipe(home, tmp_path / "run", arms=["federated"], rounds=2, data={"val_set_size": 0})
    result, lines = read(run_recipe(told))
    ended = result["outcomes"]["federated"]
    assert (ended["best_by"], ended["best_round"], ended["best_value"], ended["round"]) == ("last", 2, None, 2)
    assert all(line["val_loss"] is None for line in lines)
    assert checkpoint.best_round(tmp_path / "run" / "checkpoints" / "federated") == 2


def test_a_benchmark_metric_may_choose_without_validation_rows(home: Path, items: Path, tmp_path: Path) -> None:
    told = full(
        home,
        items,
        tmp_path / "run",
        arms=["federated"],
        data={"val_set_size": 0},
        evaluate={
            "best_by": "toy/likelihood",
            "task_clients": None,
            "early_stopping_patience": 1,
            "score_validation": False,
        },
    )
    result, lines = read(run_recipe(told))
    values = [line["tasks"]["toy"]["likelihood"] for line in lines]
    assert len(values) == 2, "stopped after one evaluation that was not better by 10"
    ended = result["outcomes"]["federated"]
    assert (ended["best_round"], ended["best_value"]) == (values.index(max(values)), max(values))
    wrong = full(
        home,
        items,
        tmp_path / "wrong",
        arms=["federated"],
        evaluate={"best_by": "toy/likelyhood", "task_clients": None},
    )
    with pytest.raises(RunError, match="did you mean 'likelihood'"):
        run_recipe(wrong)


def test_what_cannot_be_measured_is_refused_before_anything_is_written(home: Path, items: Path, tmp_path: Path) -> None:
    for evaluate, words in [
        ({"tasks": ["toy"]}, "its file is not on this machine"),
        (
            {"tasks": ["toy", "boolq"], "task_paths": {"boolq": str(tmp_path / "none.jsonl")}},
            r"2 of evaluate.tasks cannot be run(.|\n)*toy(.|\n)*none.jsonl",
        ),
        ({"tasks": ["toy"], "task_paths": {"toy": str(tmp_path / "none.jsonl")}}, "there is no .*none.jsonl"),
        ({"score": "auto", "best_by": "score", "max_new_tokens": None}, "evaluate.score auto found none"),
    ]:
        with pytest.raises(UserError, match=words):
            run_recipe(recipe(home, tmp_path / "run", evaluate=evaluate))
        assert not (tmp_path / "run").exists()
    nobody = SimpleNamespace(sizes=lambda part: np.zeros(1, dtype=np.int64))
    with pytest.raises(UserError, match="nothing to stop by"):
        _chosen_by(recipe(home, tmp_path / "run", evaluate={"early_stopping_patience": 1}), nobody)


def test_smoke_goes_through_benchmarks_and_equal_samples(home: Path, items: Path, tmp_path: Path) -> None:
    result, _ = read(run_recipe(full(home, items, tmp_path / "run"), smoke=True))
    assert set(result["tasks"]) == {"base", "local", "federated", "global"}
    assert set(result["equal_samples"]["arms"]) == {"base", "local", "federated", "global"}
    assert all(ended["rounds"] == 1 and not ended["stopped_early"] for ended in result["outcomes"].values())
    lines = (tmp_path / "run-smoke" / "eval" / "base" / "round_00000" / "toy.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2


def test_a_personalised_run_puts_its_clients_own_models_to_the_benchmarks(
    home: Path, items: Path, tmp_path: Path
) -> None:
    settings = {"tasks": ["toy"], "task_paths": {"toy": str(items)}, "task_limit": 3, "task_clients": 2}
    told = recipe(home, tmp_path / "run", arms=["base", "federated"], rounds=1, method="fedsa_lora", evaluate=settings)
    result, _ = read(run_recipe(told))
    files = sorted((tmp_path / "run" / "eval" / "federated" / "round_00001").iterdir())
    assert [path.name for path in files] == ["toy.client_0000.jsonl", "toy.client_0001.jsonl"]
    each = [json.loads(path.read_text().splitlines()[0]) for path in files]
    assert [one["model"]["client"] for one in each] == ["a", "b"]
    values = [one["summary"]["likelihood"] for one in each]
    assert len({*values, result["tasks"]["base"]["toy"]["likelihood"]}) == 3, "models are not their clients' own"
    assert result["tasks"]["federated"]["toy"]["likelihood"] == pytest.approx(sum(values) / 2)
