"""The server's model: the LoRA weights that every side begins with, under PEFT's names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


class LoraWeights(torch.nn.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        for name, leaf in load_file(Path(folder) / "start" / "adapter_model.safetensors").items():
            module: torch.nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.register_parameter(last, torch.nn.Parameter(leaf))
