"""float16 with a scaled loss: right where float16 alone is not, and one client's overflow is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.small import batch, clients, fedavg, llama
from torch import Tensor

from fedloom.adapters import lora, with_recompute
from fedloom.clients import fednova_client, scaffold_client, sgd_client, with_control
from fedloom.clients.sgd import gradients
from fedloom.errors import RunError
from fedloom.ops import loss_scale
from fedloom.ops.loss_scale import FIRST_SCALE, Scaling, after_step, first_scaling
from fedloom.ops.names import WORK
from fedloom.optimizers import adamw, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.runtimes.cohort import SKIPPED, train_block
from fedloom.study.build import algorithm_of, scales_loss
from fedloom.study.recipe import Recipe
from fedloom.types import Client, Site, Tree


def model(dtype: torch.dtype) -> Any:
    """The same numbers in every dtype."""
    return llama(layers=2).half().to(dtype)


def adapter(dtype: torch.dtype, **settings: Any) -> Any:
    return lora(model(dtype), rank=2, targets="all-linear", **settings)


def moved(tree: Tree) -> dict[str, Tensor]:
    """A tree in which B is not zero, with the cohort axis."""
    draw = torch.Generator().manual_seed(5)
    return {name: (leaf + 0.05 * torch.randn(leaf.shape, generator=draw).to(leaf))[None] for name, leaf in tree.items()}


def of_batch(seed: int) -> dict[str, Tensor]:
    return {name: leaf[None] for name, leaf in batch(seed).items()}


def error(a: Tree, b: Tree) -> float:
    """Relative, over all leaves together."""
    away = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return float((away / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5)


def steep(inner: Any, factor_of: Any) -> Any:
    """The adapter, with each client's loss multiplied: a stand-in for tiny gradients, and for huge ones."""
    whole = inner.loss

    def loss(tree_C: Tree, batch_CBT: Tree) -> Tensor:
        loss_C = whole(tree_C, batch_CBT)
        return loss_C * torch.tensor(factor_of(len(loss_C)), dtype=loss_C.dtype)

    inner.loss = loss
    return inner


@pytest.mark.parametrize("again", [False, True], ids=["plain", "blocks run again"])
def test_gradients_are_those_of_float32(again):
    exact, half = adapter(torch.float32), adapter(torch.float16)
    if again:
        half = with_recompute(half)
    tree_C = moved(exact.init(3))
    assert all(leaf.dtype == torch.float32 for leaf in half.init(3).values())
    assert half.causal.head is not None  # the chunked path
    scale_C = torch.tensor([FIRST_SCALE], dtype=torch.float64)
    want = gradients(exact.loss, tree_C, tree_C, of_batch(1))
    got = gradients(half.loss, tree_C, tree_C, of_batch(1), 2, scale_C)
    assert all(leaf.dtype == torch.float32 for leaf in got.values())
    assert 1e-6 < error(got, want) < 5e-3


def test_tiny_gradients_are_kept_by_the_scale_and_lost_without():
    tiny = 1e-5
    exact, half = (steep(adapter(dtype), lambda c: [tiny] * c) for dtype in (torch.float32, torch.float16))
    tree_C = moved(exact.init(3))
    want = gradients(exact.loss, tree_C, tree_C, of_batch(1))
    scale_C = torch.tensor([FIRST_SCALE], dtype=torch.float64)
    assert error(gradients(half.loss, tree_C, tree_C, of_batch(1), 1, scale_C), want) < 1e-2
    assert error(gradients(half.loss, tree_C, tree_C, of_batch(1)), want) > 3e-2


def one_step(made: Any, cohort: list[Client], update: Any) -> tuple[Any, Any]:
    """(states before, after) a first step of all clients in one pass."""
    from fedloom.runtimes.cohort import collate
    from fedloom.tree import stack

    params_C = stack([made.init(3)] * len(cohort))
    before = update.init(params_C, {}, [Site(0, 0, one.id) for one in cohort])
    data = collate([one.batches[0] for one in cohort], [0] * len(cohort), torch.device("cpu"))
    return before, update.step(made.loss, before, data)


def test_an_overflow_halves_its_clients_scale_and_makes_no_step():
    cohort = [Client(name, (batch(1),)) for name in ("a", "b")]
    made = steep(adapter(torch.float16), lambda c: [1.0, 1e6][:c])
    before, after = one_step(made, cohort, sgd_client(adamw(1e-2), loss_scaling=True, max_grad_norm=1.0))
    assert after.scaling.scale_C.tolist() == [FIRST_SCALE, FIRST_SCALE / 2]
    assert after.scaling.skipped_C.tolist() == [0, 1] and after.scaling.clean_C.tolist() == [1, 0]
    assert all(torch.equal(leaf[1], before.params[name][1]) for name, leaf in after.params.items())
    assert after.opt.step_C.tolist() == [1, 0]
    assert all(not leaf[1].any() for moments in after.opt[1:] for leaf in moments.values())
    assert all(leaf.dtype == torch.float32 for moments in after.opt[1:] for leaf in moments.values())
    _, alone = one_step(
        adapter(torch.float16), cohort[:1], sgd_client(adamw(1e-2), loss_scaling=True, max_grad_norm=1.0)
    )
    mine = {name: leaf[:1] for name, leaf in after.opt.first.items()}
    assert error(mine, alone.opt.first) < 5e-3  # products of two clients may round otherwise than those of one


def test_clipping_sees_the_unscaled_gradient():
    cohort = [Client("a", (batch(1),))]

    def length(bound: float | None) -> float:
        before, after = one_step(
            adapter(torch.float16), cohort, sgd_client(sgd(1.0), loss_scaling=True, max_grad_norm=bound)
        )
        return float(sum((after.params[n] - before.params[n]).square().sum() for n in after.params) ** 0.5)

    free = length(None)
    assert length(2 * free) == free  # a bound on the scaled gradient would bind
    assert length(free / 4) == pytest.approx(free / 4, rel=1e-4)


def test_scales_grow_after_so_many_sound_steps_and_stay_in_bounds():
    yes, no = torch.tensor([True]), torch.tensor([False])
    scaling = first_scaling(1, torch.device("cpu"))
    for _ in range(loss_scale.GROWTH_STEPS - 1):
        scaling = after_step(scaling, yes)
    assert scaling.scale_C.tolist() == [FIRST_SCALE]
    assert after_step(scaling, no).clean_C.tolist() == [0]
    scaling = after_step(scaling, yes)
    assert scaling.scale_C.tolist() == [2 * FIRST_SCALE] and scaling.clean_C.tolist() == [0]
    edge = Scaling(torch.tensor([loss_scale.SMALLEST]).double(), torch.zeros(1).double(), torch.zeros(1).double())
    assert after_step(edge, no).scale_C.tolist() == [loss_scale.SMALLEST]


def edge() -> float:
    """The smallest power of two times which batch(1)'s loss overflows at the first scale, and not at half of it."""
    made, scale_C = adapter(torch.float16), torch.tensor([FIRST_SCALE], dtype=torch.float64)
    tree_C = {name: leaf[None] for name, leaf in made.init(3).items()}
    factors = (2.0**k for k in range(20))
    return next(
        f
        for f in factors
        if not loss_scale.finite_C(gradients(made.loss, tree_C, tree_C, of_batch(1), 1, scale_C * f)).all()
    )


THREE = (batch(1),) * 3


def test_skipped_steps_are_told_and_a_client_that_made_none_has_failed():
    cohort, steepness = [Client(name, THREE) for name in ("a", "b", "c")], [1.0, edge(), 1e9]
    made = steep(adapter(torch.float16), lambda c: steepness[:c])
    algorithm = fedavg(sgd_client(sgd(1e-9), loss_scaling=True))
    state = initial_state(algorithm, made, 3)
    updates = train_block(algorithm, made, state, cohort, [Site(0, 0, one.id) for one in cohort])
    assert [row.get(SKIPPED) if isinstance(row, dict) else None for *_, row in updates] == [0.0, 1.0, None]
    assert "each of its 3 local steps overflowed" in str(updates[2][2])
    assert isinstance(updates[2][2], RunError)
    _, report = run_round(algorithm, made, batched(3), state, cohort)
    assert set(report.clients) == {"a", "b"} and set(report.failed) == {"c"} and report.metrics[SKIPPED] == 1


def test_steps_that_were_not_made_are_no_work():
    cohort, steepness = [Client("a", THREE)], edge()
    works = []
    for factor in (1.0, steepness):
        made = steep(adapter(torch.float16), lambda c, factor=factor: [factor] * c)
        algorithm = fedavg(fednova_client(sgd(1e-9), loss_scaling=True))
        state = initial_state(algorithm, made, 3)
        [(delta, _, _)] = train_block(algorithm, made, state, cohort, [Site(0, 0, "a")])
        works.append(float(delta[WORK]))
    assert works == pytest.approx([3e-9, 2e-9])
    made = with_control(steep(adapter(torch.float16), lambda c: [steepness] * c))
    algorithm = fedavg(scaffold_client(sgd(1e-9), loss_scaling=True))
    [(_, _, row)] = train_block(algorithm, made, initial_state(algorithm, made, 3), cohort, [Site(0, 0, "a")])
    assert isinstance(row, dict) and row[SKIPPED] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_with_evaluations_between_them_follow_float32(dtype):
    losses = []
    for one in (torch.float32, dtype):
        made = adapter(one)
        algorithm = fedavg(sgd_client(adamw(5e-3), loss_scaling=one == torch.float16))
        state = initial_state(algorithm, made, 3)
        found = []
        for _ in range(3):
            tree_C = {name: leaf[None] for name, leaf in state.params.items()}
            total_C, count_C = made.nll(tree_C, of_batch(2))
            found.append(float(total_C / count_C))
            state, _ = run_round(algorithm, made, sequential(), state, clients(3))
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=5e-3 if dtype == torch.float16 else 3e-2)
    assert losses[0][-1] < losses[0][0] - 0.05


def recipe(**values: Any) -> Recipe:
    return Recipe(model="builtin", local_steps=1, **values)


def test_the_loss_is_scaled_where_the_base_is_in_float16(monkeypatch):
    assert not scales_loss(recipe(dtype="float32")) and not scales_loss(recipe(dtype="bfloat16"))
    assert scales_loss(recipe(dtype="float16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    for capability, scaled in (((7, 5), True), ((6, 1), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        assert scales_loss(recipe()) is scaled


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold", "fednova", "rolora", "fedsa_lora"])
def test_every_method_with_gradients_scales(method):
    made = adapter(torch.float16)
    asked = recipe(dtype="float16", method=method)
    if method == "scaffold":
        made = with_control(made)
    algorithm = algorithm_of(asked)
    params_C = {name: leaf[None] for name, leaf in made.init(3).items()}
    personal_C = {name: leaf[None] for name, leaf in algorithm.client.personal(made.init(3)).items()}
    work = algorithm.client.init(params_C, personal_C, [Site(0, 0, "a")])
    assert loss_scale.scaling_in(work) is not None
