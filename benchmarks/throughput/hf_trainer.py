"""Side (g): Hugging Face's Trainer with PEFT, a new Trainer for every client and round, as OpenFedLLM does it.

One model stays in memory; the global adapter is copied in before a client trains, its own is copied out and averaged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from benchmarks.throughput import note, plain
from benchmarks.throughput import work as shared
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments


class Planned(torch.utils.data.Dataset[Any]):
    """A client's round: one item per step, already a batch, as the plan has it."""

    def __init__(self, data: shared.Data, table_SB: Any) -> None:
        self.data, self.table_SB = data, table_SB

    def __len__(self) -> int:
        return len(self.table_SB)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return shared.pad(self.data, self.table_SB[step])


class InOrder(Trainer):  # type: ignore[misc]  # transformers has no types here
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def run(folder: Path, out: Path) -> None:
    work, data, plan = shared.load(folder)
    model = plain.peft_model(folder)
    names = plain.client_names(plan)
    weights = {name: float(len(rows)) for name, rows in zip(names, shared.client_rows(work), strict=True)}
    current = plain.start_adapter(folder)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=1,  # an item is a whole batch
        max_steps=work.steps,
        learning_rate=shared.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=shared.CLIP,
        optim="adamw_torch",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    for round in range(work.rounds):
        total = {key: torch.zeros_like(leaf) for key, leaf in current.items()}
        for name in names:
            set_peft_model_state_dict(model, current)
            planned = Planned(data, plan[f"{round}/{name}"])
            with note.training(out) as seen:
                InOrder(model, arguments, train_dataset=planned, data_collator=lambda items: items[0]).train()
                rows = planned.table_SB
                seen.tokens = int(data.lengths[rows[rows >= 0]].sum())
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
