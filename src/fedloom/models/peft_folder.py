"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedloom.errors import UserError

PEFT_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    plain = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
    save_file(plain, path / WEIGHTS, {"format": "pt"})
    settings = {"task_type": "CAUSAL_LM", **config, "inference_mode": True}
    (path / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_folder(path: Path, peft_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, tensors by PEFT's names).

    Raises:
        UserError: the folder is not such an adapter's.
    """
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path} is not an adapter folder: there is no {name}", code="adapter.missing")
    config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != peft_type:
        raise UserError(f"{path} is a {config.get('peft_type')} adapter, not {peft_type}", code="adapter.kind")
    return config, load_file(path / WEIGHTS)


def short_names(model: nn.Module, sites: Mapping[str, nn.Module]) -> list[str]:
    """The shortest ends of names that match exactly these layers, so that PEFT finds the same ones."""
    ends = {name.rsplit(".", 1)[-1] for name in sites}
    matched = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends) if matched == set(sites) else sorted(sites)
