"""FedExP (Jhunjhunwala et al. 2023): the server goes further the less the clients' changes agree."""

from __future__ import annotations

from fedloom.aggregates.mean import add_uploads, mean
from fedloom.ops.names import TOLD, apart
from fedloom.tree import scale, sqnorm
from fedloom.types import Aggregate, Algorithm, Proposal, Tree, Upload

SQUARES = TOLD + "squares"  # the sum of the changes' squared norms, a summand like the rest


def fed_exp(*, epsilon: float = 1e-3) -> Aggregate:
    """The mean of the changes, times a step that the changes themselves tell (Algorithm 1, Eq. 8).

        w <- w + eta D,   D = sum_k p_k delta_k,   eta = max(1, sum_k p_k ||delta_k||^2 / (2 (||D||^2 + epsilon)))

    The paper has p_k = 1 / M (`weighting: uniform`). Clients send what FedAvg's send: the server squares what it gets.
    Its evaluation of the mean of the last two rounds' parameters is not part of this rule.

    Args:
        epsilon: keeps the step small where the changes nearly cancel, in units of ||D||^2; the paper tunes it.
    """
    rule = mean()

    def lift(params: Tree, delta: Tree, weight: float) -> Upload:
        upload = rule.lift(params, delta, weight)
        return Upload({**upload.tree, SQUARES: sqnorm(delta) * weight}, weight) if upload.tree else upload

    def finish(params: Tree, total: Upload) -> Proposal:
        told, tree = apart(total.tree, TOLD)
        if not told:
            return rule.finish(params, total)  # it says that there is nothing
        mean_sqnorm = float(sqnorm(scale(tree, 1 / total.weight)))
        step = max(1.0, float(told[SQUARES]) / total.weight / (2 * (mean_sqnorm + epsilon)))
        return rule.finish(params, Upload(scale(tree, step), total.weight, total.metrics))

    def check(algorithm: Algorithm) -> list[str]:
        if algorithm.server.replaces:
            return []
        return ["fedexp finds the length of the server's step itself: use server.kind: replace"]

    return Aggregate(lift, add_uploads, finish, check)
