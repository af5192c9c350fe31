"""Zeroth-order local work in seed space: FedKSeed and FedKSeed-Pro (Qin et al. 2024, Algorithms 1 and 2).

Shape suffixes: C clients (always one here), K seeds, B examples, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.clients.mezo import value
from fedloom.errors import RunError
from fedloom.optimizers import Schedule, constant
from fedloom.seeds import seed_of
from fedloom.types import Batch, ClientUpdate, LossFn, Site, Tree

# The leaves of `adapters.seed_space`.
COEFFICIENTS, MAGNITUDES, COUNTS = "seed_coefficients", "seed_magnitudes", "seed_counts"


class Local(NamedTuple):
    """State of a client between two local steps."""

    params: Tree  # of `seed_space`
    bounds: tuple[float, ...] | None  # running sums of the seeds' probabilities; None where all are the same
    site: Site
    step: int  # local steps done


def zo_client(
    learning_rate: float, *, epsilon: float = 5e-4, schedule: Schedule = constant, accumulation_steps: int = 1
) -> ClientUpdate:
    """Local steps along directions of K shared seeds; the upload is what that did to each seed's coefficient.

    Each step draws a seed k and moves w <- w - lr g z_k, with g = (L(w + epsilon z_k) - L(w - epsilon z_k)) /
    (2 epsilon). In the coefficients, where w = w0 - sum_k a_k z_k, that is a_k <- a_k + lr g; so the sum of a client's
    steps is K numbers, of which as many differ from zero as it has drawn seeds, and the mean over clients is the
    paper's aggregation (Eq. 6). The learning rate is in the coefficients, so it may follow a schedule.

    Seeds are drawn uniformly (FedKSeed), or, where the tree has statistics, by `probabilities` (FedKSeed-Pro). Then
    the upload also holds the sums of |g| and the numbers of draws.

    One client at a time: each is another full model, and there is one copy of the weights. Several at once would need
    as many copies, and share no product.
    """

    def init(broadcast_C: Tree, personal_C: Tree, sites: Sequence[Site]) -> Local:
        a_CK = broadcast_C.get(COEFFICIENTS)
        if a_CK is None or len(sites) != 1:
            raise RunError("zo_client works on seed_space, one client at a time", code="client.seed_space")
        bounds = None
        if MAGNITUDES in broadcast_C:
            p_K = probabilities(broadcast_C[MAGNITUDES][0], broadcast_C[COUNTS][0])
            bounds = tuple(p_K.cumsum(0).tolist())
        return Local(broadcast_C, bounds, sites[0], 0)

    @torch.no_grad()
    def step(loss: LossFn, state: Local, batch_CBT: Batch) -> Local:
        site, a_CK = state.site, state.params[COEFFICIENTS]
        draw = random.Random(seed_of(site.seed, site.round, site.client, f"zo/{state.step}"))
        k = draw.choices(range(a_CK.shape[1]), cum_weights=state.bounds)[0]

        def at(distance: float) -> Tensor:  # w + distance z_k
            return value(loss, raised(state.params, COEFFICIENTS, k, -distance), batch_CBT, accumulation_steps)

        g_C = (at(epsilon) - at(-epsilon)) / (2 * epsilon)
        done_C = torch.full_like(g_C, site.round + (state.step + 0.5) / site.num_steps, dtype=torch.float64)
        params = raised(state.params, COEFFICIENTS, k, learning_rate * schedule(done_C) * g_C)
        if MAGNITUDES in params:
            params = raised(raised(params, MAGNITUDES, k, g_C.abs()), COUNTS, k, 1)
        return state._replace(params=params, step=state.step + 1)

    def finish(broadcast_C: Tree, state: Local) -> tuple[Tree, Tree]:
        return {name: leaf - broadcast_C[name] for name, leaf in state.params.items()}, {}

    return ClientUpdate(init, step, finish, cohort_axis=False)


def raised(tree_C: Tree, name: str, k: int, by: float | Tensor) -> Tree:
    """The tree with `by` added to number k of a leaf."""
    leaf_CK = tree_C[name].clone()
    leaf_CK[:, k] += by
    return {**tree_C, name: leaf_CK}


def probabilities(magnitudes_K: Tensor, counts_K: Tensor) -> Tensor:
    """p_K, float64: how likely FedKSeed-Pro draws each seed (Qin et al. 2024, Section 3.4).

    softmax over seeds of their mean |g|, scaled to [0, 1] by the least and the largest; so the likeliest seed is e
    times as likely as the least likely one. A seed that nobody has drawn yet has 0. Means are over draws of all clients
    and rounds, in which a client counts with its weight in the average; with equal weights they are the paper's.
    """
    mean_K = magnitudes_K.double() / counts_K.double()
    mean_K = torch.where(counts_K > 0, mean_K, torch.zeros_like(mean_K))
    low, high = mean_K.min(), mean_K.max()
    scaled_K = (mean_K - low) / (high - low) if high > low else torch.zeros_like(mean_K)
    return scaled_K.softmax(0)
