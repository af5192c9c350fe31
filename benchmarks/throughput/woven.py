"""Sides (b) and (c): the same work by fedloom, (b) in the bare loop's settings, (c) with fedloom's defaults.

(b) is float32, one client at a time, the very batches of the bare loop. (c) is what a recipe without a word about speed
gives: the hardware's data type, clients side by side, batches of similar length. `--one` keeps the defaults but one
client at a time, to compare memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.throughput import note
from benchmarks.throughput import work as shared
from safetensors.torch import load_file

from fedloom.data.batches import round_batches
from fedloom.data.federation import ClientData, Federation
from fedloom.models.load import Base, hardware_dtype
from fedloom.ops.attention import use_fast_attention
from fedloom.ops.host import tune_host
from fedloom.rounds import federate, initial_state
from fedloom.runtimes import batched
from fedloom.study.build import adapter_of, algorithm_of, population_of, sampling_of, width_of
from fedloom.study.recipe import Recipe
from fedloom.types import Client, State

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PlainPopulation:
    """The bare loop's batches: random order, padded to the longest row of the batch."""

    federation: Federation
    work: shared.Work

    @property
    def ids(self) -> Sequence[str]:
        return list(self.federation.clients)

    def open(self, client: str, round: int) -> Client:
        own = self.federation.clients[client].train
        batches = round_batches(
            own,
            batch_size=self.work.batch,
            num_steps=self.work.steps,
            pad_id=shared.PAD,
            seed=self.work.seed,
            round=round,
            client=client,
            bucket=False,
        )
        return Client(client, batches, float(len(own)))


def recipe_of(work: shared.Work, defaults: bool) -> Recipe:
    """What is named here is what the bare loop does too; the rest are fedloom's defaults."""
    return Recipe.model_validate(
        {
            "model": "random",
            "data": {"path": "synthetic"},
            "split": {"kind": "iid", "clients": work.clients},
            "adapter": {
                "lora_r": shared.RANK,
                "lora_alpha": shared.ALPHA,
                "lora_target_modules": list(shared.TARGETS),
            },
            "rounds": work.rounds,
            "local_steps": work.steps,
            "client": {
                "learning_rate": shared.LEARNING_RATE,
                "per_device_train_batch_size": work.batch,
                "lr_scheduler_type": "constant",
                "max_grad_norm": shared.CLIP,
            },
            "seed": work.seed,
            **({} if defaults else {"dtype": "float32", "runtime": {"kind": "sequential"}}),
        }
    )


def run(folder: Path, out: Path, *, defaults: bool, one: bool, profile: Path | None = None) -> None:
    work, data, _ = shared.load(folder)
    recipe = recipe_of(work, defaults)
    tune_host(1)
    dtype = hardware_dtype("cpu")[0] if recipe.dtype == "auto" else torch.float32
    model = shared.load_model(folder, dtype)
    use_fast_attention(model)
    tokenizer: Any = SimpleNamespace(pad_token_id=shared.PAD, eos_token_id=shared.EOS)
    base = Base(model, tokenizer, "random", dtype, sum(p.numel() for p in model.parameters()))
    examples = shared.federated_examples(work, data)
    clients = {name: ClientData(name, own, own[:0], own[:0]) for name, own in examples.items()}
    report: Any = SimpleNamespace(read_as="alpaca")
    federation = Federation(clients, [], None, report, tokenizer, "alpaca")
    adapter = adapter_of(base, recipe)
    algorithm = algorithm_of(recipe)
    width = width_of(recipe, federation, base) if defaults and not one else 1
    runtime = batched(width)
    population: Any = population_of(federation, recipe, "federated") if defaults else PlainPopulation(federation, work)
    state = initial_state(algorithm, adapter, recipe.seed)
    start = load_file(folder / "start" / "adapter_model.safetensors")
    params = {name.removeprefix(PEFT_PREFIX): leaf for name, leaf in start.items()}
    if params.keys() != state.params.keys():
        raise RuntimeError("the start adapter has other names than this one")
    state = State(state.seed, 0, params, state.server)
    tokens = padded = 0.0

    def train() -> State:
        nonlocal tokens, padded
        reached = state
        everyone = sampling_of(recipe, "federated", work.clients)
        loop = federate(algorithm, adapter, runtime, state, population, rounds=work.rounds, sampling=everyone)
        for after, row in loop:
            reached = after
            if row.failed:
                raise RuntimeError(f"clients failed: {row.failed}")
            tokens += row.metrics["tokens"]
            padded += row.metrics["padded_tokens"]
        return reached

    with note.training(out) as seen:
        if profile is not None:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=False) as watched:
                state = train()
            profile.write_text(watched.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
        else:
            state = train()
        seen.tokens = int(tokens)
    note.finish(
        out,
        {PEFT_PREFIX + name: leaf for name, leaf in state.params.items()},
        dtype=str(dtype).removeprefix("torch."),
        clients_per_pass=width,
        padded_tokens=int(padded),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--one", action="store_true", help="one client in a pass")
    parser.add_argument("--profile", type=Path)
    given = parser.parse_args()
    run(given.folder, given.out, defaults=given.defaults, one=given.one, profile=given.profile)


if __name__ == "__main__":
    main()
