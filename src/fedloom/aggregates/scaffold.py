"""SCAFFOLD's server (Karimireddy et al. 2020, Algorithm 1): the mean of the updates, and of the control variates'."""

from __future__ import annotations

from fedloom.aggregates.mean import add_uploads, mean
from fedloom.errors import RunError
from fedloom.ops.names import CONTROL, apart
from fedloom.types import Aggregate, Proposal, Tree, Upload


def scaffold(population_weight: float | None) -> Aggregate:
    """x <- x + mean_S(delta y), c <- c + |S| / N mean_S(delta c), over the cohort S of N clients.

    So c stays the mean of all c_i, of clients that were never asked (theirs is zero) as well. With unequal weights p_i
    it is c + sum_S p_i delta c_i, which stays sum p_i c_i; the paper's clients weigh the same. Clients that fail are
    not in S.

    Args:
        population_weight: of all clients together, N where each weighs 1; None where nothing will be added up.
    """
    rule = mean()

    def finish(params: Tree, total: Upload) -> Proposal:
        if population_weight is None or population_weight < total.weight * (1 - 1e-9):
            raise RunError(
                f"the cohort weighs {total.weight:g}, and all clients together {population_weight}",
                hint="scaffold(population_weight) is the sum of all clients' weights",
                code="aggregate.population",
            )
        change, moved = apart(total.tree, CONTROL)
        control, own = apart(params, CONTROL)
        proposed = rule.finish(own, total._replace(tree=moved))
        share = {name: leaf + change[name] / population_weight for name, leaf in control.items()}
        return Proposal({**proposed.params, **share})

    return Aggregate(rule.lift, add_uploads, finish)
