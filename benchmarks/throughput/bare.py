"""Side (a): FedAvg as a bare PyTorch loop over transformers and PEFT, in float32. Uses nothing of fedloom.

One model; before a client trains, the global adapter is copied in; afterwards its own is copied out and averaged.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.throughput import work as shared
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file


def run(folder: Path) -> dict[str, Any]:
    work, data, plan = shared.load(folder)
    torch.set_num_threads(1)
    config = LoraConfig(
        r=shared.RANK, lora_alpha=int(shared.ALPHA), target_modules=list(shared.TARGETS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(shared.make_model(), config)
    model.config.use_cache = False
    model.train()
    names = [key.partition("/")[2] for key in plan if key.startswith("0/")]
    weights = {name: float(len(rows)) for name, rows in zip(names, shared.client_rows(work), strict=True)}
    current = load_file(folder / "start" / "adapter_model.safetensors")

    def train(rows_of_steps: Any) -> int:
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=shared.LEARNING_RATE, weight_decay=0.0
        )
        seen = 0
        for rows in rows_of_steps:
            batch = shared.pad(data, rows)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], shared.CLIP)
            optimizer.step()
            optimizer.zero_grad()
            seen += int(batch["attention_mask"].sum())
        return seen

    set_peft_model_state_dict(model, current)
    train(plan[f"0/{names[0]}"][:1])  # what is done once (kernels, caches) is not training
    start_up = shared.cpu_seconds()
    began = time.perf_counter()
    tokens = 0
    for round in range(work.rounds):
        total = {key: torch.zeros_like(leaf) for key, leaf in current.items()}
        for name in names:
            set_peft_model_state_dict(model, current)
            tokens += train(plan[f"{round}/{name}"])
            for key, leaf in get_peft_model_state_dict(model).items():
                total[key] += weights[name] * leaf
        whole = sum(weights.values())
        current = {key: leaf / whole for key, leaf in total.items()}
    return {
        "tokens": tokens,
        "wall_seconds": time.perf_counter() - began,
        "train_cpu_seconds": shared.cpu_seconds() - start_up,
        "start_cpu_seconds": start_up,
        "peak_memory_bytes": shared.peak_memory_bytes(),
        "held_out_loss": shared.held_out_loss(data, current),
        "dtype": "float32",
        "clients_per_pass": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.write_text(json.dumps(run(given.folder)))


if __name__ == "__main__":
    main()
