"""Dynamic loss scaling (Micikevicius et al. 2018, Section 3.2) as a value, with a scale for each client of a cohort.

Gradients of activations in float16 vanish below 6e-8. So the loss is multiplied by a scale before its gradient is taken
and the gradient, of float32 adapters, divided by it. Where it comes out not finite, the scale was too large: the step,
optimiser state included, is not made, and the scale halves. Scales are powers of two, so nothing is rounded by them.
Clients share nothing here: one client's overflow neither skips another's step nor moves its scale.

Shape suffixes: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom.types import Tree

# A round has tens of steps: the scale begins where it suits most models (torch's 2^16 costs several steps of a round
# where it does not), and tries to grow sooner than torch's 2,000 steps.
FIRST_SCALE = 2.0**13
GROWTH_STEPS = 100
SMALLEST, LARGEST = 2.0**-14, 2.0**24


class Scaling(NamedTuple):
    """Of each client; all float64."""

    scale_C: Tensor
    clean_C: Tensor  # steps made since the scale last changed
    skipped_C: Tensor  # steps that were not made


def first_scaling(num_clients: int, device: torch.device) -> Scaling:
    """At the beginning of a round."""
    nothing_C = torch.zeros(num_clients, dtype=torch.float64, device=device)
    return Scaling(nothing_C + FIRST_SCALE, nothing_C, nothing_C)


def after_step(scaling: Scaling, finite_C: Tensor) -> Scaling:
    """Half the scale after an overflow, twice the scale after `GROWTH_STEPS` steps without one."""
    clean_C = torch.where(finite_C, scaling.clean_C + 1, torch.zeros_like(scaling.clean_C))
    grows_C = clean_C >= GROWTH_STEPS
    scale_C = torch.where(finite_C, torch.where(grows_C, scaling.scale_C * 2, scaling.scale_C), scaling.scale_C / 2)
    return Scaling(
        scale_C.clamp(SMALLEST, LARGEST),
        torch.where(grows_C, torch.zeros_like(clean_C), clean_C),
        scaling.skipped_C + (~finite_C).double(),
    )


def finite_C(grads_C: Tree) -> Tensor:
    """Whether all of a client's gradients are finite, for each client."""
    return torch.stack([torch.isfinite(grad).flatten(1).all(1) for grad in grads_C.values()]).all(0)


def where_C(chosen_C: Tensor, new: Any, old: Any) -> Any:
    """Of two nested states of tensors [C, ...] the new one for the chosen clients, the old one for the others."""
    if isinstance(new, Tensor):
        return torch.where(chosen_C.view(-1, *[1] * (new.ndim - 1)), new, old)
    if isinstance(new, Mapping):
        return {key: where_C(chosen_C, value, old[key]) for key, value in new.items()}
    if isinstance(new, tuple):
        values = [where_C(chosen_C, a, b) for a, b in zip(new, old, strict=True)]
        return type(new)(*values) if hasattr(new, "_fields") else tuple(values)
    return new


def scaling_in(state: Any) -> Scaling | None:
    """The scaling somewhere in a local state; None where the loss is not scaled."""
    if isinstance(state, Scaling):
        return state
    if isinstance(state, tuple):
        return next((found for found in map(scaling_in, state) if found is not None), None)
    return None
