"""LoRA (Hu et al. 2022) with a cohort axis: y = W x + scale * B A x, one A and B per client over one frozen W.

A client sends the changes of its A and B, and of biases where they are trained.

Shape suffixes: C clients, B examples per client, T tokens, N = B * T, D in-features, O out-features, R rank,
S merged rank, L adapted layers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.frame import Frame, adapter_dtype, check_tree
from fedloom.adapters.targets import features, find_targets
from fedloom.errors import UserError
from fedloom.models.peft_folder import PEFT_PREFIX, read_folder, short_names, write_folder
from fedloom.ops.cohort_lora import MAX_RANK, Product, fused, plain, why_not_fused
from fedloom.ops.low_rank import MERGE_A, MERGE_B, A, B, beside, slimmed
from fedloom.ops.ranks import Ranks
from fedloom.seeds import generator
from fedloom.types import FIXED, NOTHING, Adapter, Client, Tree

SCALE = FIXED + "lora_scale"  # [L]: a client's own scale of each layer, a leaf of its tree as ranks differ in a cohort
Bias = Literal["none", "lora_only", "all"]


def lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "auto",
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] = NOTHING,
    alpha_pattern: Mapping[str, float] = NOTHING,
    bias: Bias = "none",
    base_name: str = "",
) -> Lora:
    """LoRA on the layers of a frozen causal LM.

    Args:
        model: any Hugging Face causal LM; it is frozen and its layers get hooks, its own parameters and names stay.
        rank: R.
        alpha: the scale is alpha / rank.
        dropout: on the adapter's input while training. Draws depend on how clients are blocked and padded.
        targets: names, "all-linear" or "auto" (see `find_targets`).
        use_rslora: the scale is alpha / sqrt(rank).
        rank_pattern: other ranks of some layers, by the end of their name or a regular expression, as PEFT matches it.
        alpha_pattern: other alphas of some layers, likewise.
        bias: which biases of the model are trained as well: none, those of the adapted layers, or all.
        base_name: for the exported adapter's `base_model_name_or_path`.

    Raises:
        UserError: a target or pattern matches nothing, a number is out of range, or there are no such biases.
    """
    ranks = Ranks(rank, alpha, use_rslora, rank_pattern, alpha_pattern)
    return Lora(model, ranks, dropout, find_targets(model, targets), bias, base_name)


@dataclass
class Bound:
    """What the hook of one layer works with while a tree is bound."""

    layer: nn.Module
    A_CRD: Tensor
    B_COR: Tensor
    scale_C: Tensor
    drop: Callable[[Tensor], Tensor] | None
    more: Mapping[str, Tensor]  # leaves [C, ...] of the variant, by their own names


class Variant(NamedTuple):
    """How a kind of LoRA differs: what else a layer has, and what it makes of its inputs and outputs."""

    kind: str
    apply: Callable[[Tensor, Tensor, Bound], Tensor]  # x, y -> y
    names: tuple[str, ...]  # of a layer's leaves besides A and B
    leaves: Callable[[nn.Module], Mapping[str, Tensor]]  # these, as they begin
    merged: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # W_OD, scale * B A, leaves -> W_OD
    config: Mapping[str, Any]  # of the exported folder
    merges: bool = True  # whether products of factors may be added to the frozen weights


def cohort_lora(x: Tensor, y: Tensor, bound: Bound, product: Product = plain) -> Tensor:
    """y + scale * B A x, with the cohort outermost in the first axis of x [C * B, ..., D] and y [C * B, ..., O]."""
    c = bound.A_CRD.shape[0]
    x_CND, y_CNO = x.reshape(c, -1, x.shape[-1]), y.reshape(c, -1, y.shape[-1])
    if bound.drop is not None:
        x_CND = bound.drop(x_CND)
    return product(x_CND, y_CNO, bound.A_CRD, bound.B_COR, bound.scale_C).view_as(y)


PLAIN = Variant("lora", cohort_lora, (), lambda layer: {}, lambda w_OD, ba_OD, leaves: w_OD + ba_OD, {})
FUSED = PLAIN._replace(apply=functools.partial(cohort_lora, product=fused))


def with_triton(adapter: Adapter) -> Adapter:
    """The same LoRA adapter, whose products are Triton's kernels: other last digits, the same result.

    Raises:
        UserError: it is no plain LoRA, or the kernels cannot run where the model is.
    """
    if not isinstance(adapter, Lora) or adapter.variant not in (PLAIN, FUSED):
        kind = getattr(adapter, "kind", "this adapter")
        raise UserError(f"Triton's kernels are for LoRA, not {kind}", "runtime.lora_kernel: plain", "adapter.kernel")
    weight = next(iter(adapter.sites.values())).weight
    assert isinstance(weight, Tensor)
    reason = why_not_fused(weight.device)
    most = max(adapter.ranks.at(name) for name in adapter.sites)
    if weight.dtype == torch.float64:
        reason = "its kernels have no float64"
    elif most > MAX_RANK:
        reason = f"its kernels take ranks up to {MAX_RANK}, and there is one of {most}"
    if reason is not None:
        raise UserError(f"runtime.lora_kernel is triton: {reason}", "runtime.lora_kernel: plain", "adapter.kernel")
    adapter.variant = FUSED
    return adapter


class Lora(Frame):
    """The adapter; see `lora`. One instance owns its model: bind one tree at a time."""

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        dropout: float,
        sites: Mapping[str, nn.Module],
        bias: Bias,
        base_name: str,
        variant: Variant = PLAIN,
    ) -> None:
        ranks.check(sites)
        if not 0 <= dropout < 1:
            raise UserError(f"lora_dropout is {dropout}, must be at least 0 and below 1", code="adapter.lora")
        super().__init__(model, self._put_on)
        self.ranks, self.dropout, self.bias, self.base_name, self.variant = ranks, dropout, bias, base_name, variant
        self.rank, self.alpha, self.kind = ranks.rank, ranks.alpha, variant.kind
        self.sites = dict(sites)
        # for good: of a base in parts the weights may wait elsewhere (`runtimes.shards`)
        self.devices = {name: layer.weight.device for name, layer in self.sites.items()}
        self.biased = find_biases(model, self.sites, bias)
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if any(module is output for module in self.biased.values()):
            self.causal.run_whole()  # so that its hook adds the bias
        if dropout:
            self.causal.rows.way = "padded"  # what is drawn depends on where a token stands
        self._bound: dict[str, Bound] = {}
        self._biases: dict[str, Tensor] = {}
        self._base: Tree = {}
        self._original: dict[str, Tensor] = {}
        self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.sites.items()]
        self._handles += [module.register_forward_hook(self._bias_hook(name)) for name, module in self.biased.items()]

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
            (d, o), rank = features(layer), self.ranks.at(name)
            dtype, device = adapter_dtype(layer.weight), self.devices[name]
            draw = generator(seed, 0, "", f"lora_A/{name}")
            bound = 1 / math.sqrt(d)
            a_RD = torch.empty(rank, d, dtype=torch.float64).uniform_(-bound, bound, generator=draw)
            tree[f"{name}.{A}"] = a_RD.to(dtype).to(device)  # type: ignore[arg-type]
            tree[f"{name}.{B}"] = torch.zeros(o, rank, dtype=dtype, device=device)  # type: ignore[arg-type]
            tree.update({f"{name}.{own}": leaf for own, leaf in self.variant.leaves(layer).items()})
        for name, module in self.biased.items():
            bias = module.bias
            assert isinstance(bias, Tensor)
            tree[f"{name}.bias"] = bias.detach().to(adapter_dtype(bias)).clone()
        return tree

    def scale_of(self, rank: int | None = None, layer: str = "") -> float:
        """What B A is multiplied by: everyone's, or that of a client of this rank."""
        return self.ranks.scale(layer, rank)

    def _scales(self, like: Tensor, rank: int | None = None) -> Tensor:
        return torch.tensor([self.scale_of(rank, name) for name in self.sites], dtype=like.dtype, device=like.device)

    def narrow(self, tree: Tree, client: Client) -> Tree:
        """The client's own rank r by zero padding, which is exact: padded rows and columns get zero gradients.

        The scale is that of the client's rank, and B is scaled so that scale * B A stays what it is with everyone's.
        """
        scales = self._scales(next(iter(tree.values())), client.rank)
        if client.rank is None or client.rank == self.rank:
            return {**tree, SCALE: scales}
        if not 1 <= client.rank <= self.rank:
            raise UserError(f"client {client.id!r} has rank {client.rank}; the adapter's is {self.rank}")
        own = dict(tree)
        for name in self.sites:
            r = self.ranks.at(name, client.rank)
            own[f"{name}.{A}"] = tree[f"{name}.{A}"].clone()
            own[f"{name}.{A}"][r:].zero_()
            own[f"{name}.{B}"] = tree[f"{name}.{B}"] * (self.scale_of(None, name) / self.scale_of(client.rank, name))
            own[f"{name}.{B}"][:, r:].zero_()
        return {**own, SCALE: scales}

    def widen(self, delta: Tree, client: Client) -> Tree:
        """The first r rows of A's change and columns of B's, in the scale of the full rank: `narrow` undone."""
        if client.rank is None or client.rank == self.rank:
            return delta
        wide = dict(delta)
        for name in self.sites:
            r = self.ranks.at(name, client.rank)
            if f"{name}.{A}" in delta:
                wide[f"{name}.{A}"] = delta[f"{name}.{A}"][:r]
            if f"{name}.{B}" in delta:
                factor = self.scale_of(client.rank, name) / self.scale_of(None, name)
                wide[f"{name}.{B}"] = delta[f"{name}.{B}"][:, :r] * factor
        return wide

    def sync(self, base: Tree) -> None:
        """Frozen weights := original + merge_B @ merge_A, computed from the original each time: nothing drifts."""
        if base is self._base or (not base and not self._base):
            return
        if not self.variant.merges:
            super().sync(base)
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

    def accumulate(self, base: Tree, merge: Tree) -> Tree:
        """Factors side by side, multiplied out where they have become wider than the weight."""
        return slimmed(beside(base, merge)) if self.variant.merges else super().accumulate(base, merge)

    @torch.no_grad()
    def merge(self, tree: Tree) -> None:
        """Put the adapter into the frozen weights and biases, for good."""
        for name, layer in self.sites.items():
            weight = layer.weight
            assert isinstance(weight, Tensor)
            w_OD = weight.double().T if isinstance(layer, Conv1D) else weight.double()
            ba_OD = self.scale_of(None, name) * tree[f"{name}.{B}"].double() @ tree[f"{name}.{A}"].double()
            merged_OD = self.variant.merged(w_OD, ba_OD, self._more(tree, name))
            weight.copy_(merged_OD.T if isinstance(layer, Conv1D) else merged_OD)
        for name, module in self.biased.items():
            module.bias.copy_(tree[f"{name}.bias"])  # type: ignore[operator]

    # ---- files -----------------------------------------------------------------------------------------------------

    def export(self, tree: Tree, path: Path) -> None:
        """A PEFT adapter folder; what was merged into the base is stacked into the factors, so the logits are equal.

        Raises:
            UserError: `tree` is not one of this adapter's.
        """
        self.check(tree)
        tensors: dict[str, Tensor] = {}
        whole = dict(tree)
        ranks, own = self.ranks, {}
        if self._base:  # the merged factors have their scale in them already
            for name in self.sites:
                a_RD, b_OR = tree[f"{name}.{A}"], tree[f"{name}.{B}"]
                a_SD = self._base.get(f"{name}.{MERGE_A}", a_RD[:0])
                b_OS = self._base.get(f"{name}.{MERGE_B}", b_OR[:, :0])
                whole[f"{name}.{A}"] = torch.cat([a_RD, a_SD])
                whole[f"{name}.{B}"] = torch.cat([b_OR * self.scale_of(None, name), b_OS], 1)
                own[name] = len(a_RD) + len(a_SD)
            most = max(own.values())
            own = {name: rank for name, rank in own.items() if rank != most}
            ranks = Ranks(most, most, rank_pattern=own, alpha_pattern=own)
        for name, leaf in whole.items():
            if not name.startswith(FIXED):
                tensors[PEFT_PREFIX + self._file_name(name)] = leaf
        conv = [isinstance(layer, Conv1D) for layer in self.sites.values()]
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base_name,
            "r": ranks.rank,
            "lora_alpha": ranks.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": ranks.use_rslora,
            "rank_pattern": dict(ranks.rank_pattern),
            "alpha_pattern": dict(ranks.alpha_pattern),
            "target_modules": short_names(self.model, self.sites),
            "bias": self.bias,
            "fan_in_fan_out": all(conv),
            **self.variant.config,
        }
        write_folder(path, config, tensors)

    def _file_name(self, name: str) -> str:
        """PEFT's name of a leaf: the bias of an adapted layer is that of the layer inside."""
        layer = name.removesuffix(".bias")
        return f"{layer}.base_layer.bias" if layer != name and layer in self.sites else name

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model and ranks; the message lists what differs."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, layer in self.sites.items():
            (d, o), rank = features(layer), self.ranks.at(name)
            wanted[f"{name}.{A}"], wanted[f"{name}.{B}"] = (rank, d), (o, rank)
            wanted.update({f"{name}.{own}": tuple(leaf.shape) for own, leaf in self.variant.leaves(layer).items()})
        for name, module in self.biased.items():
            wanted[f"{name}.bias"] = tuple(module.bias.shape)  # type: ignore[arg-type]
        check_tree(tree, wanted)

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a PEFT adapter folder written for this model, these ranks and scales.

        Raises:
            UserError: files are missing, or the adapter does not match the model.
        """
        config, tensors = read_folder(path, "LORA")
        theirs = ranks_of_config(config)
        other = [name for name in self.sites if not math.isclose(theirs.scale(name), self.scale_of(None, name))]
        if other or bool(config.get("use_dora")) != bool(self.variant.config.get("use_dora")):
            mine = f"r {self.rank} and alpha {self.alpha}"
            raise UserError(
                f"{path} has r {theirs.rank} and alpha {theirs.alpha}, this {self.kind} adapter {mine}"
                + (f": {other[0]} is scaled by {theirs.scale(other[0]):g} there" if other else ""),
                code="adapter.mismatch",
            )
        first = next(iter(self.sites.values()))
        dtype, device = adapter_dtype(first.weight), next(iter(self.devices.values()))
        tree = {
            name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): leaf.to(dtype).to(device)  # type: ignore[arg-type]
            for name, leaf in tensors.items()
        }
        self.check(tree)
        return tree

    # ---- the layers ------------------------------------------------------------------------------------------------

    def _more(self, tree: Tree, name: str) -> dict[str, Tensor]:
        return {own: tree[f"{name}.{own}"] for own in self.variant.names}

    @contextlib.contextmanager
    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        first = next(iter(tree_C.values()))
        scale_CL = tree_C.get(SCALE)
        if scale_CL is None:
            scale_CL = self._scales(first).expand(first.shape[0], -1)
        for i, (name, layer) in enumerate(self.sites.items()):
            drop = self._dropout(name, seed_C) if self.dropout and seed_C is not None else None
            a_CRD, b_COR = tree_C[f"{name}.{A}"], tree_C[f"{name}.{B}"]
            self._bound[name] = Bound(layer, a_CRD, b_COR, scale_CL[:, i], drop, self._more(tree_C, name))
        self._biases.update({name: tree_C[f"{name}.bias"] for name in self.biased})
        try:
            yield
        finally:
            self._bound.clear()
            self._biases.clear()

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
            return None if bound is None else self.variant.apply(args[0], out, bound)

        return hook

    def _bias_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            bias_CO = self._biases.get(name)
            if bias_CO is None:
                return None
            moved_C1O = (bias_CO - module.bias)[:, None].to(out.dtype)  # type: ignore[operator]
            return (out.reshape(len(bias_CO), -1, out.shape[-1]) + moved_C1O).view_as(out)

        return hook


def find_biases(model: nn.Module, sites: Mapping[str, nn.Module], which: Bias) -> dict[str, nn.Module]:
    """Modules whose biases are trained, by name.

    Raises:
        UserError: there is no such bias, or one is added by a module that does not end with adding it.
    """
    if which == "none":
        return {}
    every = dict(sites) if which == "lora_only" else dict(model.named_modules())
    found = {name: module for name, module in every.items() if isinstance(getattr(module, "bias", None), nn.Parameter)}
    if not found:
        where = "the adapted layers have" if which == "lora_only" else "this model has"
        raise UserError(f"bias is {which}, but {where} no bias", "adapter.bias: none", "adapter.bias")
    strange = [name for name, module in found.items() if not isinstance(module, nn.Linear | Conv1D | nn.LayerNorm)]
    if strange:
        raise UserError(
            f"bias is {which}, but that of {strange[0]} ({type(found[strange[0]]).__name__}) cannot be trained",
            "adapter.bias: lora_only, or none",
            "adapter.bias",
        )
    return found


def ranks_of_config(config: Mapping[str, Any]) -> Ranks:
    """The ranks and scales that a PEFT folder's settings say."""
    return Ranks(
        int(config["r"]),
        float(config["lora_alpha"]),
        bool(config.get("use_rslora")),
        dict(config.get("rank_pattern") or {}),
        dict(config.get("alpha_pattern") or {}),
    )
