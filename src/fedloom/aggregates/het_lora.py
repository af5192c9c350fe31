"""HetLoRA (Cho et al. 2024): clients of different ranks, zero padded and weighed by how much they have learnt."""

from __future__ import annotations

from torch import Tensor

from fedloom.aggregates.mean import add_uploads
from fedloom.aggregates.parts import all_of, exact_downlink, needs_replace
from fedloom.errors import RunError
from fedloom.ops.low_rank import A, B, Scale, layers_of, others, own_factors, pad_like, scale_at
from fedloom.tree import scale as scaled
from fedloom.types import Aggregate, Proposal, Tree, Upload


def het_lora(*, norm_weighted: bool = True, scale: Scale = 1.0) -> Aggregate:
    """A = sum_k p_k [A_k; 0], B = sum_k p_k [B_k 0], with p_k in proportion to ||B_k A_k|| (sparsity weighting).

    A client starts from the first r rows and columns (truncation) and sends factors of its own rank. Unlike the mean of
    deltas, rows that low-rank clients do not have shrink with every round, as published. The paper's pruning of ranks
    during training is not part of this rule.

    Args:
        norm_weighted: False weighs by the clients' own weights (their training rows) instead.
        scale: what the adapter multiplies B A by, where layers differ in it: the norm is of what is added to W.
    """

    def lift(params: Tree, delta: Tree, weight: float) -> Upload:
        layers = layers_of(params)
        if not any(f"{layer}.{factor}" in delta for layer in layers for factor in (A, B)):
            raise RunError("the clients' uploads hold no LoRA factors", code="aggregate.no_lora")
        padded: dict[str, Tensor] = {name: params[name] + leaf for name, leaf in others(delta).items()}
        square = 0.0
        for layer in layers:
            a_SD, b_OS = own_factors(params, delta, layer)
            padded[f"{layer}.{A}"] = pad_like(a_SD, params[f"{layer}.{A}"])
            padded[f"{layer}.{B}"] = pad_like(b_OS, params[f"{layer}.{B}"])
            # ||B A||^2 = <B'B, A A'>, of two small matrices
            own = float(((b_OS.double().mT @ b_OS.double()) * (a_SD.double() @ a_SD.double().mT)).sum())
            square += own * scale_at(scale, layer) ** 2
        share = max(square, 1e-24) ** 0.5 if norm_weighted else weight
        return Upload(scaled(padded, share), share)

    def finish(params: Tree, total: Upload) -> Proposal:
        return Proposal({**params, **scaled(total.tree, 1 / total.weight)})

    return Aggregate(lift, add_uploads, finish, all_of(needs_replace("het_lora"), exact_downlink("het_lora")))
