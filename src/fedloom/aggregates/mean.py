"""FedAvg's rule: the weighted mean of the clients' deltas."""

from __future__ import annotations

from fedloom.errors import RunError
from fedloom.ops.low_rank import pad_like
from fedloom.tree import add, scale
from fedloom.types import Aggregate, Proposal, Tree, Upload


def mean() -> Aggregate:
    """Weighted mean (McMahan et al. 2017, Algorithm 1), computed on deltas from the broadcast parameters.

    For LoRA this averages A and B each by itself; the mean of A and of B is not the mean of BA.
    Parameters that no client sends (frozen ones) stay as they are, and so do rows that a client of lower rank has not.
    """

    def lift(params: Tree, delta: Tree, weight: float) -> Upload:
        whole = {name: pad_like(leaf, params[name]) if name in params else leaf for name, leaf in delta.items()}
        return Upload(scale(whole, weight), weight)

    def finish(params: Tree, total: Upload) -> Proposal:
        if not total.tree:
            raise RunError("the clients' uploads hold no parameter", code="aggregate.empty")
        unknown = sorted(total.tree.keys() - params.keys())
        if unknown:
            raise RunError(
                f"uploads name parameters that the server does not have: {unknown[:5]}", code="aggregate.names"
            )
        step = {name: leaf / total.weight for name, leaf in total.tree.items()}
        moved = {name: params[name] + leaf.to(params[name].dtype) for name, leaf in step.items()}
        return Proposal({**params, **moved})

    return Aggregate(lift, add_uploads, finish)


def add_uploads(a: Upload, b: Upload) -> Upload:
    """The sum of two summands; for every rule whose summand is a tree of numbers."""
    metrics = {key: a.metrics.get(key, 0.0) + b.metrics.get(key, 0.0) for key in {**a.metrics, **b.metrics}}
    return Upload(add(a.tree, b.tree), a.weight + b.weight, metrics)
