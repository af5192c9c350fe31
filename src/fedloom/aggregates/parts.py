"""What several rules share: summands that are stacked factors, and objections to compositions.

What is sent besides factors (trained biases) is averaged by every rule.
"""

from __future__ import annotations

from torch import Tensor

from fedloom.errors import RunError
from fedloom.ops.low_rank import MERGE_A, MERGE_B, A, B, beside, layers_of, others, own_factors, stacked
from fedloom.tree import add, scale
from fedloom.types import Algorithm, Check, Tree, Upload


def stack_lift(params: Tree, delta: Tree, weight: float) -> Upload:
    """A client's factors, B times its weight, at its own rank; the rest of its change, times its weight.

    Raises:
        RunError: the client sent no LoRA factors.
    """
    layers = layers_of(params)
    if not any(f"{layer}.{factor}" in delta for layer in layers for factor in (A, B)):
        raise RunError("the clients' uploads hold no LoRA factors", code="aggregate.no_lora")
    parts = {layer: own_factors(params, delta, layer) for layer in layers}
    factors = stacked({layer: (a_SD, b_OS * weight) for layer, (a_SD, b_OS) in parts.items()})
    return Upload({**factors, **scale(others(delta), weight)}, weight)


def stack_add(a: Upload, b: Upload) -> Upload:
    """Factors side by side stand for the sum of products; they grow with the cohort, as the method does."""
    metrics = {key: a.metrics.get(key, 0.0) + b.metrics.get(key, 0.0) for key in {**a.metrics, **b.metrics}}
    (factors_a, sums_a), (factors_b, sums_b) = _parted(a.tree), _parted(b.tree)
    return Upload({**beside(factors_a, factors_b), **add(sums_a, sums_b)}, a.weight + b.weight, metrics)


def _parted(tree: Tree) -> tuple[Tree, Tree]:
    """(factors of products, what is simply added)."""
    factors = {name: leaf for name, leaf in tree.items() if name.endswith((MERGE_A, MERGE_B))}
    return factors, {name: leaf for name, leaf in tree.items() if name not in factors}


def averaged(params: Tree, total: Upload) -> dict[str, Tensor]:
    """The parameters, with what is no factor moved by the mean of the clients' changes."""
    step = others(total.tree)
    return {**params, **{name: params[name] + leaf.to(params[name]) / total.weight for name, leaf in step.items()}}


def needs_replace(name: str) -> Check:
    """The proposal is not a step from the parameters, so an optimiser at the server has nothing to step along."""

    def check(algorithm: Algorithm) -> list[str]:
        if algorithm.server.replaces:
            return []
        return [f"{name} proposes new factors, so the server must take them as they are: use server.kind: replace"]

    return check


def no_protect(name: str) -> Check:
    """Stacked factors cannot be masked or noised as a sum."""

    def check(algorithm: Algorithm) -> list[str]:
        if not algorithm.protect:
            return []
        return [f"{name} stacks every client's own factors, but protect reveals only a sum: use aggregate.kind: mean"]

    return check


def exact_downlink(name: str) -> Check:
    """The rule adds a client's change to the broadcast, which must then be what the client started from."""

    def check(algorithm: Algorithm) -> list[str]:
        if not algorithm.downlink:
            return []
        return [f"{name} needs the very factors that a client started from: compress.down must be empty"]

    return check


def all_of(*checks: Check) -> Check:
    return lambda algorithm: [reason for check in checks for reason in check(algorithm)]
