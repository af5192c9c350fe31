"""Benchmarks over several processes: the leader makes tokens of the questions, and all answer their share of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedloom.evaluate.generate import Opening
from fedloom.evaluate.loglikelihood import Continuation, Loglikelihood
from fedloom.evaluate.sampling import Sampling
from fedloom.evaluate.tasks.run import ModelAnswerer, OnProgress
from fedloom.runtimes.distributed import Work, split
from fedloom.runtimes.lead import Lead, Order
from fedloom.study.session import Session
from fedloom.types import State, Tree

__all__ = ["TASK_WORK", "TeamAnswerer"]


class TeamAnswerer(ModelAnswerer):
    """A `ModelAnswerer` of which every process of a team answers a part; answers do not depend on who gives them."""

    def __init__(
        self,
        lead: Lead,
        arm: str,
        state: State,
        adapter: Any,
        tree: Tree,
        tokenizer: Any,
        batch_size: int,
        chat_template: str,
        on_progress: OnProgress | None,
    ) -> None:
        """`tree` is the model that is asked; `state` tells what else is in the frozen weights."""
        super().__init__(adapter, tree, tokenizer, batch_size, chat_template, on_progress)
        self.lead, self.arm = lead, arm
        self.state = State(state.seed, state.round, tree, None, {}, state.base)

    def written(self, asked: Sequence[Opening]) -> list[list[int]]:
        values = [
            [list(map(int, one.ids)), one.room, list(one.stop), None if one.sampling is None else asdict(one.sampling)]
            for one in asked
        ]
        loads = [float(len(one.ids) + one.room) for one in asked]
        return self._shared(
            "write", values, loads, lambda places: super(TeamAnswerer, self).written([asked[p] for p in places])
        )

    def loglikelihoods(self, asked: Sequence[Continuation]) -> list[Loglikelihood]:
        values = [[list(map(int, one.before)), list(map(int, one.tokens))] for one in asked]
        loads = [float(len(one.before) + len(one.tokens)) for one in asked]
        found = self._shared(
            "judge", values, loads, lambda places: super(TeamAnswerer, self).loglikelihoods([asked[p] for p in places])
        )
        return [Loglikelihood(*one) for one in found]

    def _shared(
        self, kind: str, values: list[Any], loads: list[float], own: Callable[[list[int]], list[Any]]
    ) -> list[Any]:
        if not values:
            return []
        parts = split(loads, self.lead.team.size)
        self.lead.ask(kind, self.arm, self.state, [[values[place] for place in part] for part in parts], {})
        said = self.lead.do(lambda: own(parts[0]))
        found: list[Any] = [None] * len(values)
        for part, one in zip(parts, said, strict=True):
            for place, answer in zip(part, one.result, strict=True):
                found[place] = answer
        return found


def _answerer(session: Session, own: Work, order: Order) -> ModelAnswerer:
    own.adapter.sync(order.state.base)
    recipe, tokenizer = session.recipe, session.base.tokenizer
    adapter: Any = own.adapter
    size, layout = recipe.evaluate.eval_batch_size, recipe.data.chat_template
    return ModelAnswerer(adapter, order.state.params, tokenizer, size, layout, None)


def _write(session: Session, own: Work, order: Order) -> Any:
    asked = [
        Opening(ids, room, tuple(stop), None if sampling is None else Sampling(**sampling))
        for ids, room, stop, sampling in order.part
    ]
    return _answerer(session, own, order).written(asked)


def _judge(session: Session, own: Work, order: Order) -> Any:
    return _answerer(session, own, order).loglikelihoods([Continuation(*one) for one in order.part])


TASK_WORK: Mapping[str, Callable[[Session, Work, Order], Any]] = {"write": _write, "judge": _judge}
