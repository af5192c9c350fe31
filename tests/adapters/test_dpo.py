"""The DPO loss against equation (7) of the paper, computed from whole logits; its reference stays the first base."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.small import VOCAB, fedavg, gap, llama, small_lora
from torch import Tensor

from fedloom.adapters import (
    bottleneck,
    dora,
    dpo,
    full,
    ia3,
    last_layers,
    lora,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    seed_space,
)
from fedloom.aggregates import fedex_lora, flora
from fedloom.clients import sgd_client
from fedloom.data.pair_batches import PAIR
from fedloom.errors import UserError
from fedloom.evaluate.preference import preference_evaluation, preference_figures
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.types import Client

TOLERANCE = 1e-10  # float64


def pair_batch(seed: int, pairs: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    """Prompts of three tokens, answers of different lengths, padding with token 0 that also stands in answers."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (2, pairs, tokens), generator=draw)
    ids[1, :, :3] = ids[0, :, :3]
    mask = torch.zeros_like(ids)
    for side in range(2):
        for row in range(pairs):
            end = 5 + (seed + 3 * side + 2 * row) % (tokens - 5)
            mask[side, row, 3:end] = 1
            ids[side, row, end:] = 0
    labels = torch.full_like(ids[0], -100)
    labels[:, 1] = PAIR
    return {
        "input_ids": ids[0],
        "chosen_mask": mask[0],
        "rejected_ids": ids[1],
        "rejected_mask": mask[1],
        "labels": labels,
        "lengths": (ids != 0).sum((0, 2)),
    }


def pair_clients(num: int = 4) -> list[Client]:
    return [
        Client(
            f"c{i}",
            tuple(pair_batch(100 * i + j, pairs=1 + (i + j) % 3, tokens=10 + i % 3) for j in range(1 + i % 3)),
            weight=1.0 + i,
        )
        for i in range(num)
    ]


def one(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf[None] for name, leaf in batch.items()}


def moved(adapter, seed: int = 0) -> dict[str, Tensor]:
    """A tree away from the start, where the reference is not the policy."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (leaf + 0.1 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype))[None]
        for name, leaf in adapter.init(3).items()
    }


def answers(model, ids: Tensor, mask: Tensor) -> Tensor:
    """log-likelihood of each answer, from whole logits, token by token."""
    found = []
    for row, marks in zip(ids, mask, strict=True):
        logp = model(input_ids=row[None]).logits[0].log_softmax(-1)
        found.append(sum(logp[t - 1, row[t]] for t in range(1, len(row)) if marks[t]))
    return torch.stack(found)


def plain_losses(model, base, batch, beta, kind, smoothing=0.0):
    """The equations as the papers print them; `model` is the policy, `base` the reference."""
    ratio_w = answers(model, batch["input_ids"], batch["chosen_mask"]) - answers(
        base, batch["input_ids"], batch["chosen_mask"]
    )
    ratio_l = answers(model, batch["rejected_ids"], batch["rejected_mask"]) - answers(
        base, batch["rejected_ids"], batch["rejected_mask"]
    )
    if kind in ("sigmoid_norm", "ipo"):
        ratio_w, ratio_l = ratio_w / batch["chosen_mask"].sum(1), ratio_l / batch["rejected_mask"].sum(1)
    h = ratio_w - ratio_l
    if kind == "hinge":
        return (1 - beta * h).clamp(min=0)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * torch.log(torch.sigmoid(beta * h)) - smoothing * torch.log(torch.sigmoid(-beta * h))


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing"),
    [("sigmoid", 0.1, 0.0), ("sigmoid", 2.0, 0.2), ("sigmoid_norm", 1.0, 0.0), ("hinge", 0.3, 0.0), ("ipo", 0.4, 0.0)],
)
def test_loss_and_gradients_are_those_of_the_papers(kind, beta, smoothing):
    adapter = dpo(small_lora(), beta=beta, loss_type=kind, label_smoothing=smoothing)
    base = llama()
    tree, batch = moved(adapter), pair_batch(5, pairs=3)
    ours = {name: leaf.clone().requires_grad_() for name, leaf in tree.items()}
    loss = adapter.loss(ours, one(batch))
    got = torch.autograd.grad(loss.sum(), list(ours.values()))

    theirs = {name: leaf.clone().requires_grad_() for name, leaf in tree.items()}
    scale = adapter.scale_of()
    weights = {
        f"{name}.weight": layer.weight.detach()
        + scale * theirs[f"{name}.lora_B.weight"][0] @ theirs[f"{name}.lora_A.weight"][0]
        for name, layer in adapter.sites.items()
    }
    plain = copy.deepcopy(base)

    def policy(input_ids):
        return torch.func.functional_call(plain, weights, kwargs={"input_ids": input_ids})

    want_loss = plain_losses(policy, base, batch, beta, kind, smoothing).mean()
    want = torch.autograd.grad(want_loss, list(theirs.values()))
    assert float(loss.detach()[0]) == pytest.approx(float(want_loss.detach()), rel=TOLERANCE)
    assert want_loss > 1e-3
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) < TOLERANCE * (1 + float(b.abs().max()))
    assert max(float(g.abs().max()) for g in got) > 1e-4


def test_the_untouched_adapter_is_its_own_reference():
    adapter, batch = dpo(small_lora()), pair_batch(1, pairs=3)
    tree = {name: leaf[None] for name, leaf in adapter.init(0).items()}
    found = adapter.rewards(tree, one(batch))
    assert torch.equal(found.chosen_CB, torch.zeros_like(found.chosen_CB))
    total, count = adapter.nll(tree, one(batch))
    assert float(total[0]) == pytest.approx(3 * math.log(2), rel=1e-12) and count.tolist() == [3]
    [row] = preference_evaluation("v", lambda client: [batch]).run(adapter, tree, [Client("a", ())])
    assert preference_figures(row) == {
        "preference_accuracy": 0.5, "reward_chosen": 0.0, "reward_rejected": 0.0, "reward_margin": 0.0,
    }  # fmt: skip


KINDS = {
    "lora": lambda model: lora(model, rank=4, alpha=8.0),
    "prompt_tuning": lambda model: prompt_tuning(model, num_virtual_tokens=3),
    "p_tuning": lambda model: p_tuning(model, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix_tuning": lambda model: prefix_tuning(model, num_virtual_tokens=3),
    "dora": lambda model: dora(model, rank=4, alpha=8.0),
    "ia3": ia3,
    "full": full,
    "last_layers": lambda model: last_layers(model, layers=1),
    "bottleneck": lambda model: bottleneck(model, size=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_has_the_bare_base_as_reference(kind):
    adapter, base, batch = dpo(KINDS[kind](llama())), llama(), pair_batch(2)
    tree = moved(adapter)
    with adapter.bound(tree) as model:
        want = plain_losses(model, base, batch, 0.1, "sigmoid")
    assert float((adapter.rewards(tree, one(batch)).loss_CB[0] - want.detach()).abs().max()) < 1e-9
    assert float((want.detach() - math.log(2)).abs().max()) > 1e-4, "the policy did not move"


def test_padding_pairs_and_cohorts_change_nothing():
    adapter = dpo(small_lora())
    trees, batches = [moved(adapter, 1), moved(adapter, 2)], [pair_batch(3, 3, 12), pair_batch(4, 1, 10)]
    alone = [adapter.loss(tree, one(batch)) for tree, batch in zip(trees, batches, strict=True)]
    from fedloom.runtimes.cohort import collate

    both = collate(batches, [0, 0], torch.device("cpu"))
    tree_C = {name: torch.cat([tree[name] for tree in trees]) for name in trees[0]}
    assert float((adapter.loss(tree_C, both) - torch.cat(alone)).abs().max()) < TOLERANCE
    assert adapter.nll(tree_C, both)[1].tolist() == [3, 1]


@pytest.mark.parametrize("pieces", [2, 3])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(pieces):
    """Five pairs of different lengths: pieces split between pairs, and weigh by pairs."""
    adapter, cohort = dpo(small_lora()), [Client("a", (pair_batch(8, pairs=5),))]
    states = []
    for size in (1, pieces):
        algorithm = fedavg(sgd_client(sgd(0.5), accumulation_steps=size))
        state = initial_state(algorithm, adapter, 3)
        states.append(run_round(algorithm, adapter, sequential(), state, cohort)[0])
    assert gap(states[0].params, states[1].params) < TOLERANCE
    assert gap(states[0].params, initial_state(fedavg(), adapter, 3).params) > 1e-4


@pytest.mark.parametrize("rule", [flora, fedex_lora])
def test_the_reference_stays_the_first_base_when_rounds_merge_into_it(rule):
    """After two rounds that merge, rewards are those of a policy with the merges against a base without them."""
    adapter = dpo(small_lora())
    algorithm = fedavg(sgd_client(sgd(2.0)), aggregate=rule(adapter.scale_of()))
    state = initial_state(algorithm, adapter, 3)
    for _ in range(2):
        state, report = run_round(algorithm, adapter, batched(3), state, pair_clients())
        assert not report.failed
    assert state.base, "nothing was merged"
    adapter.sync(state.base)
    batch, base = pair_batch(9, pairs=3), llama()
    tree = {name: leaf[None] for name, leaf in state.params.items()}
    merged = adapter.model.model.layers[0].self_attn.q_proj.weight.clone()
    assert not torch.equal(merged, base.model.layers[0].self_attn.q_proj.weight)
    with adapter.bound(tree) as model:
        want = plain_losses(model, base, batch, 0.1, "sigmoid")
        moved_by = answers(model, batch["input_ids"], batch["chosen_mask"]) - answers(
            base, batch["input_ids"], batch["chosen_mask"]
        )
    found = adapter.rewards(tree, one(batch))
    assert float((found.loss_CB[0] - want).abs().max()) < 1e-9
    assert float((found.chosen_CB[0] - 0.1 * moved_by).abs().max()) < 1e-9 and float(moved_by.abs().max()) > 1e-3
    assert torch.equal(adapter.model.model.layers[0].self_attn.q_proj.weight, merged), "the merges were not put back"


def test_training_prefers_what_was_chosen():
    adapter, cohort = dpo(small_lora(), beta=0.5), pair_clients()
    algorithm = fedavg(sgd_client(sgd(0.2)))
    state = initial_state(algorithm, adapter, 3)
    opened = {client.id: client.batches for client in cohort}
    measure = preference_evaluation("own", lambda client: opened[client])
    losses = []
    for _ in range(6):
        found = batched(4).evaluate(algorithm, adapter, state, cohort, measure)
        losses.append(sum(row["loss_sum"] for row in found.values()))
        state, report = run_round(algorithm, adapter, batched(4), state, cohort)
    pairs = sum(len(batch["labels"]) for client in cohort for batch in client.batches)
    assert report.metrics["target_tokens"] == pairs == report.metrics["examples"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(
        preference_figures(row)["preference_accuracy"] > 0.5
        for row in batched(4).evaluate(algorithm, adapter, state, cohort, measure).values()
    )


def test_settings_that_cannot_be_are_refused_with_every_reason():
    with pytest.raises(UserError) as caught:
        dpo(small_lora(), beta=0.0, loss_type="sigmod", label_smoothing=0.7)
    said = caught.value.message
    assert "did you mean 'sigmoid'" in said and "beta is 0.0" in said and "label_smoothing is 0.7" in said
    with pytest.raises(UserError, match="hinge has none"):
        dpo(small_lora(), loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(UserError, match="only copy of the weights"):
        dpo(seed_space(llama(), num_seeds=4))
    adapter = dpo(small_lora())
    with pytest.raises(UserError, match="compares two answers"):
        adapter.loss(moved(adapter), {"input_ids": torch.zeros(1, 1, 4), "labels": torch.zeros(1, 1, 4)})
