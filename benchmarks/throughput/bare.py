"""Side (a): FedAvg as a bare PyTorch loop over transformers and PEFT, in float32. Uses nothing of fedloom.

One model; before a client trains, the global adapter is copied in; afterwards its own is copied out and averaged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.throughput import note, plain
from benchmarks.throughput import work as shared
from peft import get_peft_model_state_dict, set_peft_model_state_dict


def run(folder: Path, out: Path) -> None:
    work, data, plan = shared.load(folder)
    model = plain.peft_model(folder)
    names = plain.client_names(plan)
    weights = {name: float(len(rows)) for name, rows in zip(names, shared.client_rows(work), strict=True)}
    current = plain.start_adapter(folder)
    for round in range(work.rounds):
        total = {key: torch.zeros_like(leaf) for key, leaf in current.items()}
        for name in names:
            set_peft_model_state_dict(model, current)
            with note.training(out) as seen:
                seen.tokens = plain.train(model, data, plan[f"{round}/{name}"])
            for key, leaf in get_peft_model_state_dict(model).items():
                total[key] += weights[name] * leaf
        whole = sum(weights.values())
        current = {key: leaf / whole for key, leaf in total.items()}
    note.finish(out, current)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    run(given.folder, given.out)


if __name__ == "__main__":
    main()
