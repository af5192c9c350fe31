"""Tuning of the last layers: the highest blocks of the decoder are trained, all below them is frozen and shared.

What the field calls freeze-tuning (LLaMA-Factory's `finetuning_type: freeze`; Lee et al. 2019, *What Would Elsa Do?*)
trains the last k blocks whole, norms and biases inside them too, and neither the final norm nor the head; so it is here
by default. `extra` adds them. No graph is made below the lowest trained block: a step needs the backward pass, and the
memory for it, of k blocks only, and a cohort goes through everything below as one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fedloom.adapters.targets import decoder_blocks, final_norms
from fedloom.adapters.weights import OwnWeights
from fedloom.errors import UserError

Extra = Literal["none", "norm", "norm_and_head"]


def last_layers(
    model: nn.Module,
    *,
    layers: int = 2,
    extra: Extra = "none",
    save_tokenizer: Callable[[Path], None] | None = None,
) -> OwnWeights:
    """The weights of the last blocks, under their own names; that is what travels.

    Args:
        model: a Hugging Face causal LM with a stack of blocks; see `full`.
        layers: k, the number of blocks.
        extra: "norm" trains what stands between the last block and the head too, "norm_and_head" the head as well.
        save_tokenizer: writes the tokenizer into an exported folder, which is the whole model's.

    Raises:
        UserError: there are not so many blocks, or the head is to be trained and is the embeddings.
    """
    blocks = decoder_blocks(model)
    if not 1 <= layers <= len(blocks):
        raise UserError(
            f"trainable_layers is {layers}, but the model has {len(blocks)}",
            "adapter.kind: full trains all weights",
            code="adapter.layers",
        )
    trained = tuple(f"{name}." for name in list(blocks)[-layers:])
    if extra != "none":
        trained += tuple(f"{name}." for name in final_norms(model, blocks))
    if extra == "norm_and_head":
        trained += (_head(model),)
    return OwnWeights(model, "last_layers", lambda name: name.startswith(trained), save_tokenizer)


def _head(model: nn.Module) -> str:
    holder: Any = model
    head, table = holder.get_output_embeddings(), holder.get_input_embeddings()
    if head is None or head.weight is table.weight:
        raise UserError(
            "trainable_extra is norm_and_head, but this model's head is its embeddings, which lie below every layer",
            "adapter.trainable_extra: norm, or adapter.kind: full",
            code="adapter.layers",
        )
    return next(f"{name}." for name, module in model.named_modules() if module is head)
