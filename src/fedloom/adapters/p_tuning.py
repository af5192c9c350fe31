"""P-tuning (Liu et al. 2021): virtual tokens that a small encoder makes, before every text.

The encoders are those of PEFT, with its names. Trained and sent are the encoder's weights; an exported folder holds
only the embeddings that it gives in the end.

Shape suffixes: C clients, P virtual tokens, D hidden size, H the encoder's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedloom.adapters.frame import Frame, adapter_dtype, check_tree
from fedloom.adapters.prompt_tuning import PROMPT, read_prompt, write_prompt
from fedloom.adapters.virtual import Virtual, per_row
from fedloom.errors import UserError
from fedloom.seeds import generator
from fedloom.types import Tree

Encoder = Literal["mlp", "lstm"]


def p_tuning(
    model: nn.Module,
    *,
    num_virtual_tokens: int = 20,
    encoder: Encoder = "mlp",
    encoder_hidden_size: int | None = None,
    encoder_num_layers: int = 2,
    base_name: str = "",
) -> PTuning:
    """P embeddings [P, D] through an encoder: three linear layers (MLP), or a bidirectional LSTM and two linear layers.

    Args:
        model: any Hugging Face causal LM whose body takes embeddings; it is frozen and gets hooks.
        num_virtual_tokens: P.
        encoder: "mlp" or "lstm".
        encoder_hidden_size: H; D by default.
        encoder_num_layers: of the LSTM.
        base_name: for the exported adapter's `base_model_name_or_path`.

    Raises:
        UserError: a number is below 1, or the model takes no embeddings.
    """
    small = {"num_virtual_tokens": num_virtual_tokens, "encoder_num_layers": encoder_num_layers}
    if encoder_hidden_size is not None:
        small["encoder_hidden_size"] = encoder_hidden_size
    wrong = [f"{name} is {value}, must be at least 1" for name, value in small.items() if value < 1]
    if wrong:
        raise UserError("; ".join(wrong), code="adapter.prompt")
    return PTuning(model, num_virtual_tokens, encoder, encoder_hidden_size, encoder_num_layers, base_name)


class _Encoder(nn.Module):
    """PEFT's PromptEncoder, module for module."""

    def __init__(self, p: int, d: int, h: int, kind: Encoder, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p, d)
        if kind == "lstm":
            self.lstm_head = nn.LSTM(d, h, num_layers=layers, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            self.mlp_head = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))
        self.kind = kind

    def forward(self) -> Tensor:
        x_PD: Tensor = self.embedding.weight
        if self.kind == "lstm":
            x_PD = self.lstm_head(x_PD[None])[0][0]
        out: Tensor = self.mlp_head(x_PD)
        return out


class PTuning(Frame):
    """The adapter; see `p_tuning`."""

    kind = "p_tuning"
    in_front = True

    def __init__(
        self, model: nn.Module, number: int, kind: Encoder, hidden: int | None, layers: int, base_name: str
    ) -> None:
        self.number, self.encoder_kind, self.base_name = number, kind, base_name
        super().__init__(model, self._put_on)
        self.virtual = Virtual(model, number, in_cache=False)
        weight = self.virtual.embed.weight
        assert isinstance(weight, Tensor)
        self.weight_VD = weight
        d = weight.shape[1]
        with torch.random.fork_rng(devices=[]):  # its own draws are replaced in `init`
            self.encoder = _Encoder(number, d, hidden or d, kind, layers).to(weight.device, adapter_dtype(weight))
        self.hidden, self.layers = hidden or d, layers

    def init(self, seed: int) -> dict[str, Tensor]:
        """Embeddings of unit variance and layers uniform in +-1 / sqrt(inputs), as torch and PEFT begin."""
        tree = {}
        for name, leaf in self.encoder.named_parameters():
            draw = generator(seed, 0, "", f"p_tuning/{name}")
            made = torch.empty(leaf.shape, dtype=torch.float64)
            if name.startswith("embedding"):
                made.normal_(generator=draw)
            else:
                inputs = self.hidden if name.startswith("lstm_head") else self._inputs(name)
                made.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=draw)
            tree[name] = made.to(leaf)
        return tree

    def _inputs(self, name: str) -> int:
        layer = self.encoder.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, nn.Linear)
        return layer.in_features

    def prompt(self, tree: Tree) -> Tensor:
        """The embeddings [P, D] that one client's tree stands for."""
        if PROMPT in tree:  # of an exported folder: the encoder is gone
            return tree[PROMPT]
        made: Tensor = functional_call(self.encoder, dict(tree), ())
        return made

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for this model and encoder."""
        whole = {name: tuple(leaf.shape) for name, leaf in self.encoder.named_parameters()}
        check_tree(tree, {PROMPT: (self.number, self.weight_VD.shape[1])} if PROMPT in tree else whole)

    def export(self, tree: Tree, path: Path) -> None:
        """A PEFT adapter folder of type P_TUNING with the embeddings alone; it gives the same logits."""
        self.check(tree)
        with torch.no_grad():
            prompt = self.prompt(tree)
        write_prompt(
            self.model, prompt, path, "P_TUNING", self.base_name,
            encoder_reparameterization_type=self.encoder_kind.upper(), encoder_hidden_size=self.hidden,
            encoder_num_layers=self.layers, encoder_dropout=0.0,
        )  # fmt: skip

    def load(self, path: Path) -> dict[str, Tensor]:
        """Read a PEFT adapter folder: its embeddings, to be used but not trained further."""
        tree = {PROMPT: read_prompt(path, "P_TUNING").to(self.weight_VD.device, adapter_dtype(self.weight_VD))}
        self.check(tree)
        return tree

    @contextlib.contextmanager
    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        c = next(iter(tree_C.values())).shape[0]
        prompts = [self.prompt({name: leaf[i] for name, leaf in tree_C.items()}) for i in range(c)]
        prompt_CPD = torch.stack(prompts)
        with self.virtual.on(lambda n: per_row(prompt_CPD, n)):
            yield
