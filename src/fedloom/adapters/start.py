"""A LoRA adapter as the ground that another one is trained on: merged into the base first, written out with it after.

Supervised tuning and then preference tuning is the usual case: the tuned adapter becomes a part of the frozen model, so
the model with nothing on it, DPO's reference, is the tuned one. What is exported is one adapter for the original base,
whose factors are those of both, side by side: W + B A + B' A' = W + [B, B'] [A; A'].

Shape suffixes: D in-features, O out-features, R rank.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.lora import ranks_of_config
from fedloom.errors import UserError
from fedloom.models.peft_folder import PEFT_PREFIX, read_folder, write_folder
from fedloom.ops.low_rank import A, B

__all__ = ["digest_of", "merge_into", "read_factors", "write_stacked"]


class Factors(NamedTuple):
    """What an adapter adds to one layer: B_OR @ A_RD, its scale in B."""

    A_RD: Tensor
    B_OR: Tensor


def read_factors(folder: Path) -> dict[str, Factors]:
    """A PEFT folder of a LoRA adapter, layer by layer.

    Raises:
        UserError: it is no LoRA adapter, or one that has more than factors.
    """
    config, tensors = read_folder(folder, "LORA")
    more = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias") if config.get(key)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    names = sorted({name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name})
    wanted = {f"{PEFT_PREFIX}{name}.{factor}" for name in names for factor in (A, B)}
    more += sorted(set(tensors) - wanted)[:3]
    if more or not names or wanted - set(tensors):
        said = ", ".join(map(str, more)) or "factors are missing"
        raise UserError(
            f"{folder} is more or less than LoRA's factors ({said}), so it cannot be merged here",
            hint="fedloom export RUN FOLDER --format merged writes a model, which model=FOLDER takes",
            code="adapter.start",
        )
    found = {}
    for name in names:
        a_RD, b_OR = (tensors[f"{PEFT_PREFIX}{name}.{factor}"].double() for factor in (A, B))
        found[name] = Factors(a_RD, b_OR * ranks_of_config(config).scale(name))
    return found


@torch.no_grad()
def merge_into(model: nn.Module, folder: Path) -> frozenset[str]:
    """Add an adapter to the weights of its layers, whose names are given back.

    Raises:
        UserError: the model has no such layer, or one of another shape; nothing was changed then.
    """
    factors = read_factors(folder)
    layers = dict(model.named_modules())
    wrong = [name for name in factors if name not in layers]
    for name, (a_RD, b_OR) in factors.items():
        weight = getattr(layers.get(name), "weight", None)
        if weight is None:
            continue
        shape = (a_RD.shape[1], len(b_OR)) if isinstance(layers[name], Conv1D) else (len(b_OR), a_RD.shape[1])
        if tuple(weight.shape) != shape:
            wrong.append(f"{name} is {list(weight.shape)} in the model, {list(shape)} in the adapter")
    if wrong:
        raise UserError(
            f"{folder} is not for this model: {len(wrong)} of its {len(factors)} layers do not fit ({wrong[0]})",
            hint="model= must be the model that it was trained on",
            code="adapter.start",
        )
    for name, (a_RD, b_OR) in factors.items():
        layer, added_OD = layers[name], b_OR @ a_RD
        weight = layer.weight
        assert isinstance(weight, Tensor)
        added = (added_OD.T if isinstance(layer, Conv1D) else added_OD).to(weight.device)
        weight.copy_((weight.double() + added).to(weight.dtype))  # rounded once, when it is stored
    return frozenset(factors)


def write_stacked(folder: Path, start: Path) -> None:
    """Rewrite `folder`, an adapter for the base with `start` merged in, as one for the base itself.

    Raises:
        UserError: one of the two is more than LoRA's factors, or they are of different layers.
    """
    on, under = read_factors(folder), read_factors(start)
    if on.keys() != under.keys():
        different = sorted(on.keys() ^ under.keys())
        raise UserError(f"{folder} and {start} are of different layers ({different[0]}, ...)", code="adapter.start")
    rank = max(len(on[name].A_RD) + len(under[name].A_RD) for name in on)
    tensors = {}
    for name in on:
        a_RD = torch.cat([on[name].A_RD, under[name].A_RD])
        b_OR = torch.cat([on[name].B_OR, under[name].B_OR], 1)
        missing = rank - len(a_RD)  # zeros where a layer has a smaller rank than others
        a_RD, b_OR = nn.functional.pad(a_RD, (0, 0, 0, missing)), nn.functional.pad(b_OR, (0, missing))
        tensors[f"{PEFT_PREFIX}{name}.{A}"] = a_RD.float().contiguous()
        tensors[f"{PEFT_PREFIX}{name}.{B}"] = b_OR.float().contiguous()
    config, _ = read_folder(folder, "LORA")
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_folder(folder, config, tensors)


def digest_of(folder: Path) -> str:
    """Of an adapter folder's settings and numbers."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
