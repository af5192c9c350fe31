"""Leaves of a tree that are no parameters of the model, told by the first part of their names."""

from __future__ import annotations

from torch import Tensor

from fedloom.types import Tree

TOLD = "told/"  # numbers that a client says beside its update: sent as they are, never compressed, never a parameter
WORK = TOLD + "work"  # how far a unit gradient would have moved it (FedNova)
START_LOSS = TOLD + "start_loss"  # its loss with the parameters that it was sent (q-FedAvg)

CONTROL = "control/"  # a control variate, beside the parameter of the same name: sent and averaged, never trained


def apart(tree: Tree, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(leaves under `prefix`, the others)."""
    under = {name: leaf for name, leaf in tree.items() if name.startswith(prefix)}
    return under, {name: leaf for name, leaf in tree.items() if not name.startswith(prefix)}
