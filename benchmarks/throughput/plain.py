"""What the sides without fedloom share: the model with PEFT's LoRA and the plainest loop of steps.

Runs in the peers' own environments, so only torch, transformers, peft, numpy and safetensors are imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.throughput import work as shared
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

Adapter = dict[str, torch.Tensor]


def peft_model(folder: Path) -> Any:
    """The base model from disk with fresh LoRA factors, in training mode."""
    torch.set_num_threads(1)
    config = LoraConfig(
        r=shared.RANK, lora_alpha=int(shared.ALPHA), target_modules=list(shared.TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(shared.load_model(folder), config).train()


def start_adapter(folder: Path) -> Adapter:
    """What every side begins with, PEFT's names."""
    return load_file(folder / "start" / "adapter_model.safetensors")


def client_names(plan: Mapping[str, Any]) -> list[str]:
    return [key.partition("/")[2] for key in plan if key.startswith("0/")]


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: Any, data: shared.Data, table_SB: NDArray[np.int64]) -> int:
    """A client's steps of one round with an optimiser of its own; the tokens seen, without padding.

    `table_SB` holds the row numbers of every step's batch, -1 where there is none.
    """
    optimizer = torch.optim.AdamW(trained(model), lr=shared.LEARNING_RATE, weight_decay=0.0)
    seen = 0
    for rows in table_SB:
        batch = shared.pad(data, rows)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model), shared.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        seen += int(batch["attention_mask"].sum())
    return seen
