"""What a base takes in each precision: exact bytes of large shapes, memory of a small one, and scores of runs on it."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MIB = 2**20
KINDS = ("none", "int8", "nf4")
SHAPES: dict[str, dict[str, Any]] = {
    "Llama 1 B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Llama 7 B": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}


def bytes_of(shape: dict[str, Any]) -> dict[str, int]:
    """Exact bytes of the weights, found on the meta device; tests/models holds the counts against loaded models."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    head = model.get_output_embeddings()
    layers = [x for x in model.modules() if isinstance(x, torch.nn.Linear) and x is not head]
    packed, rows = sum(x.weight.numel() for x in layers), sum(x.out_features for x in layers)
    whole = sum(p.numel() for p in model.parameters())
    blocks = [x.weight.numel() // 64 for x in layers]
    scales = sum(n + 4 * (1 + -(-n // 256)) for n in blocks)
    return {
        "parameters": whole,
        "float32": 4 * whole,
        "16 bits": 2 * whole,
        "int8, rest in 16 bits": 2 * (whole - packed) + packed + 4 * rows,
        "nf4, rest in 16 bits": 2 * (whole - packed) + packed // 2 + scales,
    }


def small_model(folder: Path) -> None:
    from fedloom.models.load import random_base

    base = random_base(
        hidden_size=768, num_layers=12, num_heads=12, intermediate_size=2048, vocab_size=32_000, max_positions=512
    )
    model: Any = base.model
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def step(folder: Path, kind: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.precision.step", str(folder), kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def score(kind: str, seed: int, rounds: int, out: Path) -> dict[str, Any]:
    """A federated LoRA run of the built-in base on its skills."""
    from fedloom.study.recipe import Recipe
    from fedloom.study.run import run_recipe

    recipe = Recipe.model_validate(
        {
            "model": "builtin",
            "dtype": "float32",
            "quantization": kind,
            "rounds": rounds,
            "local_steps": 10,
            "seed": seed,
            "client": {"learning_rate": 1e-2, "per_device_train_batch_size": 16},
            "arms": ["federated"],
            "evaluate": {"eval_rounds": rounds, "limit": 50},
            "runtime": {"threads": 1},
            "output_dir": str(out / f"{kind}-{seed}"),
        }
    )
    arm = json.loads((run_recipe(recipe) / "result.json").read_text())["arms"]["federated"]
    return {"kind": kind, "seed": seed, "loss": arm["loss"], "score": arm.get("score")}


def page(found: dict[str, Any]) -> str:
    lines = ["# Precision: results", "", f"{found['date']}, {found['system']}, {found['packages']}. Made by", ""]
    lines += ["`python -m benchmarks.precision`.", "", "Bytes of the frozen weights, exact, by shape (MiB):", ""]
    names = [name for name in next(iter(found["shapes"].values())) if name != "parameters"]
    lines += ["| | parameters | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for shape, sizes in found["shapes"].items():
        cells = " | ".join(f"{sizes[name] / MIB:,.0f}" for name in names)
        lines.append(f"| {shape} | {sizes['parameters'] / 1e9:.2f} B | {cells} |")
    runs = found["steps"]
    lines += [
        "",
        f"A Llama of {runs[0]['parameters'] / 1e6:.0f} M random weights, computed in float32, LoRA r 8 on all",
    ]
    lines += [
        "layers, steps of 1 x 64 tokens, one process each, medians (MiB of the process's own memory beyond imports):"
    ]
    lines += ["", "| layers in | weights, exact | held once loaded | held after two steps |"]
    lines += ["|---|---|---|---|"]
    for kind in KINDS:
        mine = [run for run in runs if run["kind"] == kind]
        middle = {key: statistics.median(run[key] for run in mine) for key in ("loaded", "after_steps")}
        lines.append(
            f"| {'float32' if kind == 'none' else kind} | {mine[0]['stored'] / MIB:,.0f} | "
            f"{middle['loaded'] / MIB:,.0f} | {middle['after_steps'] / MIB:,.0f} |"
        )
    if found["scores"]:
        seeds = sorted({run["seed"] for run in found["scores"]})
        lines += ["", f"LoRA on the built-in base and its skills, {found['rounds']} rounds of 10 steps, federated arm,"]
        lines += [f"{len(seeds)} seeds (no claim beyond them):", "", "| layers in | loss, by seed | score, by seed |"]
        lines += ["|---|---|---|"]
        for kind in KINDS:
            mine = [run for run in found["scores"] if run["kind"] == kind]
            losses = ", ".join(f"{run['loss']:.3f}" for run in mine)
            scores = ", ".join("-" if run["score"] is None else f"{100 * run['score']:.1f} %" for run in mine)
            lines.append(f"| {'float32' if kind == 'none' else kind} | {losses} | {scores} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args()
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}, CPU, one thread, a shared machine",
        "packages": packages,
        "rounds": asked.rounds,
        "shapes": {name: bytes_of(shape) for name, shape in SHAPES.items()},
    }
    with tempfile.TemporaryDirectory() as place:
        small_model(Path(place) / "model")
        found["steps"] = [step(Path(place) / "model", kind) for _ in range(asked.repeats) for kind in KINDS]
        found["scores"] = [
            score(kind, seed, asked.rounds, Path(place)) for seed in range(asked.seeds) for kind in KINDS
        ]
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "RESULTS.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
