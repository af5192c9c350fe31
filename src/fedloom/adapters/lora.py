"""LoRA (Hu et al. 2022) with a cohort axis: y = W x + scale * B A x, one A and B per client over one frozen W.

Shape suffixes: C clients, B examples per client, T tokens, D in-features, O out-features, R rank, S merged rank.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.frame import Frame, adapter_dtype, check_tree
from fedloom.adapters.targets import features, find_targets
from fedloom.errors import UserError
from fedloom.ops.low_rank import MERGE_A, MERGE_B, A, B, beside, slimmed
from fedloom.seeds import generator
from fedloom.types import FIXED, Client, Tree

SCALE = FIXED + "lora_scale"  # a client's alpha / rank, a leaf of its tree because ranks differ inside a cohort
PEFT_PREFIX = "base_model.model."


def lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "auto",
    base_name: str = "",
) -> Lora:
    """LoRA on the layers of a frozen causal LM.

    Args:
        model: any Hugging Face causal LM; it is frozen and its layers get hooks, its own parameters and names stay.
        rank: R.
        alpha: the scale is alpha / rank.
        dropout: on the adapter's input while training. Draws depend on how clients are blocked and padded.
        targets: names, "all-linear" or "auto" (see `find_targets`).
        base_name: for the exported adapter's `base_model_name_or_path`.

    Raises:
        UserError: a target matches nothing, or rank, alpha or dropout is out of range.
    """
    problems = []
    if rank < 1:
        problems.append(f"lora_r is {rank}, must be at least 1")
    if not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout}, must be at least 0 and below 1")
    if alpha <= 0:
        problems.append(f"lora_alpha is {alpha}, must be above 0")
    if problems:
        raise UserError("; ".join(problems), code="adapter.lora")
    return Lora(model, rank, alpha, dropout, find_targets(model, targets), base_name)


@dataclass
class _Bound:
    """What the hook of one layer works with while a tree is bound."""

    A_CRD: Tensor
    B_COR: Tensor
    scale_C: Tensor
    drop: Callable[[Tensor], Tensor] | None


class Lora:
    """The adapter; see `lora`. One instance owns its model: bind one tree at a time."""

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        alpha: float,
        dropout: float,
        sites: Mapping[str, nn.Module],
        base_name: str,
    ) -> None:
        frame = Frame(model, self._bind)
        self.model, self.causal, self.bound = frame.model, frame.causal, frame.bound
        self.loss, self.nll = frame.loss, frame.nll
        self.rank, self.alpha, self.dropout, self.base_name = rank, alpha, dropout, base_name
        self.sites = dict(sites)
        self._bound: dict[str, _Bound] = {}
        self._base: Tree = {}
        self._original: dict[str, Tensor] = {}
        self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.sites.items()]

    def detach(self) -> None:
        """Take the hooks off; the model is as it was (frozen)."""
        self.sync({})
        for handle in self._handles:
            handle.remove()

    # ---- the Adapter protocol --------------------------------------------------------------------------------------

    def init(self, seed: int) -> dict[str, Tensor]:
        """A uniform in +-1 / sqrt(D) (PEFT's default), B zero; float32, whatever the base has (float64 stays)."""
        tree: dict[str, Tensor] = {}
        for name, layer in self.sites.items():
            d, o = features(layer)
            dtype, device = adapter_dtype(layer.weight), layer.weight.device
            draw = generator(seed, 0, "", f"lora_A/{name}")
            bound = 1 / math.sqrt(d)
            a_RD = torch.empty(self.rank, d, dtype=torch.float64).uniform_(-bound, bound, generator=draw)
            tree[f"{name}.{A}"] = a_RD.to(dtype).to(device)  # type: ignore[arg-type]
            tree[f"{name}.{B}"] = torch.zeros(o, self.rank, dtype=dtype, device=device)  # type: ignore[arg-type]
        return tree

    def scale_of(self, rank: int | None = None) -> float:
        return self.alpha / (rank or self.rank)

    def narrow(self, tree: Tree, client: Client) -> Tree:
        """The client's own rank r by zero padding, which is exact: padded rows and columns get zero gradients.

        The client's own scale is alpha / r, and B is scaled so that scale * B A stays what it is with everyone's.
        """
        first = next(iter(tree.values()))
        scale = torch.tensor(self.scale_of(client.rank), dtype=first.dtype, device=first.device)
        if client.rank is None or client.rank == self.rank:
            return {**tree, SCALE: scale}
        if not 1 <= client.rank <= self.rank:
            raise UserError(f"client {client.id!r} has rank {client.rank}; the adapter's is {self.rank}")
        factor = self.scale_of() / self.scale_of(client.rank)
        own: dict[str, Tensor] = {}
        for name, leaf in tree.items():
            if name.endswith(A):
                own[name] = leaf.clone()
                own[name][client.rank :].zero_()
            else:
                own[name] = leaf * factor
                own[name][:, client.rank :].zero_()
        return {**own, SCALE: scale}

    def widen(self, delta: Tree, client: Client) -> Tree:
        """The first r rows of A's change and columns of B's, in the scale of the full rank: `narrow` undone."""
        if client.rank is None or client.rank == self.rank:
            return delta
        factor = self.scale_of(client.rank) / self.scale_of()
        return {
            name: leaf[: client.rank] if name.endswith(A) else leaf[:, : client.rank] * factor
            for name, leaf in delta.items()
        }

    def sync(self, base: Tree) -> None:
        """Frozen weights := original + merge_B @ merge_A, computed from the original each time: nothing drifts."""
        if base is self._base or (not base and not self._base):
            return
        names = {name.rsplit(".", 1)[0] for name in (*base, *self._base)}
        for name in names:
            layer = self.sites.get(name)
            if layer is None:
                raise UserError(f"the merged weights name a layer without an adapter: {name}", code="adapter.base")
            weight = layer.weight
            assert isinstance(weight, Tensor)
            if name not in self._original:
                self._original[name] = weight.detach().clone()
            whole = self._original[name]
            if f"{name}.{MERGE_A}" in base:
                added_OD = base[f"{name}.{MERGE_B}"] @ base[f"{name}.{MERGE_A}"]
                added = added_OD.T if isinstance(layer, Conv1D) else added_OD
                whole = (whole.to(added.dtype) + added.to(whole.device)).to(whole.dtype)
            with torch.no_grad():
                weight.copy_(whole)
        self._base = base

    def accumulate(self, base: Tree, merge: Tree) -> dict[str, Tensor]:
        """Factors side by side, multiplied out where they have become wider than the weight."""
        return slimmed(beside(base, merge))

    def merge(self, tree: Tree) -> None:
        """Add scale * B A to the frozen weights, for good."""
        factors = {}
        for name in self.sites:
            factors[f"{name}.{MERGE_A}"] = tree[f"{name}.{A}"].double()
            factors[f"{name}.{MERGE_B}"] = tree[f"{name}.{B}"].double() * self.scale_of()
        self.sync(self.accumulate(self._base, factors))

    def export(self, tree: Tree, path: Path) -> None:
        """A PEFT adapter folder; what was merged into the base is stacked into the factors, so the logits are equal.

        Raises:
            UserError: `tree` is not one of this adapter's.
        """
        self.check(tree)
        tensors: dict[str, Tensor] = {}
        ranks = set()
        for name in self.sites:
            a_RD, b_OR = tree[f"{name}.{A}"], tree[f"{name}.{B}"]
            if self._base:
                a_SD = self._base.get(f"{name}.{MERGE_A}", a_RD[:0])
                b_OS = self._base.get(f"{name}.{MERGE_B}", b_OR[:, :0])
                a_RD, b_OR = torch.cat([a_RD, a_SD]), torch.cat([b_OR * self.scale_of(), b_OS], 1)
            ranks.add(len(a_RD))
            tensors[f"{PEFT_PREFIX}{name}.{A}"] = a_RD.detach().cpu().contiguous().clone()
            tensors[f"{PEFT_PREFIX}{name}.{B}"] = b_OR.detach().cpu().contiguous().clone()
        if len(ranks) != 1:
            raise UserError(f"layers have different ranks after merging ({sorted(ranks)}); export merged instead")
        rank = ranks.pop()
        conv = [isinstance(layer, Conv1D) for layer in self.sites.values()]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_name,
            "r": rank,
            "lora_alpha": rank if self._base else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": _short_names(self.model, self.sites),
            "bias": "none",
            "fan_in_fan_out": all(conv),
            "inference_mode": True,
        }
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    # ---- loading and checking --------------------------------------------------------------------------------------

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model and rank; the message lists what differs."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, layer in self.sites.items():
            d, o = features(layer)
            wanted[f"{name}.{A}"], wanted[f"{name}.{B}"] = (self.rank, d), (o, self.rank)
        check_tree(tree, wanted)

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a PEFT adapter folder written for this model, rank and scale.

        Raises:
            UserError: files are missing, or the adapter does not match the model.
        """
        config = read_config(path)
        if config["r"] != self.rank or config["lora_alpha"] != self.alpha:
            raise UserError(
                f"{path} has r {config['r']} and alpha {config['lora_alpha']}, "
                f"this adapter r {self.rank} and alpha {self.alpha}",
                code="adapter.mismatch",
            )
        tensors = load_file(path / "adapter_model.safetensors")
        first = next(iter(self.sites.values()))
        dtype, device = adapter_dtype(first.weight), first.weight.device
        tree = {
            name.removeprefix(PEFT_PREFIX): leaf.to(dtype).to(device)  # type: ignore[arg-type]
            for name, leaf in tensors.items()
        }
        self.check(tree)
        return tree

    # ---- the layers ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _bind(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        first = next(iter(tree_C.values()))
        c = first.shape[0]
        scale_C = tree_C.get(SCALE)
        if scale_C is None:
            scale_C = torch.full((c,), self.scale_of(), dtype=first.dtype, device=first.device)
        for name in self.sites:
            drop = self._dropout(name, seed_C) if self.dropout and seed_C is not None else None
            self._bound[name] = _Bound(tree_C[f"{name}.{A}"], tree_C[f"{name}.{B}"], scale_C, drop)
        try:
            yield
        finally:
            self._bound.clear()

    def _dropout(self, name: str, seed_C: Tensor) -> Callable[[Tensor], Tensor]:
        def drop(x_CND: Tensor) -> Tensor:
            masks = []
            for seed in seed_C.tolist():
                draw = generator(seed, 0, "", f"dropout/{name}")
                masks.append(torch.rand(x_CND.shape[1:], generator=draw) >= self.dropout)
            keep_CND = torch.stack(masks).to(x_CND.device)
            return x_CND * keep_CND / (1 - self.dropout)

        return drop

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            bound = self._bound.get(name)
            return None if bound is None else cohort_lora(args[0], out, bound)

        return hook


def cohort_lora(x: Tensor, y: Tensor, bound: _Bound) -> Tensor:
    """y + scale * B A x, with the cohort outermost in the first axis of x [C * B, ..., D] and y [C * B, ..., O].

    The factors are cast to the activations' dtype for the product; their gradients come back in their own.
    """
    c = bound.A_CRD.shape[0]
    x_CND, y_CNO = x.reshape(c, -1, x.shape[-1]), y.reshape(c, -1, y.shape[-1])
    if bound.drop is not None:
        x_CND = bound.drop(x_CND)
    a_CRD, b_COR = bound.A_CRD.to(x.dtype), (bound.B_COR * bound.scale_C.view(-1, 1, 1)).to(x.dtype)
    if c == 1:
        return torch.addmm(y_CNO[0], x_CND[0] @ a_CRD[0].T, b_COR[0].T).view_as(y)
    return torch.baddbmm(y_CNO, torch.bmm(x_CND, a_CRD.mT), b_COR.mT).view_as(y)


def read_config(path: Path) -> dict[str, Any]:
    """An adapter folder's settings.

    Raises:
        UserError: the folder is not an adapter's.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise UserError(f"{path} is not an adapter folder: there is no {name}", code="adapter.missing")
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} is a {config.get('peft_type')} adapter; only LoRA is read here", code="adapter.kind")
    return config


def _short_names(model: nn.Module, sites: Mapping[str, nn.Module]) -> list[str]:
    """The shortest ends of names that match exactly these layers, so that PEFT finds the same ones."""
    ends = {name.rsplit(".", 1)[-1] for name in sites}
    matched = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends) if matched == set(sites) else sorted(sites)
