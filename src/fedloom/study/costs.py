"""What a run costs, as far as it is counted here: samples, FLOPs, memory.

FLOPs are an estimate in closed form. A multiplication and an addition are two; only matrix products are counted. With
T tokens through the model, M of them targets of the loss, and P the sum over rows of (tokens in the row)^2:

    2 F T      the model's matrices, forward (F: their parameters, embeddings and output head aside)
    2 G T      activations' gradients back through them (G: those that a gradient has to pass)
    2 W T      gradients of the model's own matrices that are trained (W: their parameters; all of F in full tuning)
    6 N T      the adapter: forward, and two products backward (N: parameters that it adds)
    4 H M      the output head at the targets, forward and back (H: its parameters; nothing else is looked at there);
               6 H M where it is trained itself
    4 L D P    attention: scores and mixtures, forward (L layers, D = heads x head size; the masked half is counted, as
               torch's counter does), and 8 K D P backward in the K layers whose attention has a gradient

A loss that compares with a reference (`fedloom.adapters.dpo`) has one more forward pass without the adapter: 2 F T,
2 H M and 4 L D P.

Virtual tokens stand before each row: as embeddings they are tokens like any other (T and P grow by them), as keys and
values only P grows; nothing of them is a matrix that tokens pass, so N is 0 but for the encoder that makes them, which
works once a step.

Where blocks run again in the backward pass (`fedloom.adapters.recompute`), that is one more forward pass through them:
2 F' T, 2 N T and 4 L' D P, of the matrices and attentions that do run again (a block stops where nothing of the rest
is needed; that of the adapter's last product is counted all the same).

Without gradients (MeZO, FedKSeed) a step is two forward passes: 4 F T, 4 N T, 4 H M and 8 L D P. Making the directions
is no matrix product and not counted.

`flops` takes real tokens, `flops_padded` those of padded rows; packed rows (`models/rows.py`) compute less than either.
Mixtures of experts are not modelled.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.data.batches import Batches, lengths_of
from fedloom.data.pair_batches import PairBatches
from fedloom.models.quantised import num_weights
from fedloom.tree import num_elements
from fedloom.types import Adapter, Tree

__all__ = ["Flops", "Work", "peak_memory_bytes", "reset_peak_memory", "training_flops", "work_of"]

_PROBE_TOKENS = 4


class Flops(NamedTuple):
    """FLOPs of training by what goes through the model."""

    per_token: float
    per_target: float
    per_pair: float  # of two tokens of one row
    per_step: float = 0.0
    embedded: int = 0  # virtual tokens before each row
    cached: int = 0  # virtual keys and values before each row

    def of(self, *, tokens: float, targets: float, pairs: float, rows: float, steps: float) -> float:
        """Of so much work; `pairs` is the sum over rows of tokens^2."""
        pairs += self.cached * tokens + self.embedded * (2 * tokens + self.embedded * rows)
        tokens += self.embedded * rows
        return self.per_token * tokens + self.per_target * targets + self.per_pair * pairs + self.per_step * steps


class Work(NamedTuple):
    """The shape of one client's batches of a round."""

    tokens: float
    pairs: float  # sum over rows of tokens^2
    padded_tokens: float
    padded_pairs: float
    rows: float  # through the model: two for a pair of answers
    targets: float | None = None  # answer tokens, where the loss is no mean over them

    @property
    def padded_pairs_per_token(self) -> float:
        return self.padded_pairs / self.padded_tokens if self.padded_tokens else 0.0


def work_of(batches: Batches | PairBatches) -> Work:
    """Counted from the plan: no tensor is made."""
    lengths = lengths_of(batches.examples)
    tokens = pairs = padded_tokens = padded_pairs = rows = 0.0
    paired = isinstance(batches, PairBatches)
    targets = 0.0
    for places in batches.plan:
        rows += len(places)
        if isinstance(batches, PairBatches):
            targets += float(batches.examples.tokens.targets[batches.examples.numbers[places]].sum())
        own = lengths[places].astype(np.float64)
        longest = float(own.max())
        tokens += float(own.sum())
        pairs += float((own * own).sum())
        padded_tokens += len(own) * longest
        padded_pairs += len(own) * longest * longest
    return Work(tokens, pairs, padded_tokens, padded_pairs, rows, targets if paired else None)


def training_flops(adapter: Adapter, params: Tree, *, gradients: bool = True) -> Flops:
    """The formula's factors for an adapter on its model; without `gradients` a step is two losses.

    Which matrices a gradient passes through, and which are trained, is found by a forward pass of a few tokens.
    """
    model: Any = adapter.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    whole = getattr(getattr(adapter, "causal", None), "head", None) is None  # then it works on every position
    forward = backward = again = 0
    head_is_trained = False
    attention: dict[str, bool] = {}  # of each attention: whether its last matrix, and so its mixture, has a gradient
    mixed_again: dict[str, bool] = {}  # of each attention: whether it runs again
    names = {module: name for name, module in model.named_modules()}
    for layer, (passes, trained, runs_again) in _matrices(adapter, params, gradients=gradients):
        if layer is head:
            head_is_trained = trained
        else:
            forward += num_weights(layer)
            backward += num_weights(layer) * (passes + trained)
            again += num_weights(layer) * runs_again
            parts = names[layer].split(".")
            within = [i for i, part in enumerate(parts) if "attn" in part or "attention" in part]
            if within:
                attention[".".join(parts[: within[0] + 1])] = passes
                mixed_again[".".join(parts[: within[0] + 1])] = runs_again
    own_names = {name for name, _ in model.named_parameters()}
    added = {name: leaf for name, leaf in params.items() if name not in own_names}
    added = {name: leaf for name, leaf in added.items() if name.partition("/")[2] not in params}  # control variates
    own = float(num_elements(added))
    virtual: Any = getattr(adapter, "virtual", None)
    number, in_cache = (0, False) if virtual is None else (int(virtual.number), bool(virtual.in_cache))
    weight = getattr(head, "weight", None)
    head_size = weight.numel() if isinstance(weight, Tensor) else 0
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    size = getattr(config, "head_dim", None) or (int(getattr(config, "hidden_size", 0)) // heads if heads else 0)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    per_token = 2.0 * forward + 2.0 * backward + (6.0 * own if virtual is None else 0.0)
    per_token += 2.0 * again + (2.0 * own if again and virtual is None else 0.0)
    encoder = 0.0 if virtual is None or in_cache else 6.0 * number * _encoder_elements(params)
    per_target = (6.0 if head_is_trained else 4.0) * head_size
    if not gradients:
        matrices = [leaf for name, leaf in params.items() if leaf.ndim == 2 and name not in own_names]
        per_token = 4.0 * forward + (4.0 * sum(leaf.numel() for leaf in matrices) if virtual is None else 0.0)
        per_target, encoder = 4.0 * head_size, encoder * 4 / 6
    if whole:
        per_token, per_target = per_token + per_target, 0.0
    with_graph = sum(attention.values()) / len(attention) if attention else 1.0
    twice = sum(mixed_again.values()) / len(mixed_again) if mixed_again else float(bool(again))
    pair = (4.0 + 8.0 * with_graph + 4.0 * twice if gradients else 8.0) * layers * heads * int(size)
    if hasattr(adapter, "rewards"):  # the reference's pass, once for each loss
        losses = 1 if gradients else 2
        per_token, per_target = per_token + 2.0 * losses * forward, per_target + 2.0 * losses * head_size
        pair += 4.0 * losses * layers * heads * int(size)
    return Flops(per_token, per_target, pair, encoder, 0 if in_cache else number, number if in_cache else 0)


def _encoder_elements(params: Tree) -> int:
    """Parameters in the matrices of an encoder of virtual tokens: all of two dimensions but the embeddings."""
    return sum(leaf.numel() for name, leaf in params.items() if leaf.ndim == 2 and "embedding" not in name)


def _matrices(adapter: Adapter, params: Tree, *, gradients: bool) -> Iterator[tuple[Any, tuple[bool, bool, bool]]]:
    """The linear layers that a forward pass uses.

    Of each: does a gradient go back through it, is its weight trained, does it run again in the backward pass.
    """
    seen: dict[nn.Module, tuple[bool, bool]] = {}
    runs: dict[nn.Module, int] = {}

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        before, weight = seen.get(layer, (False, False)), layer.weight
        assert isinstance(weight, Tensor)
        seen[layer] = (before[0] or bool(args[0].requires_grad), bool(weight.requires_grad))

    def count(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        runs[layer] = runs.get(layer, 0) + 1

    leaves = {name: leaf[None].detach() for name, leaf in params.items()}
    leaves = {name: leaf.requires_grad_() if leaf.is_floating_point() else leaf for name, leaf in leaves.items()}
    device = next(iter(leaves.values())).device
    vocabulary = int(getattr(adapter.model.config, "vocab_size", _PROBE_TOKENS))
    probe = torch.arange(_PROBE_TOKENS, device=device)[None] % vocabulary
    with contextlib.ExitStack() as stack:
        for layer in adapter.model.modules():
            if isinstance(layer, nn.Linear | Conv1D):
                # before an adapter's own hook: a second run may end in that one, after the product was made
                handles = layer.register_forward_pre_hook(look), layer.register_forward_hook(count, prepend=True)
                for handle in handles:
                    stack.callback(handle.remove)
        with torch.enable_grad(), adapter.bound(leaves) as model:
            out = model(input_ids=probe, use_cache=False).logits
        once = dict(runs)
        if gradients and getattr(adapter, "recomputes", False):
            free = [leaf for leaf in leaves.values() if leaf.requires_grad]
            torch.autograd.grad(out.float().sum(), free, allow_unused=True)
    for layer, (passes, trained) in seen.items():
        yield layer, (passes, trained, runs[layer] > once[layer])


# ---- memory ----------------------------------------------------------------------------------------------------------


def reset_peak_memory() -> bool:
    """Let the peak start anew. False where the system cannot: what is read then is the peak since the start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # the allocator is told to keep what is freed (ops.host)
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _high_water() is not None


def peak_memory_bytes() -> int:
    """Of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    found = _high_water()
    if found is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _high_water() -> int | None:
    """The process's peak of resident memory as Linux keeps it, which can be reset."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
