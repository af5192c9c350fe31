"""A causal LM taken apart: the body that gives hidden states, and the head that gives logits.

Taken apart, the head works on labelled positions only, in chunks. Whether the two halves put together are the model is
tried on a few tokens; a model with something else in between is used whole.

Shape suffixes: N rows, T tokens, D hidden size, V vocabulary, M labelled positions or targets, P places
whose next token is asked about.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom.models.rows import Rows
from fedloom.ops.cross_entropy import CHUNK_BYTES, Head, logits, nll_chunked
from fedloom.ops.per_client import PerClient, raw
from fedloom.types import NOTHING

log = logging.getLogger("fedloom")


class CausalLM:
    """Negative log-likelihoods of a causal LM, with whatever weights it has at the moment."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._head = _head_of(model)
        self.rows = Rows(model, body_of(model))

    def run_whole(self) -> None:
        """Let the output layer itself make the logits: something is done to it that its weights do not tell."""
        self._head = None

    @property
    def head(self) -> Head | None:
        """The head with the weights that the model's output layer has now; None where the model is used whole."""
        if self._head is None:
            return None
        layer: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return self._head._replace(weight_VD=layer.weight, bias_V=layer.bias)

    def nll(self, input_ids_NT: Tensor, labels_NT: Tensor, clients: int = 1) -> tuple[Tensor, Tensor]:
        """(nll_M in nats, row_M): one for each position whose next token is labelled, and the row it is in.

        Rows are padded on the right, so the causal mask alone keeps padding away from every labelled position. The rows
        of a client stand together, and there are as many of each of the `clients`.
        """
        targets_NT = labels_NT[:, 1:]
        row_M, position_M = (targets_NT != -100).nonzero(as_tuple=True)
        target_M = targets_NT[row_M, position_M]
        head = self.head
        if head is None:
            z = self.model(input_ids=input_ids_NT, use_cache=False).logits
            z_MV = z[row_M, position_M].float() if z.dtype != torch.float64 else z[row_M, position_M]
            return nn.functional.cross_entropy(z_MV, target_M, reduction="none"), row_M
        hidden_MD = self.rows.hidden(input_ids_NT, row_M, position_M, clients)
        if not isinstance(head.weight_VD, PerClient):
            return nll_chunked(hidden_MD, target_M, head), row_M
        parts = []
        for rows, one in _heads_of(head, row_M, len(input_ids_NT)):
            parts.append(nll_chunked(hidden_MD[rows], target_M[rows], one))
        return torch.cat(parts), row_M

    @torch.no_grad()
    def at(
        self,
        input_ids_NT: Tensor,
        row_P: Tensor,
        position_P: Tensor,
        place_M: Tensor,
        target_M: Tensor,
        given: Mapping[str, Any] = NOTHING,
    ) -> Likely:
        """How likely each target is as the next token at its place: the log-likelihood, and whether none is likelier.

        Only the logits of the P places are computed, in chunks. Rows are padded on the right.

        Args:
            input_ids_NT: what the model reads.
            row_P: the row of each place.
            position_P: the position of each place; the token after it is what is asked about.
            place_M: the number of the place that each target belongs to, rising.
            target_M: token ids.
            given: what goes with a cache of what stands before the rows; nothing where they begin here.
        """
        head = self.head
        given = given or {"use_cache": False}
        if head is None:
            z = self.model(input_ids=input_ids_NT, **given).logits
            read_PX = z[row_P, position_P]
        else:
            if "past_key_values" in given:
                hidden_NTD = body_of(self.model)(input_ids=input_ids_NT, **given)[0]
                read_PX = hidden_NTD[row_P, position_P]
            else:
                read_PX = self.rows.hidden(input_ids_NT, row_P, position_P, 1)
            if isinstance(head.weight_VD, PerClient):
                raise RuntimeError("likelihoods of single targets are asked of one client's model at a time")
        size = head.weight_VD.shape[0] if head is not None else read_PX.shape[1]
        rows = max(64, CHUNK_BYTES // (4 * size))
        parts = []
        for start in range(0, len(read_PX), rows):
            read = read_PX[start : start + rows]
            z_PV = logits(read, head) if head is not None else read if read.dtype == torch.float64 else read.float()
            mine = (place_M >= start) & (place_M < start + rows)
            place, target = place_M[mine] - start, target_M[mine]
            picked = z_PV[place, target]
            parts.append(Likely(picked - z_PV.logsumexp(1)[place], picked >= z_PV.amax(1)[place]))
        return Likely(torch.cat([part.loglikelihood_M for part in parts]), torch.cat([part.first_M for part in parts]))


class Likely(NamedTuple):
    """Of each target: its log-likelihood in nats, and whether no token is more likely."""

    loglikelihood_M: Tensor
    first_M: Tensor


def body_of(model: nn.Module) -> nn.Module:
    """The model without its output head."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None)
    return body if isinstance(body, nn.Module) else model


def _heads_of(head: Head, row_M: Tensor, num_rows: int) -> Iterator[tuple[slice, Head]]:
    """Where clients have heads of their own: each client's part of the rising `row_M`, and its head."""
    weights, biases = raw(head.weight_VD), raw(head.bias_V)
    counts = torch.bincount(row_M // (num_rows // len(weights)), minlength=len(weights)).tolist()
    start = 0
    for client, (count, weight_VD) in enumerate(zip(counts, weights.unbind(0), strict=True)):
        bias_V = biases[client] if isinstance(head.bias_V, PerClient) else head.bias_V
        yield slice(start, start + count), head._replace(weight_VD=weight_VD, bias_V=bias_V)
        start += count


def _head_of(model: nn.Module) -> Head | None:
    find = getattr(model, "get_output_embeddings", None)
    layer: Any = find() if find is not None else None
    config: Any = getattr(model, "config", None)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or body_of(model) is model:
        _say_whole("its output layer is not a plain matrix")
        return None
    if weight.device.type == "meta":  # shapes without numbers: sizes can be told of them, and nothing be computed
        return None
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(
        weight,
        getattr(layer, "bias", None),
        scale,
        getattr(config, "final_logit_softcapping", None),
    )
    probe = torch.arange(4, device=weight.device)[None] % weight.shape[0]
    with torch.no_grad():
        want = model(input_ids=probe, use_cache=False).logits[0].double()
        hidden = body_of(model)(input_ids=probe, use_cache=False)[0]
        if hidden.shape[-1] != weight.shape[1]:
            _say_whole("its head does not take the hidden state as it is")
            return None
        got = logits(hidden[0], head).double()
    tolerance = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if got.shape != want.shape or float((got - want).abs().max()) > tolerance * (1 + float(want.abs().max())):
        _say_whole("its head does more than a matrix product")
        return None
    return head


def _say_whole(reason: str) -> None:
    log.info("this model's logits are computed whole (more memory): %s", reason)
