"""FedNova (Wang et al. 2020): each client's update is divided by the work behind it before the mean is taken."""

from __future__ import annotations

from fedloom.aggregates.mean import add_uploads, mean
from fedloom.errors import RunError
from fedloom.ops.names import WORK, apart
from fedloom.tree import scale
from fedloom.types import Aggregate, Proposal, Tree, Upload


def fednova() -> Aggregate:
    """w <- w + tau_eff sum_k p_k delta_k / ||a_k||_1 with tau_eff = sum_k p_k ||a_k||_1 (Eq. 12).

    The mean of deltas weighs a client by p_k ||a_k||_1, so who makes more local steps pulls the fixed point its way;
    here everyone weighs p_k. Where all have done the same work it is `mean()`. A client sends its delta and one number,
    eta ||a_k||_1 (`fednova_client`): eta drops out.
    """
    rule = mean()

    def lift(params: Tree, delta: Tree, weight: float) -> Upload:
        if WORK not in delta:
            raise RunError(
                "its upload does not say how much work is behind it", hint="fednova_client(...)", code="aggregate.work"
            )
        work = delta[WORK].double()
        if not float(work) > 0:
            raise RunError(f"it says that {float(work)} of work is behind its upload", code="aggregate.work")
        _, moved = apart(delta, WORK)
        upload = rule.lift(params, moved, weight)
        return Upload({**scale(upload.tree, 1 / float(work)), WORK: work * weight}, weight)

    def finish(params: Tree, total: Upload) -> Proposal:
        told, tree = apart(total.tree, WORK)
        effective = float(told[WORK]) / total.weight
        return rule.finish(params, total._replace(tree=scale(tree, effective)))

    return Aggregate(lift, add_uploads, finish)
