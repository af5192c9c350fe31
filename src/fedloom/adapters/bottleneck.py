"""Bottleneck adapters: y + U act(D y + b) + c on what a part of each block gives, before it is added to the residual.

Houlsby et al. 2019, section 2.1, have one after the attention and one after the MLP; Pfeiffer et al. 2021 keep the one
after the MLP only. Both papers' models normalise after the sum; in models that normalise first the adapter stands
behind the part's last projection, as Houlsby et al. define it (LLM-Adapters, Hu et al. 2023, calls it the series
adapter). They also train the layer norms, which is not done here. PEFT has no such kind.

A client sends the change of all D, b, U and c. D is drawn near zero as in Houlsby et al. (a normal of 0.01, cut at two
deviations); U begins at zero, so that the start is the base itself.

Shape suffixes: C clients, N positions of a client's rows, H hidden size, R bottleneck size.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedloom.adapters.frame import Frame, adapter_dtype, check_tree
from fedloom.adapters.targets import decoder_blocks, is_linear
from fedloom.errors import UserError
from fedloom.seeds import generator
from fedloom.types import Tree

After = Literal["attention_and_mlp", "mlp"]
NonLinearity = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
PEFT_TYPE = "FEDLOOM_BOTTLENECK"  # PEFT refuses the folder by this name
DOWN, DOWN_BIAS, UP, UP_BIAS = "adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias"


def bottleneck(
    model: nn.Module,
    *,
    size: int | None = None,
    reduction_factor: float = 16.0,
    non_linearity: NonLinearity = "relu",
    after: After = "attention_and_mlp",
    base_name: str = "",
) -> Bottleneck:
    """Adapters in every block of a frozen causal LM.

    Args:
        model: a Hugging Face causal LM with a stack of blocks; it is frozen and gets hooks.
        size: R; by default the hidden size divided by `reduction_factor`, at least 1.
        reduction_factor: 16 is Pfeiffer et al.'s; Houlsby et al. tune R.
        non_linearity: act.
        after: "attention_and_mlp" (Houlsby) or "mlp" (Pfeiffer).
        base_name: for the exported folder's `base_model_name_or_path`.

    Raises:
        UserError: a size is out of range, or the blocks have no attention or no MLP that can be found.
    """
    hidden = int(getattr(getattr(model, "config", None), "hidden_size", 0))
    if reduction_factor <= 0 or (size is not None and size < 1):
        wrong = f"bottleneck_size is {size}" if size is not None else f"reduction_factor is {reduction_factor}"
        raise UserError(f"{wrong}, must be above 0", code="adapter.bottleneck")
    sites = find_sites(model, after)
    return Bottleneck(
        model, sites, hidden, size or max(1, round(hidden / reduction_factor)), non_linearity, after, base_name
    )


def find_sites(model: nn.Module, after: After) -> dict[str, nn.Module]:
    """The parts of each block whose output gets an adapter, by full name.

    Raises:
        UserError: a block has none of the kind; the message says what it has.
    """
    found: dict[str, nn.Module] = {}
    for name, block in decoder_blocks(model).items():
        parts = {child: module for child, module in block.named_children() if any(map(is_linear, module.modules()))}
        attention = [child for child in parts if "attn" in child or "attention" in child]
        rest = [child for child in parts if child not in attention]
        mlp = [child for child in rest if not is_linear(parts[child])] or rest[-1:]  # OPT's two layers are no module
        if len(attention) != 1 or len(mlp) != 1:
            raise UserError(
                f"{name} has no single attention and MLP among its parts, which are: {', '.join(parts) or 'none'}",
                hint="adapter.kind: lora works on layers by name",
                code="adapter.bottleneck",
            )
        for child in (attention if after == "attention_and_mlp" else []) + mlp:
            found[f"{name}.{child}"] = parts[child]
    return found


class Bottleneck(Frame):
    """The adapter; see `bottleneck`."""

    kind = "bottleneck"

    def __init__(
        self,
        model: nn.Module,
        sites: dict[str, nn.Module],
        hidden: int,
        size: int,
        non_linearity: NonLinearity,
        after: After,
        base_name: str,
    ) -> None:
        super().__init__(model, self._put_on)
        self.sites, self.hidden, self.size, self.after = sites, hidden, size, after
        self.non_linearity, self.base_name = non_linearity, base_name
        self._tree: Tree | None = None
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in sites.items()]

    def detach(self) -> None:
        """Take the hooks off; the model is as it was (frozen)."""
        for handle in self._handles:
            handle.remove()

    def init(self, seed: int) -> dict[str, Tensor]:
        """D near zero, U zero: nothing is changed yet."""
        first = next(self.model.parameters())
        tree: dict[str, Tensor] = {}
        for name in self.sites:
            draw = generator(seed, 0, "", f"bottleneck/{name}")
            down_RH = torch.empty(self.size, self.hidden, dtype=torch.float64)
            nn.init.trunc_normal_(down_RH, std=0.01, a=-0.02, b=0.02, generator=draw)
            tree[f"{name}.{DOWN}"] = down_RH
            tree[f"{name}.{DOWN_BIAS}"] = torch.zeros(self.size)
            tree[f"{name}.{UP}"] = torch.zeros(self.hidden, self.size)
            tree[f"{name}.{UP_BIAS}"] = torch.zeros(self.hidden)
        return {name: leaf.to(first.device, adapter_dtype(first)) for name, leaf in tree.items()}

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model and size."""
        shapes = {
            DOWN: (self.size, self.hidden),
            DOWN_BIAS: (self.size,),
            UP: (self.hidden, self.size),
            UP_BIAS: (self.hidden,),
        }
        check_tree(tree, {f"{name}.{leaf}": shape for name in self.sites for leaf, shape in shapes.items()})

    def merge(self, tree: Tree) -> None:
        raise UserError(
            "bottleneck adapters have a non-linearity, so they cannot be added to the weights",
            "export the adapter: --format lora writes its folder",
            "export.kind",
        )

    def export(self, tree: Tree, path: Path) -> None:
        """A folder of fedloom's own (safetensors and JSON, laid out like PEFT's), which `load` reads; PEFT does not."""
        self.check(tree)
        config = {
            "peft_type": PEFT_TYPE,
            "note": "PEFT has no such kind; fedloom opens this folder (chat, eval, generate)",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_name,
            "bottleneck_size": self.size,
            "non_linearity": self.non_linearity,
            "bottleneck_after": self.after,
        }
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tree.items()}
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a folder that `export` wrote for this model and size.

        Raises:
            UserError: it is none, or does not match.
        """
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / name).is_file():
                raise UserError(f"{path} is not an adapter folder: there is no {name}", code="adapter.missing")
        first = next(self.model.parameters())
        tensors = load_file(path / "adapter_model.safetensors")
        tree = {name: leaf.to(first.device, adapter_dtype(first)) for name, leaf in tensors.items()}
        self.check(tree)
        return tree

    @contextlib.contextmanager
    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        self._tree = tree_C
        try:
            yield
        finally:
            self._tree = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if self._tree is None:
                return None
            leaves = [self._tree[f"{name}.{leaf}"] for leaf in (DOWN, DOWN_BIAS, UP, UP_BIAS)]
            act = ACTIVATIONS[self.non_linearity]
            if isinstance(out, tuple):  # attention gives its weights, too
                return (cohort_bottleneck(out[0], act, *leaves), *out[1:])
            return cohort_bottleneck(out, act, *leaves)

        return hook


def cohort_bottleneck(
    y: Tensor,
    act: Callable[[Tensor], Tensor],
    down_CRH: Tensor,
    down_bias_CR: Tensor,
    up_CHR: Tensor,
    up_bias_CH: Tensor,
) -> Tensor:
    """y + U act(D y + b) + c, with the cohort outermost in the first axis of y [C * B, ..., H]."""
    c = down_CRH.shape[0]
    down, down_bias, up, up_bias = (leaf.to(y.dtype) for leaf in (down_CRH, down_bias_CR, up_CHR, up_bias_CH))
    y_CNH = y.reshape(c, -1, y.shape[-1])
    z_CNR = act(torch.baddbmm(down_bias[:, None], y_CNH, down.mT))
    return (y_CNH + torch.baddbmm(up_bias[:, None], z_CNR, up.mT)).view_as(y)
