"""(IA)^3 (Liu et al. 2022) with a cohort axis: keys, values and the inside of the feed-forward are rescaled.

One trained vector per layer: y = l * (W x + b) on keys and values, y = W (l * x) + b on the last feed-forward layer
(Section 3.3). All begin as ones. A client sends the changes of its vectors.

Shape suffixes: C clients, N examples times tokens, D in-features, O out-features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.frame import Frame, adapter_dtype, check_tree
from fedloom.adapters.targets import IA3_DEFAULTS, IA3_FEEDFORWARD, features, find_targets
from fedloom.errors import UserError
from fedloom.models.peft_folder import PEFT_PREFIX, read_folder, short_names, write_folder
from fedloom.types import FIXED, Tree

L = "ia3_l"  # PEFT's name: [1, D] where it scales the input, [O, 1] where it scales the output


def ia3(
    model: nn.Module,
    *,
    targets: str | Sequence[str] = "auto",
    feedforward: Literal["auto"] | Sequence[str] = "auto",
    base_name: str = "",
) -> Ia3:
    """Vectors on the layers of a frozen causal LM.

    Args:
        model: any Hugging Face causal LM; it is frozen and its layers get hooks.
        targets: names of layers, "all-linear", or "auto": PEFT's choice for the architecture.
        feedforward: those of them whose input is scaled in place of their output; "auto" likewise.
        base_name: for the exported adapter's `base_model_name_or_path`.

    Raises:
        UserError: a name matches nothing, or the architecture has no default.
    """
    sites = find_targets(model, targets, IA3_DEFAULTS, "adapter.ia3_target_modules")
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    ends = IA3_FEEDFORWARD.get(kind, ()) if feedforward == "auto" else tuple(feedforward)
    inside = {name for name in sites if any(name == end or name.endswith("." + end) for end in ends)}
    if feedforward != "auto":
        stray = [end for end in ends if not any(name == end or name.endswith("." + end) for name in sites)]
        if stray:
            raise UserError(
                f"adapter.ia3_feedforward_modules: {', '.join(stray)} is none of the adapted layers",
                f"they end in: {', '.join(sorted({name.rsplit('.', 1)[-1] for name in sites}))}",
                "adapter.targets",
            )
    return Ia3(model, sites, inside, base_name)


class Ia3(Frame):
    """The adapter; see `ia3`."""

    kind = "ia3"

    def __init__(self, model: nn.Module, sites: Mapping[str, nn.Module], feedforward: set[str], base_name: str) -> None:
        super().__init__(model, self._put_on)
        self.sites, self.feedforward, self.base_name = dict(sites), feedforward, base_name
        self._scales: dict[str, Tensor] = {}
        self._handles = [
            layer.register_forward_pre_hook(self._before(name))
            if name in feedforward
            else layer.register_forward_hook(self._after(name))
            for name, layer in self.sites.items()
        ]

    def detach(self) -> None:
        """Take the hooks off; the model is as it was (frozen)."""
        for handle in self._handles:
            handle.remove()

    def _shape(self, name: str) -> tuple[int, int]:
        d, o = features(self.sites[name])
        return (1, d) if name in self.feedforward else (o, 1)

    def init(self, seed: int) -> dict[str, Tensor]:
        """Ones: the model as it is."""
        return {
            f"{name}.{L}": torch.ones(self._shape(name), dtype=adapter_dtype(weight), device=weight.device)
            for name, weight in self._weights()
        }

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self.sites.items():
            weight: Any = layer.weight
            yield name, weight

    @torch.no_grad()
    def merge(self, tree: Tree) -> None:
        """Put the vectors into the frozen weights and biases, for good."""
        for name, weight in self._weights():
            scale = tree[f"{name}.{L}"].double()
            weight.copy_(weight.double() * (scale.T if isinstance(self.sites[name], Conv1D) else scale))
            bias: Any = getattr(self.sites[name], "bias", None)
            if bias is not None and name not in self.feedforward:
                bias.copy_(bias.double() * scale[:, 0])

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model; the message lists what differs."""
        check_tree(tree, {f"{name}.{L}": self._shape(name) for name in self.sites})

    def export(self, tree: Tree, path: Path) -> None:
        """A PEFT adapter folder of type IA3 that gives the same logits."""
        self.check(tree)
        inside = {name: layer for name, layer in self.sites.items() if name in self.feedforward}
        outside = {name: layer for name, layer in self.sites.items() if name not in self.feedforward}
        names = short_names(self.model, inside), short_names(self.model, outside)
        if any(name.endswith(end) for name in outside for end in names[0]):  # PEFT would scale their input, too
            names = sorted(inside), names[1]
        config = {
            "peft_type": "IA3",
            "base_model_name_or_path": self.base_name,
            "target_modules": sorted({*names[0], *names[1]}),
            "feedforward_modules": names[0],
            "fan_in_fan_out": all(isinstance(layer, Conv1D) for layer in self.sites.values()),
        }
        write_folder(path, config, {PEFT_PREFIX + name: x for name, x in tree.items() if not name.startswith(FIXED)})

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a PEFT adapter folder written for this model.

        Raises:
            UserError: files are missing, or the adapter does not match the model.
        """
        _, tensors = read_folder(path, "IA3")
        _, weight = next(self._weights())
        tree = {
            name.removeprefix(PEFT_PREFIX): leaf.to(weight.device, adapter_dtype(weight))
            for name, leaf in tensors.items()
        }
        self.check(tree)
        return tree

    @contextlib.contextmanager
    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        self._scales.update({name: tree_C[f"{name}.{L}"].flatten(1)[:, None] for name in self.sites})
        try:
            yield
        finally:
            self._scales.clear()

    def _before(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            scale_C1D = self._scales.get(name)
            return None if scale_C1D is None else (_scaled(args[0], scale_C1D), *args[1:])

        return hook

    def _after(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            scale_C1O = self._scales.get(name)
            return None if scale_C1O is None else _scaled(out, scale_C1O)

        return hook


def _scaled(x: Tensor, scale_C1X: Tensor) -> Tensor:
    """Each client's rows times its vector, multiplied in the vector's own dtype."""
    x_CNX = x.reshape(len(scale_C1X), -1, x.shape[-1])
    return (x_CNX * scale_C1X).to(x.dtype).view_as(x)
