"""Whole runs of a tiny model for tests: a recipe, what of a run must not depend on interruptions, and kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from fedloom.study import checkpoint
from fedloom.study.progress import Silent
from fedloom.study.recipe import Recipe
from fedloom.study.run import run_recipe

WORDS = ["apple", "stone", "river", "cloud", "horse", "bread", "night", "green", "table", "seven"]


def rows(num: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Say the word {WORDS[i % 10]} {i} times",
            "input": "" if i % 3 else f"note {i}",
            "output": f"{WORDS[i % 10]} " * (1 + i % 4) + f"and {i}",
            "category": ["a", "b", "c"][i % 3],
        }
        for i in range(num)
    ]


def recipe(home: Path, out: Path, **values: Any) -> Recipe:
    told: dict[str, Any] = {
        "model": str(home / "model"),
        "dtype": "float64",
        "data": {"path": str(home / "data.json"), "max_length": 256, "val_set_size": 0.1, "test_set_size": 0.1},
        "split": {"kind": "by_category"},
        "rounds": 3,
        "local_steps": 2,
        "client": {"learning_rate": 1e-2, "per_device_train_batch_size": 2},
        "method": "fedavgm",
        "arms": ["base", "local", "federated", "global"],
        "evaluate": {"eval_rounds": 1, "score": "exact", "max_new_tokens": 3, "limit": 2},
        "runtime": {"threads": 1},
        "output_dir": str(out),
    }
    for key, value in values.items():
        told[key] = {**told.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe(**told)


MEASURED = (  # of time and memory: other in each run
    "train_seconds",
    "tokens_per_second",
    "evaluate_seconds",
    "communication_seconds",
    "checkpoint_seconds",
    "prepare_seconds",
    "peak_memory_bytes",
    "peak_memory_of",
)


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that must not depend on interruptions, seconds and memory left out."""
    result = json.loads((run / "result.json").read_text())
    for costs in (result["costs"], *result["costs_per_arm"].values()):
        for name in MEASURED:
            costs.pop(name, None)
    result["recipe"].pop("output_dir")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("seconds", "tokens_per_second", "slowest", "communication_seconds"):
            line.pop(name, None)
    [weights] = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return {"result": result, "rounds": lines, "adapter": weights.read_bytes()}


class Signals(Silent):
    """In a child: says which point of the run is reached, and waits there to be killed."""

    def __init__(self, point: str, pipe: Any) -> None:
        self.point, self.pipe, self.current = point, pipe, ""

    def reached(self, point: str) -> None:
        if point == self.point:
            self.pipe.send("here")
            time.sleep(120)

    def arm(self, arm: str, rounds: int) -> None:
        self.current = arm

    def advance(self, done: int, total: int, what: str) -> None:
        self.reached(f"{what} {done}")

    def round(self, line: Any) -> None:
        self.reached(f"after line {line['arm']} {line['round']}")  # before its checkpoint is written

    def end(self, result: Any) -> None:
        self.reached("end")


def child(told: Recipe, resume: Path | None, point: str, pipe: Any) -> None:
    display = Signals(point, pipe)
    if point.startswith("writing "):
        write = checkpoint._write_tensors
        seen = []

        def half(path: Path, header: bytes, tensors: Any) -> Any:
            done = write(path, header, tensors)
            seen.append(path)
            if len(seen) == int(point.split()[1]):
                os.truncate(path, path.stat().st_size // 2)
                display.reached(point)
            return done

        checkpoint._write_tensors = half
    run_recipe(told, resume=resume, display=display)
    pipe.send("done")


def kill_at(told: Recipe, point: str, resume: Path | None = None, number: int = signal.SIGKILL) -> int | None:
    """Run in a child until `point`, then kill it; its exit code."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=child, args=(told, resume, point, theirs))
    process.start()
    assert mine.poll(100), f"{point} was not reached"
    assert mine.recv() == "here", f"the run ended before {point}"
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode
