"""q-FedAvg (Li et al. 2020, q-FFL): clients with a higher loss weigh more, so that results are spread more evenly."""

from __future__ import annotations

from fedloom.aggregates.mean import add_uploads, mean
from fedloom.errors import RunError
from fedloom.ops.names import START_LOSS, TOLD, apart
from fedloom.tree import scale, sqnorm
from fedloom.types import Aggregate, Proposal, Tree, Upload

CURVATURE = TOLD + "h"  # the denominator, a summand like the rest
LEAST_LOSS = 1e-10  # a loss of 0 has no power below 0


def q_fedavg(q: float, learning_rate: float) -> Aggregate:
    """A step on sum_k p_k F_k^(q + 1) / (q + 1), of a length that needs no tuning (Algorithm 2).

    With L = 1 / eta, of a client whose loss at the round's start is F_k and who moved by delta_k:

        Delta_k = F_k^q (-L delta_k)        h_k = q F_k^(q - 1) ||L delta_k||^2 + L F_k^q
        w <- w - sum_k p_k Delta_k / sum_k p_k h_k

    The paper draws clients with probability p_k and sums them alike; here they are drawn alike and weighed by p_k. With
    q = 0 it is `mean()`. A client sends its delta and one number, F_k (`tells_start_loss`).

    Args:
        q: 0 is FedAvg; the larger, the more even.
        learning_rate: eta, of the clients' plain SGD: L delta_k stands for a gradient.
    """
    rule = mean()

    def lift(params: Tree, delta: Tree, weight: float) -> Upload:
        if START_LOSS not in delta:
            raise RunError(
                "its upload does not say its loss at the start", hint="tells_start_loss(...)", code="aggregate.loss"
            )
        told, moved = apart(delta, TOLD)
        loss = max(float(told[START_LOSS]), LEAST_LOSS)
        upload = rule.lift(params, moved, weight)
        # both over L: what is left of it stands before the squared norm
        curved = loss**q + q * loss ** (q - 1) * sqnorm(moved) / learning_rate
        return Upload({**scale(upload.tree, loss**q), CURVATURE: curved * weight}, weight)

    def finish(params: Tree, total: Upload) -> Proposal:
        told, tree = apart(total.tree, TOLD)
        return rule.finish(params, Upload(tree, float(told[CURVATURE]), total.metrics))

    return Aggregate(lift, add_uploads, finish)
