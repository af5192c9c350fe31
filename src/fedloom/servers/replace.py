"""FedAvg's server: take the proposal as it is."""

from __future__ import annotations

from fedloom.types import Proposal, ServerState, ServerUpdate, Tree


def replace() -> ServerUpdate:
    """The new parameters are the proposal."""

    def apply(params: Tree, proposal: Proposal, state: ServerState) -> tuple[Tree, ServerState]:
        return proposal.params, state

    return ServerUpdate(init=lambda params: None, apply=apply, replaces=True)
