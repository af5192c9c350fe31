"""Updates from two losses: MeZO on adapters and FedKSeed in seed space."""

from __future__ import annotations

import math

import pytest
import torch
from tests.small import batch, clients, fedavg, gap, llama, small_lora

from fedloom.adapters import seed_space
from fedloom.adapters.seed_space import COEFFICIENTS, COUNTS, MAGNITUDES
from fedloom.clients import mezo_client, zo_client
from fedloom.clients.mezo import direction_of, value
from fedloom.clients.zo import probabilities
from fedloom.errors import RunError
from fedloom.ops.directions import directions
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.seeds import seed_of
from fedloom.types import Client, Site

CPU = torch.device("cpu")


def cohort_batch(*batches):
    return {name: torch.stack([one[name] for one in batches]) for name in ("input_ids", "labels")}


def started(adapter, seed: int = 0) -> dict[str, torch.Tensor]:
    """Parameters at which B is not zero, so that A has a gradient, too."""
    draw = torch.Generator().manual_seed(seed)
    tree = adapter.init(0)
    return {name: leaf + 0.1 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) for name, leaf in tree.items()}


def test_a_mezo_step_is_the_plain_two_sided_difference() -> None:
    adapter = small_lora()
    tree, data, epsilon, lr = started(adapter), batch(3), 1e-4, 0.01
    site = Site(3, 2, "c1", ("c1",), 4)
    update = mezo_client(sgd(lr), epsilon=epsilon)
    state = update.init({name: leaf[None] for name, leaf in tree.items()}, {}, [site])
    state = update.step(adapter.loss, state, cohort_batch(data))
    delta, _ = update.finish({name: leaf[None] for name, leaf in tree.items()}, state)

    key, start, z = seed_of(3, 2, "c1", "mezo/0"), 0, {}
    for name in sorted(tree):  # number by number of one long direction, in the order of names
        z[name] = directions([key], start, tree[name].numel(), CPU, torch.float64)[0].view_as(tree[name])
        start += tree[name].numel()

    def loss(sign: float) -> float:
        moved = {name: (leaf + sign * epsilon * z[name])[None] for name, leaf in tree.items()}
        nll, count = adapter.nll(moved, cohort_batch(data))
        return float(nll / count)

    g = (loss(1) - loss(-1)) / (2 * epsilon)
    assert abs(g) > 1e-2
    for name in tree:
        assert torch.allclose(delta[name][0], -lr * g * z[name], rtol=1e-6, atol=1e-12)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in tree.items()}
    exact = torch.autograd.grad(
        adapter.loss({name: leaf[None] for name, leaf in leaves.items()}, cohort_batch(data)).sum(),
        list(leaves.values()),
    )
    along = sum(float((gradient * z[name]).sum()) for gradient, name in zip(exact, tree, strict=True))
    assert g == pytest.approx(along, rel=1e-3), "the difference is the gradient along z"


def test_a_seed_space_step_is_the_plain_two_sided_difference() -> None:
    adapter = seed_space(llama(), num_seeds=8, seed=1)
    data, epsilon, lr = batch(3), 1e-4, 1e-3
    update = zo_client(lr, epsilon=epsilon, schedule=lambda done_C: 0.1 * done_C)  # half a step into round 3 here
    begin = {COEFFICIENTS: torch.linspace(-1e-3, 1e-3, 8, dtype=torch.float64)[None]}
    state = update.init(begin, {}, [Site(3, 2, "c1")])
    state = update.step(adapter.loss, state, cohort_batch(data))
    delta, _ = update.finish(begin, state)
    [k] = delta[COEFFICIENTS][0].nonzero()[:, 0].tolist()

    z = directions([seed_of(1, 0, "", f"direction/{j}") for j in range(8)], 0, adapter.num_weights, CPU, torch.float64)

    def loss(distance: float) -> float:
        moved, start = z[k] * distance - begin[COEFFICIENTS][0] @ z, 0
        model = llama()
        with torch.no_grad():
            for leaf in model.parameters():
                leaf += moved[start : start + leaf.numel()].view_as(leaf)
                start += leaf.numel()
            logits = model(input_ids=data["input_ids"]).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten()))

    g = (loss(epsilon) - loss(-epsilon)) / (2 * epsilon)
    assert abs(g) > 1e-2
    assert float(delta[COEFFICIENTS][0, k]) == pytest.approx(0.25 * lr * g, rel=1e-6)


@pytest.mark.parametrize("kind", ["mezo", "zo"])
def test_the_mean_over_many_directions_is_the_gradient(kind: str) -> None:
    """E[g z] is the gradient. Of n directions in d dimensions, the mean's part along the gradient has expectation 1 (in
    units of its length) and variance 2 / n, and its squared length 1 + (d + 1) / n. Bounds at 5 standard deviations:
    a right estimate fails with a chance below 1e-6; the directions are fixed, so it is the same each time."""
    n, epsilon, data = 150, 1e-4, batch(3)
    adapter = small_lora(rank=1, targets=["q_proj"]) if kind == "mezo" else seed_space(llama(layers=1), num_seeds=n)
    model = adapter.model
    if kind == "mezo":
        tree = started(adapter)
        leaves = {name: leaf[None].requires_grad_() for name, leaf in tree.items()}
        loss = adapter.loss(leaves, cohort_batch(data))
        whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(leaves.values()))])
    else:
        model.requires_grad_(True)
        out = model(input_ids=data["input_ids"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), data["labels"][:, 1:].flatten())
        whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        model.requires_grad_(False)
    total = torch.zeros_like(whole)
    for i in range(n):
        if kind == "mezo":
            update = mezo_client(sgd(1.0), epsilon=epsilon)
            first = {name: leaf[None] for name, leaf in tree.items()}
            state = update.step(adapter.loss, update.init(first, {}, [Site(i, 0, "c")]), cohort_batch(data))
            total -= torch.cat([leaf.flatten() for leaf in update.finish(first, state)[0].values()])
        else:
            pair = []
            for sign in (1, -1):
                a = torch.zeros(1, n, dtype=torch.float64)
                a[0, i] = -sign * epsilon
                pair.append(float(value(adapter.loss, {COEFFICIENTS: a}, cohort_batch(data))))
            z = directions([adapter._keys[i]], 0, len(whole), CPU, torch.float64)[0]
            total += (pair[0] - pair[1]) / (2 * epsilon) * z
    mean, d, length = total / n, len(whole), float(whole.norm())
    along = float(mean @ whole) / length**2
    assert abs(along - 1) < 5 * math.sqrt(2 / n)
    off = float((mean - along * whole).norm()) / length
    assert 0.7 < off / math.sqrt((d - 1) / n) < 1.3, "as far off the gradient as n directions leave it"


def test_no_graph_is_made() -> None:
    adapter = small_lora()
    asked = []

    def loss(tree_C, batch_CBT):
        asked.append(torch.is_grad_enabled() or any(leaf.requires_grad for leaf in tree_C.values()))
        return adapter.loss(tree_C, batch_CBT)

    update = mezo_client(sgd(0.1))
    first = {name: leaf[None] for name, leaf in adapter.init(0).items()}
    update.step(loss, update.init(first, {}, [Site(1, 0, "c")]), cohort_batch(batch(0)))
    assert asked == [False, False]


def test_each_client_of_a_cohort_has_a_direction_of_its_own() -> None:
    adapter = small_lora()
    first = {name: leaf[None].expand(2, *leaf.shape) for name, leaf in adapter.init(0).items()}
    z = direction_of(first, [5, 6])
    assert all(not torch.equal(leaf[0], leaf[1]) for leaf in z.values())
    assert all(torch.equal(leaf[1:], direction_of({n: x[:1] for n, x in first.items()}, [6])[name])
               for name, leaf in z.items())  # fmt: skip


def test_pieces_of_a_batch_give_its_loss() -> None:
    adapter = small_lora()
    tree = {name: leaf[None] for name, leaf in started(adapter).items()}
    data = cohort_batch(batch(1, rows=3))
    whole = value(adapter.loss, tree, data)
    for pieces in (2, 3, 7):
        assert torch.allclose(value(adapter.loss, tree, data, pieces), whole, rtol=1e-12)


def test_probabilities_follow_the_papers_formula_and_sum_to_one() -> None:
    drawn = [[3.0, -1.0], [0.5], [], [-2.0, 2.0, 2.0]]  # scalar gradients of each seed so far
    sums = torch.tensor([sum(map(abs, one)) for one in drawn])
    p = probabilities(sums, torch.tensor([float(len(one)) for one in drawn]))
    means = [2.0, 0.5, 0.0, 2.0]
    scaled = [(mean - min(means)) / (max(means) - min(means)) for mean in means]
    want = [math.exp(one) / sum(map(math.exp, scaled)) for one in scaled]
    assert p.tolist() == pytest.approx(want, rel=1e-12)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-15)
    assert float(p.max() / p.min()) == pytest.approx(math.e)
    assert probabilities(torch.zeros(5), torch.zeros(5)).tolist() == [0.2] * 5


def test_pro_draws_by_its_probabilities_and_tells_what_it_drew() -> None:
    k, steps = 4, 400
    adapter = seed_space(llama(layers=1), num_seeds=k, magnitudes=True)
    state = initial_state(fedavg(zo_client(1e-5)), adapter, 3)
    mean = torch.tensor([0.0, 0.0, 0.0, 9.0], dtype=torch.float64)
    begin = {**state.params, MAGNITUDES: mean * 2, COUNTS: torch.full((k,), 2.0, dtype=torch.float64)}
    begin_C = {name: leaf[None] for name, leaf in begin.items()}
    update = zo_client(1e-5)
    local = update.init(begin_C, {}, [Site(3, 5, "c", ("c",), steps)])
    seen = []

    def loss(tree_C, batch_CBT):  # steep along one seed
        seen.append(tree_C[COEFFICIENTS])
        return tree_C[COEFFICIENTS] @ torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

    for _ in range(steps):
        local = update.step(loss, local, cohort_batch(batch(0, rows=1)))
    delta, _ = update.finish(begin_C, local)
    counts = delta[COUNTS][0]
    assert float(counts.sum()) == steps
    p = float(probabilities(begin[MAGNITUDES], begin[COUNTS])[3])
    assert abs(float(counts[3]) / steps - p) < 5 * math.sqrt(p * (1 - p) / steps)
    assert p > 0.45 and float(counts[:3].min()) > 20
    g = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)  # w + eps z is a - eps
    assert torch.allclose(delta[MAGNITUDES][0], counts * g.abs(), rtol=1e-9)
    assert torch.allclose(delta[COEFFICIENTS][0], 1e-5 * counts * g, rtol=1e-9)


def test_statistics_of_rounds_are_means_over_clients_and_draws() -> None:
    adapter = seed_space(llama(layers=1), num_seeds=6, magnitudes=True)
    algorithm = fedavg(zo_client(1e-4), uniform_weight=True)
    state = initial_state(algorithm, adapter, 3)
    cohort = clients(3)
    state, _ = run_round(algorithm, adapter, batched(2), state, cohort)
    steps = sum(len(client.batches) for client in cohort)
    assert float(state.params[COUNTS].sum()) == pytest.approx(steps / 3)
    assert float(state.params[MAGNITUDES].min()) >= 0
    after, _ = run_round(algorithm, adapter, batched(2), state, cohort)
    assert float(after.params[COUNTS].sum()) == pytest.approx(2 * steps / 3)
    p = probabilities(after.params[MAGNITUDES], after.params[COUNTS])
    assert float(p.sum()) == pytest.approx(1.0)
    assert float(p.max()) > float(p.min())


def test_seed_space_and_its_update_belong_together() -> None:
    adapter = small_lora()
    algorithm = fedavg(zo_client(1e-3))
    with pytest.raises(RunError, match="none of 5 clients finished"):
        run_round(algorithm, adapter, sequential(), initial_state(algorithm, adapter, 3), clients())


def test_mezo_learns() -> None:
    """Fifty rounds of a linear schedule on one batch: the loss falls as it would with gradients, only slower."""
    adapter = small_lora()
    one = Client("c", [batch(3)] * 8)
    algorithm = fedavg(mezo_client(sgd(2e-3)))
    state = initial_state(algorithm, adapter, 3)
    losses = []
    for _ in range(6):
        state, report = run_round(algorithm, adapter, batched(1), state, [one])
        losses.append(report.metrics["loss_sum"] / report.metrics["target_tokens"])
    assert losses[-1] < losses[0] - 0.2
    assert gap(state.params, adapter.init(3)) > 1e-3
