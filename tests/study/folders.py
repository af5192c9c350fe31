"""Run and suite folders made up for the tests of reports, with figures that are plausible and the same each time."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedloom.study.folder import RunFolder
from fedloom.study.result import build_result, check_result, scores
from fedloom.study.suite_result import write_suite

CLIENTS = [f"skill {i}" for i in range(8)]
HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{x$",
    "</text></svg><img src=x onerror=alert(1)>",
    '" onload="x',
    "{{ 7*7 }}",
    "a\x00b\x1b[31m\n",
    "https://example.org/pixel.png",
    "</script><img onerror=alert(1) src=//example.org/x>",
    "--><!--<style>*{display:none}</style>",
    "x" * 3000,
]
T_975 = {2: 12.706, 3: 4.303}  # Student's t, by the number of seeds
LEVELS = {"base": 0.02, "local": 0.12, "federated": 0.85, "global": 0.93}
LOSSES = {"base": 2.31, "local": 1.63, "federated": 0.402, "global": 0.351}


def an_arm(arm: str, clients: Sequence[str], scored: bool = True, level: float | None = None) -> Any:
    level = LEVELS[arm] if level is None else level
    own = {id: level * (0.9 + 0.01 * (i % 10)) if scored else None for i, id in enumerate(clients)}
    common = dict.fromkeys(clients, level if scored else None)
    return {**scores(common, loss=LOSSES[arm]), "own_test": scores(own, loss=LOSSES[arm] * 0.9)}


def arm_costs(arm: str, wire: int = 231_424) -> Any:
    wire = wire if arm == "federated" else 0
    return {
        "bytes_up_per_client_round": wire,
        "bytes_down_per_client_round": wire,
        "train_tokens": 0 if arm == "base" else 800_000,
        "train_seconds": 0 if arm == "base" else 17.5,
        "tokens_per_second": 0 if arm == "base" else 45_714.0,
    }


def a_run(
    path: Path,
    clients: Sequence[str] = CLIENTS,
    arms: Sequence[str] = ("base", "local", "federated", "global"),
    rounds: int = 12,
    done: bool = True,
    scored: bool = True,
    recipe: str = "model: builtin\nseed: 42\n",
    level: float | None = None,
    wire: int = 231_424,
    categories: Sequence[str] = (),
    settings: Any = None,
) -> RunFolder:
    """A run folder. `level` is the federated score, `settings` go into the result's recipe."""
    run = RunFolder.create(path, recipe)
    for arm in arms:
        run.append_round({"arm": arm, "round": 0, "rounds": 0, "val_loss": 2.5, "score": None})
        for n in range(1, rounds + 1) if arm != "base" else ():
            run.append_round(
                {
                    "arm": arm,
                    "round": n,
                    "rounds": 40,
                    "cohort": 8,
                    "clients": 8 - (n == 2),
                    "failed": {clients[0]: "dropped <b>out</b>"} if n == 2 else {},
                    "train_loss": 0.4 + 2 * math.exp(-n / 4),
                    "val_loss": 0.5 + 2 * math.exp(-n / 4) if n % 2 else None,
                    "score": None,
                    "bytes_up_per_client": arm_costs(arm, wire)["bytes_up_per_client_round"],
                    "bytes_down_per_client": arm_costs(arm, wire)["bytes_down_per_client_round"],
                    "tokens": 20_000,
                    "seconds": 0.5,
                    "tokens_per_second": 40_000.0,
                    "slowest": [clients[-1], 1.2],
                    "learning_rate": 1e-3,
                }
            )
        if not done:
            run.write_stage(arm, {"result": an_arm(arm, clients, scored), "costs": arm_costs(arm, wire)})
    if done:
        costs: Any = {
            **arm_costs("federated", wire),
            "peak_memory_bytes": 9e8,
            "trainable_parameters": 57_856,
            "total_parameters": 1_953_120,
        }
        held = [
            {name: 40 * ((i + j) % 4) for j, name in enumerate(categories) if (i + j) % 4} for i in range(len(clients))
        ]
        result = build_result(
            seed=42,
            arms={arm: an_arm(arm, clients, scored, level if arm == "federated" else None) for arm in arms},
            costs=costs,
            costs_per_arm={arm: arm_costs(arm, wire) for arm in arms},
            data={
                "source": "<i>x</i>",
                "rows_read": 6400,
                "notes": ["two words", "and more"],
                "clients": [
                    {"id": id, "train": 640, "test": 96, "categories": own, "lengths": {}}
                    for id, own in zip(clients, held, strict=True)
                ],
            },
            model={"name": "builtin"},
            recipe={"model": "builtin", "seed": 42, **(settings or {})},
            skipped={"rows": {"empty <u>": 3, "cut": 0}},
        )
        run.write_result(result)
    return run


def add_measurements(run: Path) -> None:
    """Put into a run's files what it measures by client, by benchmark task and after equal samples.

    Written as files, as runs of other versions are read: what is not there must not be missed, and what is there be
    shown.
    """
    import json

    result = json.loads((run / "result.json").read_text())
    clients = list(result["arms"]["federated"]["own_test"]["score_per_client"])
    for arm, one in result["arms"].items():
        one["own_test"]["loss_per_client"] = {id: LOSSES[arm] * (0.8 + 0.05 * (i % 10)) for i, id in enumerate(clients)}
        one["perplexity"] = math.exp(one["loss"])
    result["tasks"] = {
        arm: {"gsm8k": {"exact_match": level / 3}, "mmlu": {"accuracy": 0.25 + level / 4, "perplexity": 9.5}}
        for arm, level in LEVELS.items()
    }
    result["equal_samples"] = {
        "samples": 9600,
        "arms": {
            arm: {"round": n, "samples": 9600 + n, "result": an_arm(arm, clients, level=LEVELS[arm] * 0.9)}
            for arm, n in (("local", 12), ("federated", 2), ("global", 2))
        },
    }
    result["outcomes"] = {
        arm: {
            "rounds": 12, "planned_rounds": 40, "stopped_early": True, "best_round": 9, "best_by": "loss",
            "best_value": 0.71, "round": 9,
        }
        for arm in ("local", "federated", "global")
    }  # fmt: skip
    for arm, cost in result["costs_per_arm"].items():
        if arm != "base":
            cost.update(
                samples=76_800, flops_padded=3.9e12, checkpoint_seconds=0.3, peak_memory_of="process",
                samples_per_model=9600, flops=3.2e12, communication_seconds=0.8, evaluate_seconds=6.5,
                peak_memory_bytes=900_000_000, trainable_share=0.0296, rounds=12,
            )  # fmt: skip
    result["data"]["heterogeneity"] = {
        "category": {"js_mean": 0.41, "js_max": 0.52, "tv_mean": 0.3, "tv_max": 0.5, "js_even": 0.03, "tv_even": 0.1},
        "length": {"js_mean": 0.05, "js_max": 0.09, "tv_mean": 0.1, "tv_max": 0.2, "js_even": None, "tv_even": None},
    }
    for place, client in enumerate(result["data"]["clients"]):
        middle = 20 + 5 * (place % 9)
        spread = ((10, 0.5), (25, 0.8), (50, 1), (75, 1.3), (90, 2))
        client["lengths"] = {f"p{share}": int(middle * factor) for share, factor in spread}
    result["data"]["max_length"] = 100
    (run / "result.json").write_text(json.dumps(check_result(result)))
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        if line["val_loss"] is not None and line["arm"] != "base":
            grown = LEVELS[line["arm"]] * (1 - math.exp(-line["round"] / 4))
            line["score"] = grown
            line["score_per_client"] = {id: grown * (0.8 + 0.02 * (i % 10)) for i, id in enumerate(clients)}
            line["val_loss_per_client"] = {
                id: line["val_loss"] * (0.8 + 0.05 * (i % 10)) for i, id in enumerate(clients)
            }
            line["tasks"] = {"gsm8k": {"exact_match": grown / 3}}
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_suite(
    folder: Path,
    recipes: Sequence[str] = ("builtin_code", "builtin_skills"),
    adapters: Sequence[str] = ("lora", "prompt", "p-tuning"),
    arms: Sequence[str] = ("base", "local", "federated", "global"),
    seeds: Sequence[int] = (0, 1, 2),
    failed: int = 0,
    running: int = 0,
) -> Path:
    """A suite folder of recipes x adapters x seeds; the last `failed` cells failed, `running` before them run."""
    draw = random.Random(7)
    folder.mkdir(parents=True)
    metrics: list[Any] = [
        {"name": "score", "title": "score", "unit": "share", "better": "higher"},
        {"name": "loss", "title": "loss", "unit": "nats", "better": "lower"},
        {"name": "tasks.gsm8k.accuracy", "title": "gsm8k accuracy", "unit": "share", "better": "higher"},
    ]
    grid = [{"recipe": recipe, "adapter": adapter} for recipe in recipes for adapter in adapters]
    cells: list[Any] = [
        {
            "id": f"{place:02x}{seed}a7f3c2d1",
            "settings": settings,
            "seed": seed,
            "run": f"runs/{place:02x}{seed}a7f3c2d1",
            "status": "done",
            "seconds": 60.0 + draw.random() * 40,
            "peak_memory_bytes": 900_000_000,
        }
        for place, settings in enumerate(grid)
        for seed in seeds
    ]
    for one in cells[len(cells) - failed :]:
        one.update(status="failed", reason="fedloom: loss is nan <b>in</b> round 3")
    for one in cells[len(cells) - failed - running : len(cells) - failed]:
        one.update(status="running")
    table: list[Any] = []
    values: dict[Any, dict[int, float]] = {}
    for place, settings in enumerate(grid):
        shift = 0.06 * (place % len(adapters)) + 0.04 * (place // len(adapters))
        for arm in arms:
            wire = [941_000, 16_400, 65_500][place % 3] if arm == "federated" else 0
            costs = {
                "bytes_up_per_client_round": wire, "bytes_down_per_client_round": wire, "bytes_up": wire * 240.0,
                "bytes_down": wire * 240.0, "train_seconds": 0 if arm == "base" else 22.5 + place,
                "communication_seconds": 0.7 if wire else 0, "evaluate_seconds": 4.1,
                "train_tokens": 0 if arm == "base" else 246_654, "tokens_per_second": 0 if arm == "base" else 8192.0,
                "peak_memory_bytes": 897_691_648, "flops": 0 if arm == "base" else 2.9e12, "trainable_share": 0.121,
                "rounds": 0 if arm == "base" else 30,
            }  # fmt: skip
            for comparison in ("rounds", "samples"):
                for metric in metrics:
                    own = {}
                    for seed in seeds:
                        level = min(0.99, max(0.0, LEVELS[arm] - shift * (arm != "base") + draw.gauss(0, 0.015)))
                        level *= 0.9 if comparison == "samples" and arm in ("federated", "global") else 1
                        own[seed] = level if metric["unit"] == "share" else 2.4 - 2 * level
                        if metric["name"].startswith("tasks"):
                            own[seed] = level / 20
                    values[repr(settings), arm, comparison, metric["name"]] = own
                    n, mean = len(own), statistics.fmean(own.values())
                    std = statistics.stdev(own.values()) if n > 1 else None
                    table.append(
                        {
                            "settings": settings, "arm": arm, "comparison": comparison, "metric": metric["name"],
                            "n": n, "mean": mean, "std": std, "values": {str(k): v for k, v in own.items()},
                            "costs": costs,
                        }
                    )  # fmt: skip
    differences: list[Any] = []

    def compare(
        settings: Any, by: str, a: str, b: str, one: Any, two: Any, comparison: str, metric: str, arm: str
    ) -> None:
        gaps = [one[seed] - two[seed] for seed in one]
        n, mean = len(gaps), statistics.fmean(gaps)
        half = T_975[n] * statistics.stdev(gaps) / math.sqrt(n) if n > 1 else None
        resolved = half is not None and abs(mean) > half
        differences.append(
            {
                "settings": settings, "by": by, "a": a, "b": b, "comparison": comparison, "metric": metric,
                "n": n, "mean": mean, "low": None if half is None else mean - half,
                "high": None if half is None else mean + half, "level": 0.95, "p": 0.01 if resolved else 0.2,
                "p_holm": 0.04 if resolved and abs(mean) > 0.1 else 0.6, "resolved": resolved,
                "resolved_holm": resolved and abs(mean) > 0.1,
                **({"arm": arm} if by != "arm" else {}),
            }
        )  # fmt: skip

    for comparison in ("rounds", "samples"):
        for metric in metrics:
            for settings in grid:
                for a, b in (("federated", "local"), ("federated", "global"), ("local", "global")):
                    if a in arms and b in arms:
                        one, two = (values[repr(settings), arm, comparison, metric["name"]] for arm in (a, b))
                        compare(settings, "arm", a, b, one, two, comparison, metric["name"], "")
            for recipe in recipes:
                for a, b in itertools.pairwise(adapters):
                    one, two = (
                        values[repr({"recipe": recipe, "adapter": x}), "federated", comparison, metric["name"]]
                        for x in (a, b)
                    )
                    compare({"recipe": recipe}, "adapter", a, b, one, two, comparison, metric["name"], "federated")
    write_suite(
        folder,
        {
            "schema": 1,
            "name": folder.name,
            "status": "running" if running else "failed" if failed else "done",
            "fedloom_version": "0.1.0",
            "arms": list(arms),
            "seeds": list(seeds),
            "settings": {"recipe": list(recipes), "adapter": list(adapters)},
            "metrics": metrics,
            "cells": cells,
            "table": table,
            "differences": differences,
            "notes": ["Equal samples: local at its end, the others where their models had seen as many samples."],
            "seconds": 1234.5,
            "jobs": 2,
            "versions": {"python": "3.12.1", "torch": "2.13.0"},
            "machine": {"cores": 2, "memory_bytes": 8_000_000_000},
            "suite": {"suite": folder.name, "base": list(recipes)},
        },
    )
    (folder / "suite.yaml").write_text(f"suite: {folder.name!r}\nbase: {list(recipes)!r}\n", encoding="utf-8")
    return folder
